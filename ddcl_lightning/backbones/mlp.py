"""A small multilayer perceptron on feature vectors."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.backbones.base import Backbone, Tokens
from ddcl_lightning.backbones.identity import masked_tokens


class MLPBackbone(Backbone):
    """Linear layers with ReLU between them on each vector by itself: the encoder of an RQ-VAE on item embeddings.

    Takes ``x`` of shape ``(B, in_features)``, one token per sample, or ``(B, T, in_features)`` with a ``mask``.

    Args:
        in_features: Dimension of the vectors.
        embed_dim: Dimension of the tokens.
        widths: Of the hidden layers; none of them makes a linear map.

    Raises:
        ValueError: If a size is below 1, or a batch has another dimension.
    """

    @typed
    def __init__(self, in_features: int, embed_dim: int = 32, widths: Sequence[int] = (512, 256)) -> None:
        super().__init__()
        require_at_least(1, in_features=in_features, embed_dim=embed_dim)
        if any(width < 1 for width in widths):
            raise ValueError(f"widths must be at least 1 each; got {list(widths)}. Pass 1 or more.")
        self.in_features, self.embed_dim = in_features, embed_dim
        self.layers = perceptron([in_features, *widths, embed_dim])

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, embed_dim)`` with the batch's ``mask``."""
        values, mask = masked_tokens(batch, self.in_features)
        return Tokens(self.layers(values.to(next(self.layers.parameters()).dtype)), mask)


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers between the sizes, at least two, with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
