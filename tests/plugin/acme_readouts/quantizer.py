"""A quantizer."""

import torch
from torch import Tensor, nn

from ddcl_lightning import Quantizer, QuantizerOutput, QuantizerTerms, typed


class SignQuantizer(Quantizer):
    """The signs of a few projections, one code of two for each, and a vector for each of both."""

    @typed
    def __init__(self, dim: int, num_codebooks: int = 3) -> None:
        super().__init__()
        self.dim, self.num_codes, self.num_codebooks = dim, 2, num_codebooks
        self.project, self.restore = nn.Linear(dim, num_codebooks), nn.Linear(num_codebooks, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        self.check_mask(tokens, mask)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        padding = ~mask.unsqueeze(-1)
        soft = self.project(tokens.masked_fill(padding, 0.0)).tanh()
        codes = (soft > 0).long()
        signs = soft + (2.0 * codes - 1 - soft).detach()
        distance = (soft.abs() - 1).square().masked_fill(padding, 0.0).sum() / mask.sum()
        return QuantizerOutput(
            self.restore(signs).masked_fill(padding, 0.0),
            codes.masked_fill(padding, -1),
            QuantizerTerms(0.1 * distance, {"softness": distance.detach()}),
        )
