"""Metrics of clusterings, codebooks and reconstructions over whole data sets, for torchmetrics."""

from ddcl_lightning.metrics.clustering_metrics import ClusteringMetrics
from ddcl_lightning.metrics.codebook_metrics import CodebookMetrics
from ddcl_lightning.metrics.reconstruction_metrics import ReconstructionMetrics
from ddcl_lightning.metrics.semantic_id_metrics import SemanticIDMetrics

__all__ = ["ClusteringMetrics", "CodebookMetrics", "ReconstructionMetrics", "SemanticIDMetrics"]
