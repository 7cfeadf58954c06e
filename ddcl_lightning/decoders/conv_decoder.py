"""A small convolutional decoder, the mirror of ConvBackbone."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.backbones.conv import Residual
from ddcl_lightning.decoders.base import Decoder, check_decoder_tokens

Output = Literal["linear", "sigmoid"]


class ConvDecoder(Decoder):
    """Tokens of a grid, row by row, to images: each width doubles the height and the width.

    Takes what :class:`~ddcl_lightning.ConvBackbone` makes: with the same number of widths, in reverse, an image comes
    back in its own size. A stage is one residual block, normalized in groups, and a transposed convolution; a last
    convolution makes the pixels of ``widths[-1] / 2`` channels in full size, which is better than pixels straight from
    a transposed convolution (``docs/measurements.md``, one-off trials).

    Args:
        out_channels: C of the images.
        widths: Channels at the start of each stage, at least one stage.
        size: ``(H, W)`` of the images. The grid is then ``ceil(H / 2^n) x ceil(W / 2^n)`` for n stages, and what the
            last stage makes beyond H and W is cut off, as odd sizes need it (28 -> 14 -> 7 -> 4, 4 -> 8 -> 16 -> 32,
            cut to 28). By default the grid is square and nothing is cut off.
        output: ``"linear"`` leaves the pixels as they are, so that errors have a gradient everywhere;
            ``"sigmoid"`` confines them to (0, 1).

    Raises:
        ValueError: If an argument is out of its range, or the tokens fill no such grid.
    """

    @typed
    def __init__(
        self,
        out_channels: int,
        widths: Sequence[int] = (64, 32),
        size: tuple[int, int] | None = None,
        output: Output = "linear",
    ) -> None:
        super().__init__()
        if out_channels < 1:
            raise ValueError(f"out_channels must be at least 1; got {out_channels}. Pass 1 or more.")
        if not widths or min(widths) < 1:
            raise ValueError(
                f"widths must hold at least one number of channels >= 1; got {tuple(widths)}. "
                "Pass a list such as [32, 64]."
            )
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be (H, W), both at least 1, or None; got {tuple(size)}. Pass 1 or more.")
        if output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}; got {output!r}. Choose one of them.")
        self.out_channels, self.widths, self.size, self.output = out_channels, tuple(widths), size, output
        self.token_dim: int | None = None

    def build(self, token_dim: int) -> None:
        """Create the layers for tokens of dimension ``token_dim``."""
        self.token_dim = token_dim
        last = max(1, self.widths[-1] // 2)
        self.projection = nn.Conv2d(token_dim, self.widths[0], kernel_size=1)
        self.stages = nn.Sequential(*(_stage(before, after) for before, after in pairwise([*self.widths, last])))
        self.pixels = nn.Sequential(nn.GELU(), nn.Conv2d(last, self.out_channels, kernel_size=3, padding=1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images ``(B, C, H, W)`` of ``(B, T, token_dim)`` tokens; a mask must be True everywhere."""
        check_decoder_tokens(self, tokens, self.token_dim)
        if mask is not None and mask.device.type == "cpu" and not bool(mask.all()):  # elsewhere looking would wait
            raise ValueError(
                "mask must be True everywhere, since ConvDecoder needs a token in every cell; got "
                f"{int((~mask).sum())} places of padding. Use SequenceDecoder for sequences."
            )
        grid = tokens.mT.reshape(tokens.shape[0], -1, *self._grid(tokens.shape[1]))
        images: Tensor = self.pixels(self.stages(self.projection(grid.to(self.projection.weight.dtype))))
        if self.size is not None:
            images = images[..., : self.size[0], : self.size[1]]
        return images.sigmoid() if self.output == "sigmoid" else images

    def _grid(self, num_tokens: int) -> tuple[int, int]:
        """Rows and columns of the tokens."""
        if self.size is None:
            side = math.isqrt(num_tokens)
            if side * side != num_tokens:
                raise ValueError(
                    f"tokens must fill a square grid unless size is given; got T = {num_tokens}. Set size to (H, W) of "
                    "the images, and leave tokens that are no cell of it (CLS) out."
                )
            return side, side
        scale = 2 ** len(self.widths)
        rows, columns = (math.ceil(pixels / scale) for pixels in self.size)
        if rows * columns != num_tokens:
            raise ValueError(
                f"tokens must fill {rows} x {columns} cells for images of size {tuple(self.size)} and "
                f"{len(self.widths)} widths; got T = {num_tokens}. Give the decoder one width for every time that the "
                "encoder halves the image."
            )
        return rows, columns


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """One residual block, then twice the height and width."""
    return nn.Sequential(
        Residual(in_channels), nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1)
    )
