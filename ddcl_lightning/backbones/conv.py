"""A small convolutional encoder for training from scratch."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs, refuse_mask
from ddcl_lightning.backbones.base import Backbone, Tokens


class ConvBackbone(Backbone):
    """Images to one token per cell of a feature map: each width halves the height and the width of the image.

    The default turns 32 x 32 pixels into 8 x 8 = 64 tokens. Group normalization keeps a sample's tokens independent
    of its batch, and the last layer is linear, so tokens are not confined to positive values.

    Args:
        in_channels: C of the images.
        embed_dim: Dimension of the tokens.
        widths: Channels of each stage, at least one stage.

    Raises:
        ValueError: If a size is below 1, or a batch has another shape.
    """

    @typed
    def __init__(self, in_channels: int, embed_dim: int = 64, widths: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1; got {in_channels}. Pass 1 or more.")
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1; got {embed_dim}. Pass 1 or more.")
        if not widths or min(widths) < 1:
            raise ValueError(
                f"widths must hold at least one number of channels >= 1; got {tuple(widths)}. "
                "Pass a list such as [32, 64]."
            )
        self.in_channels, self.embed_dim = in_channels, embed_dim
        sizes = [in_channels, *widths]
        self.stages = nn.Sequential(*(_stage(before, after) for before, after in pairwise(sizes)))
        self.projection = nn.Conv2d(sizes[-1], embed_dim, kernel_size=1)

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, embed_dim)``, row by row.

        The batch's ``x`` is ``(B, C, H, W)``, or ``(B, H * W)`` for square images of one channel; bytes are scaled to
        [0, 1]. T is H * W / 4 per stage, H and W rounded up where they are odd.
        """
        features: Tensor = self.projection(self.stages(self._images(batch)))
        return Tokens(features.flatten(2).transpose(1, 2))

    def token_grid(self, batch: Batch) -> tuple[int, int, int] | None:
        """The cells of the feature map."""
        height, width = self._images(batch).shape[-2:]
        for _ in range(len(self.stages)):
            height, width = (height + 1) // 2, (width + 1) // 2
        return 0, height, width

    def _images(self, batch: Batch) -> Tensor:
        refuse_mask(batch, type(self).__name__)
        x = inputs(batch)
        side = math.isqrt(x.shape[-1]) if x.dim() else 0
        if x.dim() == 2 and self.in_channels == 1 and side * side == x.shape[1]:
            x = x.view(x.shape[0], 1, side, side)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            flat = ", or (B, H * W) with H = W" if self.in_channels == 1 else ""
            raise ValueError(
                f"batch x must have shape (B, in_channels = {self.in_channels}, H, W){flat}; got {tuple(x.shape)}. "
                "Set in_channels to that of the data, or put the channels second."
            )
        if x.dtype == torch.uint8:
            return x.to(self.projection.weight.dtype) / 255
        if not x.is_floating_point():
            raise TypeError(
                f"batch x must hold floating-point numbers or bytes; got {x.dtype}. Convert it with x.float()."
            )
        return x.to(self.projection.weight.dtype)


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """Half the height and width, then one residual block."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1), Residual(out_channels)
    )


class Residual(nn.Module):
    """``x + f(x)`` with two convolutions, normalized before each (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(channels, 8)
        self.block = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """A feature map ``(B, channels, H, W)`` of the same shape."""
        features: Tensor = x + self.block(x)
        return features
