"""Clustering: the quantization loss alone."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ddcl_lightning._utils.arguments import described, typed
from ddcl_lightning._utils.batch import Batch, labels
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.metrics.clustering_metrics import ClusteringMetrics
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks.base import Task


class Clustering(Task):
    """Clustering by ``L_q`` alone: each sample belongs to the prototype with its largest mean assignment.

    Labels, where the batch has them, are used for metrics only.

    Args:
        num_classes: Classes of the labels; None evaluates usage and perplexity alone.

    Raises:
        ValueError: If the head has no prototypes, or ``num_classes`` is below 1.
    """

    unsupervised = True

    @typed
    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, or None without labels; got {num_classes}. Pass 1 or more."
            )
        self.num_classes = num_classes
        self._sizes: list[int] = []

    def build(self, head: Head) -> None:
        """Read the number of clusters from the head's last bank."""
        banks = list(find_banks(head).values())
        if not banks:
            raise ValueError(f"Clustering needs a head with prototypes; got {type(head).__name__}. Use DDCLReadout.")
        self._sizes = [banks[-1].num_prototypes] * banks[-1].num_heads

    def losses(self, readout: ReadoutOutput, batch: Batch) -> Mapping[str, Tensor]:
        """``L_q`` (+ the head's regularization), and its two parts summed over levels and heads."""
        loss = readout.quantization_loss()
        return {
            "loss": loss if readout.regularization is None else loss + readout.regularization,
            "ols": torch.stack([terms.ols.sum() for terms in readout.loss_terms]).sum(),
            "variance": torch.stack([terms.variance.sum() for terms in readout.loss_terms]).sum(),
        }

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """One set of clustering metrics per head; a single head's go without a prefix."""
        classes = self.num_classes or 1
        if len(self._sizes) == 1:
            return {"": ClusteringMetrics(self._sizes[0], classes)}
        return {f"head{i}_": ClusteringMetrics(size, classes) for i, size in enumerate(self._sizes)}

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Count the batch's clusters against its labels, or against none."""
        if readout.assignments is None:
            raise RuntimeError("Clustering metrics need assignments; run the head in evaluation mode.")
        if readout.assignments.shape[1] != len(self._sizes):
            raise ValueError(
                f"Clustering needs assignments (B, H = {len(self._sizes)}, K), heads before prototypes; got "
                f"{described(readout.assignments)}. Return them so from the head, with .mT where they are the other "
                "way round."
            )
        clusters = readout.assignments.argmax(-1)
        truth = labels(batch) if self.num_classes is not None else None
        if truth is None:
            truth = torch.full_like(clusters[:, 0], -1)
        for head, metric in enumerate(metrics.values()):
            assert isinstance(metric, ClusteringMetrics)
            if metric.num_clusters != readout.assignments.shape[-1]:  # the bank has changed since the last evaluation
                metric.resize(readout.assignments.shape[-1])
            metric.update(clusters[:, head], truth)
