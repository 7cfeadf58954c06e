"""Tasks: from a readout to a loss and metrics."""

from ddcl_lightning.tasks.base import Task
from ddcl_lightning.tasks.classification import Classification
from ddcl_lightning.tasks.clustering import Clustering

__all__ = ["Classification", "Clustering", "Task"]
