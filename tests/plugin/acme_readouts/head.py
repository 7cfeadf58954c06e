"""A head with prototypes."""

import torch
from torch import Tensor

from ddcl_lightning import Head, PrototypeBank, ReadoutOutput, typed


class FurthestToken(Head):
    """Pools the token that is furthest from its soft centroid, through a bank of its own."""

    @typed
    def __init__(self, num_prototypes: int = 6) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes

    def build(self, embed_dim: int) -> None:
        super().build(embed_dim)
        self.bank = PrototypeBank(self.num_prototypes, embed_dim)
        self.pooled_dim = embed_dim

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        output = self.bank(tokens, mask, need_weights=True)
        mask = torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask
        distance = (tokens - output.centroids).square().sum(-1).masked_fill(~mask, -1.0)
        furthest = tokens[torch.arange(len(tokens)), distance.argmax(-1)]
        weights = output.weights.masked_fill(~mask[:, None, :, None], 0.0).sum(2) / mask.sum(1)[:, None, None]
        return ReadoutOutput(output.centroids, furthest, [output.terms], weights)
