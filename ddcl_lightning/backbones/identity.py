"""Precomputed features as they are."""

from torch import Tensor

from ddcl_lightning.backbones.base import Backbone, Tokens
from ddcl_lightning.batch import Batch, inputs, mask


def as_tokens(x: Tensor, in_features: int) -> Tensor:
    """Features ``(B, F)`` or ``(B, T, F)`` as tokens ``(B, T, F)``, with an error that names the sizes."""
    if x.dim() not in (2, 3) or x.shape[-1] != in_features:
        raise ValueError(
            f"batch x must have shape (B, {in_features}) or (B, T, {in_features}); got {tuple(x.shape)}. "
            "Set the backbone's in_features to the data's dimension, or flatten the data."
        )
    return x.unsqueeze(1) if x.dim() == 2 else x


class IdentityBackbone(Backbone):
    """Passes precomputed features through: ``x`` of shape ``(B, in_features)`` or ``(B, T, in_features)``.

    Args:
        in_features: Dimension of the features, which is also ``embed_dim``.

    Raises:
        ValueError: If ``in_features`` is below 1, or a batch has another dimension.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1; got {in_features}.")
        self.in_features = self.embed_dim = in_features

    def forward(self, batch: Batch) -> Tokens:
        """The batch's own ``x`` as tokens ``(B, T, in_features)``, with its ``mask``."""
        return Tokens(as_tokens(inputs(batch), self.in_features), mask(batch))
