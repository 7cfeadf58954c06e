"""What a user's own package may look like: a backbone, a head and a task, and nothing of ours but the base classes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError

from ddcl_lightning import Backbone, Head, PrototypeBank, ReadoutOutput, Task, Tokens


class Strips(Backbone):
    """Rows of an 8 x 8 image as eight tokens."""

    def __init__(self, embed_dim: int = 12) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.linear = nn.Linear(8, embed_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tokens:
        return Tokens(self.linear(batch["x"].unflatten(1, (8, 8)) / 16))


class FurthestToken(Head):
    """Pools the token that is furthest from its soft centroid, through a bank of its own."""

    def __init__(self, num_prototypes: int = 6) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes

    def build(self, embed_dim: int) -> None:
        super().build(embed_dim)
        self.bank = PrototypeBank(self.num_prototypes, embed_dim)
        self.pooled_dim = embed_dim

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        output = self.bank(tokens, mask, need_weights=True)
        distance = (tokens - output.centroids).square().sum(-1)
        furthest = tokens[torch.arange(len(tokens)), distance.argmax(-1)]
        return ReadoutOutput(output.centroids, furthest, [output.terms], output.weights.mean(2))


class DigitRegression(Task):
    """The digit as a number."""

    def build(self, head: Head) -> None:
        self.linear = nn.Linear(head.pooled_dim, 1)

    def losses(self, readout: ReadoutOutput, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        error = (self.linear(readout.pooled).squeeze(-1) - batch["y"]).square().mean()
        return {"loss": error + 0.1 * readout.quantization_loss(), "squared_error": error}

    def metrics(self) -> Mapping[str, Metric]:
        return {"": _Errors()}

    def update_metrics(
        self, metrics: Mapping[str, Metric], readout: ReadoutOutput, batch: Mapping[str, Tensor]
    ) -> None:
        metrics[""].update(self.linear(readout.pooled).squeeze(-1), batch["y"].float())


class _Errors(MeanAbsoluteError):
    def compute(self) -> dict[str, Tensor]:
        return {"mean_absolute_error": super().compute()}
