"""Classification: cross-entropy on the pooled readout plus the quantization loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, labels
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.tasks.base import Task, note_unused_weight, with_head_losses


class Classification(Task):
    """A linear classifier on the pooled readout: cross-entropy + lambda ``L_q`` (section 7.3).

    Args:
        num_classes: C, at least 2.
        quantization_weight: lambda >= 0; a head without prototypes has no ``L_q``, and trains on the cross-entropy.
        label_smoothing: In [0, 1).
        class_weights: Weight of each class in the cross-entropy, C numbers.

    Raises:
        ValueError: If an argument is out of its range.
    """

    classifier: nn.Linear
    class_weights: Tensor | None

    @typed
    def __init__(
        self,
        num_classes: int,
        quantization_weight: float = 0.1,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}. Pass 2 or more.")
        if quantization_weight < 0:
            raise ValueError(f"quantization_weight must be >= 0; got {quantization_weight}. Pass 0 or more.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}. Pass 0 for none.")
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(
                f"class_weights must have num_classes = {num_classes} entries; got {len(class_weights)}. Give one per "
                "class."
            )
        self.num_classes, self.quantization_weight = num_classes, quantization_weight
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)

    def build(self, head: Head) -> None:
        """Create the classifier on ``head.pooled_dim`` inputs."""
        note_unused_weight(head, self.quantization_weight)
        self.classifier = nn.Linear(head.pooled_dim, self.num_classes)

    def logits(self, readout: ReadoutOutput) -> Tensor:
        """Class scores ``(B, C)``."""
        scores: Tensor = self.classifier(readout.pooled.to(self.classifier.weight.dtype))
        return scores

    def losses(self, readout: ReadoutOutput, batch: Batch) -> Mapping[str, Tensor]:
        """Cross-entropy + lambda ``L_q`` (+ the head's regularization), and each of them beside it."""
        entropy = cross_entropy(
            self.logits(readout), self._labels(batch), self.class_weights, label_smoothing=self.label_smoothing
        )
        return with_head_losses("cross_entropy", entropy, readout, self.quantization_weight)

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """Accuracy over samples and F1 averaged over classes."""
        return {
            "": MetricCollection(
                {
                    "acc": MulticlassAccuracy(self.num_classes, average="micro"),
                    "f1": MulticlassF1Score(self.num_classes, average="macro"),
                }
            )
        }

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Compare predicted with true classes."""
        metrics[""].update(self.logits(readout).argmax(-1), self._labels(batch))

    def predict(self, readout: ReadoutOutput, batch: Batch) -> dict[str, Tensor]:
        """Predicted class and its probability, ``(B,)`` each."""
        probability, predicted = self.logits(readout).softmax(-1).max(-1)
        return {"predicted_class": predicted, "probability": probability}

    def _labels(self, batch: Batch) -> Tensor:
        truth = labels(batch)
        if truth is None:
            raise ValueError("Classification needs labels: give the batch a tensor 'y', or make it a pair (x, y).")
        if truth.dim() != 1 or truth.is_floating_point():
            raise ValueError(
                f"labels must be integers of shape (B,); got {truth.dtype} of shape {tuple(truth.shape)}. Convert them "
                "with y.flatten().long()."
            )
        if bool(((truth < 0) | (truth >= self.num_classes)).any()):
            raise ValueError(
                f"labels must be in [0, num_classes = {self.num_classes}); got values from {int(truth.min())} to "
                f"{int(truth.max())}. Set num_classes, or filter unlabelled samples."
            )
        return truth.long()
