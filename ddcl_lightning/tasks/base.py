"""The task protocol."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.metrics.stages import StageMetrics, UnknownMetric
from ddcl_lightning.nn.discovery import find_banks


class Task(nn.Module, ABC):
    """Base of tasks. Subclass it and write ``losses``; metrics (with ``update_metrics``) and predictions are optional.

    Attributes:
        unsupervised: Whether the only loss is the quantization loss, under which a trainable encoder shrinks its
            embeddings; the module then bounds their scale.
    """

    unsupervised: bool = False

    def build(self, head: Head) -> None:
        """Create what depends on the head (a classifier on ``head.pooled_dim``, say); called once."""

    @abstractmethod
    def losses(self, readout: ReadoutOutput, batch: Batch) -> Mapping[str, Tensor]:
        """Scalar losses of a batch: ``"loss"`` is what trains, the others are logged beside it."""

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """New metrics for one evaluation stage, by name; the module keeps one set per stage.

        A metric of one value is logged under its name, ``{"mae": MeanAbsoluteError()}`` as ``val/mae``; one of several
        (a ``MetricCollection``, a wrapper, a dictionary) under its name followed by the name of each value; a vector as
        ``val/acc_0``, ``val/acc_1`` and so on. NaN, None and metrics without data are left out.
        """
        return {}

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Update the metrics with one batch; a task with ``metrics`` must override it."""

    def train_metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """New metrics of the training batches, logged once per epoch: for values that cost no second pass.

        Their state is not saved: a run resumed in the middle of an epoch counts from there on.
        """
        return {}

    def update_train_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Update the training metrics with one batch; the readout is that of training, without assignments.

        A task with ``train_metrics`` must override it.
        """

    def predict(self, readout: ReadoutOutput, batch: Batch) -> dict[str, Tensor]:
        """Columns ``(B,)`` that ``predict`` adds to the assignments."""
        return {}


def check_updates(task: Task, stages: Mapping[str, Sized]) -> None:
    """Raise unless a task that has metrics updates them: they would log nothing, and say nothing.

    Args:
        task: The task.
        stages: Its metrics of ``"train"`` and of the other stages.

    Raises:
        TypeError: If it does not.
    """
    for stage, metrics in stages.items():
        prefix = "train_" if stage == "train" else ""
        update = f"update_{prefix}metrics"
        if len(metrics) and getattr(getattr(task, update), "__func__", None) is getattr(Task, update):
            kind = type(task).__name__
            raise TypeError(
                f"{kind} must write {update}(metrics, readout, batch), because its {prefix}metrics() returns "
                f"{len(metrics)}; got none, so they would never be logged. Write it, with "
                f"metrics['name'].update(...), or leave {prefix}metrics() out."
            )


def update_stage(task: Task, metrics: StageMetrics, readout: ReadoutOutput, batch: Batch) -> None:
    """Update the metrics of a stage with one batch, by the method that the task has written for it.

    Raises:
        ValueError: If it reads a metric under a name that the task has not given.
    """
    name = "update_train_metrics" if metrics.stage == "train" else "update_metrics"
    try:
        getattr(task, name)(metrics.by_name(), readout, batch)
    except UnknownMetric as error:
        raise ValueError(f"{type(task).__name__}.{name}() {error.args[0]}") from error


def note_unused_weight(head: Head, quantization_weight: float) -> None:
    """Warn that a head has no ``L_q`` where the task has a weight for it."""
    if quantization_weight > 0 and not find_banks(head):
        rank_zero_info(f"{type(head).__name__} has no prototypes: quantization_weight is not used.")


def with_head_losses(name: str, loss: Tensor, readout: ReadoutOutput, quantization_weight: float) -> dict[str, Tensor]:
    """``"loss"``: a task's own + lambda ``L_q`` where the head has prototypes + its regularization; and each alone."""
    losses = {name: loss}
    if quantization_weight > 0 and readout.loss_terms:
        losses["quantization"] = readout.quantization_loss()
        loss = loss + quantization_weight * losses["quantization"]
    if readout.regularization is not None:
        losses["regularization"] = readout.regularization
        loss = loss + readout.regularization
    return {"loss": loss, **losses}
