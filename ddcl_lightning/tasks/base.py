"""The task protocol."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from ddcl_lightning.batch import Batch
from ddcl_lightning.heads.base import Head, ReadoutOutput


class Task(nn.Module, ABC):
    """What the readout is for. Subclass it and write ``losses``; metrics and extra predictions are optional.

    Attributes:
        unsupervised: Whether the only loss is the quantisation loss, under which a trainable encoder shrinks its
            embeddings; the module then bounds their scale.
    """

    unsupervised: bool = False

    def build(self, head: Head) -> None:
        """Create what depends on the head (a classifier on ``head.pooled_dim``, say); called once."""

    @abstractmethod
    def losses(self, readout: ReadoutOutput, batch: Batch) -> Mapping[str, Tensor]:
        """Scalar losses of a batch: ``"loss"`` is what trains, the others are logged beside it."""

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """New metrics for one evaluation stage, by name; the module keeps one set per stage."""
        return {}

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Feed the metrics with one batch."""

    def predict(self, readout: ReadoutOutput, batch: Batch) -> dict[str, Tensor]:
        """Columns ``(B,)`` that ``predict`` adds to the assignments."""
        return {}
