"""Precomputed features as they are."""

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs, token_mask
from ddcl_lightning.backbones.base import Backbone, Tokens


def as_tokens(x: Tensor, in_features: int) -> Tensor:
    """Features ``(B, F)`` or ``(B, T, F)`` as tokens ``(B, T, F)``, with an error that names the sizes."""
    if x.dim() not in (2, 3) or x.shape[-1] != in_features:
        raise ValueError(
            f"batch x must have shape (B, {in_features}) or (B, T, {in_features}); got {tuple(x.shape)}. "
            "Set the backbone's in_features to the data's dimension, or flatten the data."
        )
    return x.unsqueeze(1) if x.dim() == 2 else x


def masked_tokens(batch: Batch, in_features: int) -> Tokens:
    """Features of a batch and their mask; padding is finite, for NaN times a gradient of zero is NaN."""
    values = as_tokens(inputs(batch), in_features)
    valid = token_mask(batch, values)
    if valid is not None:
        values = torch.where(valid.unsqueeze(-1), values, values.nan_to_num(0.0, 0.0, 0.0))
    return Tokens(values, valid)


class IdentityBackbone(Backbone):
    """Backbone of precomputed features: ``x`` of shape ``(B, in_features)`` or ``(B, T, in_features)``.

    Padding is told by a boolean ``mask`` ``(B, T)``, True for valid tokens, or a tokenizer's ``attention_mask``.

    Args:
        in_features: Dimension of the features, which is also ``embed_dim``.

    Raises:
        ValueError: If ``in_features`` is below 1, or a batch has another dimension.
    """

    @typed
    def __init__(self, in_features: int) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1; got {in_features}. Pass 1 or more.")
        self.in_features = self.embed_dim = in_features

    def forward(self, batch: Batch) -> Tokens:
        """The batch's own ``x`` as tokens ``(B, T, in_features)``, with its ``mask``."""
        return masked_tokens(batch, self.in_features)
