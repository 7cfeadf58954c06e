"""A backbone."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ddcl_lightning import Backbone, Tokens, input_sample, typed


class Strips(Backbone):
    """Rows of an 8 x 8 image as eight tokens, less the mean image of the training data."""

    @typed
    def __init__(self, embed_dim: int = 12) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.linear = nn.Linear(8, embed_dim)
        self.register_buffer("mean", torch.zeros(64))

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.mean.copy_(input_sample(batches).mean(0))

    def forward(self, batch: Mapping[str, Tensor]) -> Tokens:
        return Tokens(self.linear((batch["x"] - self.mean).unflatten(1, (8, 8))))
