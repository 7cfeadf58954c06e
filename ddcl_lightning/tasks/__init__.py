"""Tasks: from a readout to a loss and metrics."""

from ddcl_lightning.tasks.base import Task
from ddcl_lightning.tasks.classification import Classification
from ddcl_lightning.tasks.clustering import Clustering
from ddcl_lightning.tasks.joint import ClassificationAndClustering
from ddcl_lightning.tasks.reconstruction import Reconstruction
from ddcl_lightning.tasks.semantic_ids import SemanticIDs

__all__ = ["Classification", "ClassificationAndClustering", "Clustering", "Reconstruction", "SemanticIDs", "Task"]
