"""A task."""

from collections.abc import Mapping

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError

from acme_readouts.metric import WithinOne
from ddcl_lightning import Head, ReadoutOutput, Task


class DigitRegression(Task):
    """The digit as a number."""

    def build(self, head: Head) -> None:
        self.linear = nn.Linear(head.pooled_dim, 1)

    def number(self, readout: ReadoutOutput) -> Tensor:
        return self.linear(readout.pooled).squeeze(-1)

    def losses(self, readout: ReadoutOutput, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        error = (self.number(readout) - batch["y"]).square().mean()
        return {"loss": error + 0.1 * readout.quantization_loss(), "squared_error": error}

    def metrics(self) -> Mapping[str, Metric]:
        return {"mean_absolute_error": MeanAbsoluteError(), "within_one": WithinOne()}

    def update_metrics(
        self, metrics: Mapping[str, Metric], readout: ReadoutOutput, batch: Mapping[str, Tensor]
    ) -> None:
        for metric in metrics.values():
            metric.update(self.number(readout), batch["y"].float())

    def predict(self, readout: ReadoutOutput, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"number": self.number(readout)}
