"""What the prototypes of a trained module stand for: collected as data, rendered as one HTML page."""

from ddcl_lightning.explain.collection import collect
from ddcl_lightning.explain.explanation import Explanation
from ddcl_lightning.explain.report import render

__all__ = ["Explanation", "collect", "render"]
