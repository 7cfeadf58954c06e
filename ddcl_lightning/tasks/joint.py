"""Classification and clustering at once: one readout, judged as both."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import Metric, MetricCollection

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks.classification import Classification
from ddcl_lightning.tasks.clustering import Clustering

PREFIX = "cluster_"


class ClassificationAndClustering(Classification):
    """Cross-entropy + lambda ``L_q`` like :class:`Classification`, with the metrics of :class:`Clustering` beside.

    Answers whether the prototypes that serve a classifier are a sensible clustering too: ``val/acc`` is the
    classifier's accuracy, ``val/cluster_acc`` that of the strongest prototypes, best matched with the classes.

    Args:
        num_classes: C, at least 2.
        quantization_weight: lambda >= 0.
        label_smoothing: In [0, 1).
        class_weights: Weight of each class in the cross-entropy, C numbers.

    Under a head without prototypes the metrics of the clustering are left out.

    Raises:
        ValueError: If an argument is out of its range.
    """

    @typed
    def __init__(
        self,
        num_classes: int,
        quantization_weight: float = 0.1,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__(num_classes, quantization_weight, label_smoothing, class_weights)
        self.clustering: Clustering | None = Clustering(num_classes)

    def build(self, head: Head) -> None:
        """Create the classifier, and read the number of clusters from the head's last bank."""
        super().build(head)
        if not find_banks(head):
            self.clustering = None
            rank_zero_info(f"{type(head).__name__} has no prototypes: there are no metrics of their clustering.")
        elif self.clustering is not None:
            self.clustering.build(head)

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """Metrics of the classifier, and those of the prototypes under ``cluster_``."""
        clustering = {} if self.clustering is None else self.clustering.metrics()
        clusters = {PREFIX + name: metric for name, metric in clustering.items()}
        return {**super().metrics(), **clusters}

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Compare classes and clusters with the labels."""
        super().update_metrics(metrics, readout, batch)
        if self.clustering is None:
            return
        clusters = {name: metric for name, metric in metrics.items() if name.startswith(PREFIX)}
        self.clustering.update_metrics(clusters, readout, batch)
