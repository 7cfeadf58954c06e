"""Metrics of clusterings, codebooks and reconstructions over whole data sets, for torchmetrics."""

from ddcl_lightning.metrics.clustering import ClusteringMetrics
from ddcl_lightning.metrics.codebook import CodebookMetrics
from ddcl_lightning.metrics.reconstruction import ReconstructionMetrics

__all__ = ["ClusteringMetrics", "CodebookMetrics", "ReconstructionMetrics"]
