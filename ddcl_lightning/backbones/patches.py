"""Patches of images as they are."""

import torch
from torch import Tensor
from torch.nn.functional import unfold

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs, refuse_mask
from ddcl_lightning.backbones.base import Backbone, Tokens


class PatchBackbone(Backbone):
    """Images to one token per patch: its pixels, channel by channel and row by row. It has no parameters.

    Args:
        in_channels: C of the images.
        patch_size: Height and width of a patch in pixels.
        stride: Pixels from one patch to the next; by default ``patch_size``, so that patches do not overlap.

    Raises:
        ValueError: If a size is below 1, or a batch has another shape.
    """

    @typed
    def __init__(self, in_channels: int = 1, patch_size: int = 4, stride: int | None = None) -> None:
        super().__init__()
        stride = patch_size if stride is None else stride
        for name, value in (("in_channels", in_channels), ("patch_size", patch_size), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Pass 1 or more.")
        self.in_channels, self.patch_size, self.stride = in_channels, patch_size, stride
        self.embed_dim = in_channels * patch_size * patch_size

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, C * patch_size ** 2)`` of images ``(B, C, H, W)``, row by row; bytes are scaled to [0, 1]."""
        return Tokens(self.pieces(batch).flatten(2))

    def token_grid(self, batch: Batch) -> tuple[int, int, int] | None:
        """The grid of the patches, where they cover the image without overlap."""
        height, width = inputs(batch).shape[-2:]
        if self.stride != self.patch_size or height % self.patch_size or width % self.patch_size:
            return None
        return 0, height // self.patch_size, width // self.patch_size

    def pieces(self, batch: Batch) -> Tensor:
        """The patches as images ``(B, T, C, patch_size, patch_size)``, in the order of the tokens."""
        refuse_mask(batch, type(self).__name__)
        x = inputs(batch)
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < self.patch_size:
            raise ValueError(
                f"batch x must have shape (B, in_channels = {self.in_channels}, H, W) with H and W of at least "
                f"patch_size = {self.patch_size}; got {tuple(x.shape)}. Set in_channels and patch_size to the data's, "
                "or ask the data module for images (as_images: true)."
            )
        x = x / 255 if x.dtype == torch.uint8 else x.to(torch.get_default_dtype())
        size = (self.in_channels, self.patch_size, self.patch_size)
        return torch.unflatten(unfold(x, self.patch_size, stride=self.stride).mT, -1, size)
