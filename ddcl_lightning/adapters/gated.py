"""Prototypes beside a block, behind a gate that starts closed."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.adapters.serial import require_same_dim
from ddcl_lightning.functional._common import zero_padding
from ddcl_lightning.nn.attention import DDCLAttention


class GatedPrototypes(PrototypeAdapter):
    """Parallel placement: a branch beside a block, ``y = block(x) + g(x) DDCL(x)``, behind a gate that starts closed.

    For a pretrained network: with ``g(x) = tanh(w x + b)`` per token and w = b = 0 it gives out to the last bit what it
    gave out before, and learns how much of the prototypes to let in. The call is the branch alone::

        y = block(x) + GatedPrototypes(DDCLAttention(64, 16))(x)

    What it gains on a small task is in ``docs/measurements.md``: about as much as any gated branch of its size.

    Args:
        layer: Tokens of dimension D to tokens of dimension D, without a residual of its own: the block is that.

    Raises:
        ValueError: If the layer has a residual, gives out another dimension, or needs a context.
    """

    @typed
    def __init__(self, layer: DDCLAttention) -> None:
        super().__init__()
        require_same_dim(layer)
        if layer.residual:
            raise ValueError(
                "layer must have residual=False beside a block: the block's own output is what the branch adds to."
            )
        self.layer = layer
        self.gate = nn.Linear(layer.embed_dim, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The gated branch, ``(B, T, D)``, zero at padding."""
        mask = self.mask if mask is None else mask
        output = self.layer(tokens, mask)
        self.terms = output.terms
        result: Tensor = self.gate_value(tokens, mask) * output.tokens
        return result

    def gate_value(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gate value of each token, ``(B, T, 1)`` in (-1, 1), for tokens ``(B, T, D)``."""
        return torch.tanh(self.gate(zero_padding(tokens, mask)))

    def merge(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The block's output and the branch of its input."""
        branch: Tensor = self(inputs)
        return output + branch
