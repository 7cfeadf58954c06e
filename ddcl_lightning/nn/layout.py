"""Where the channels of tokens are: any rank, channels first or last."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ddcl_lightning.functional._common import check_mask, require_floating, zero_padding

Channels = Literal["first", "last"]


class ChannelLayout:
    """The dimension of the channels in inputs of every rank.

    Two dimensions are ``(N, D)``. Of more, ``"last"`` is ``(B, ..., D)`` and ``"first"`` is ``(B, D, ...)``. If neither
    is said, the one of the two that has size D is meant, and it stays the one for inputs of that rank, whatever their
    length. Where both have it, at the first input of a rank, there is no answer, and an error asks.

    Args:
        dim: D.
        channels: ``"first"``, ``"last"`` or None.

    Raises:
        ValueError: If ``channels`` is something else.
    """

    def __init__(self, dim: int, channels: Channels | None) -> None:
        if channels is not None and channels not in get_args(Channels):
            raise ValueError(
                f"channels must be one of {get_args(Channels)}, or None; got {channels!r}. Leave it out where one "
                "dimension alone has size dim."
            )
        self.dim, self.channels = dim, channels
        self._known: dict[int, Channels] = {}

    def tokens(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """``z`` with its channels last, ``(*, D)``, zero at padding.

        Args:
            z: Floating point, of two or more dimensions.
            mask: ``(*)`` boolean, True for valid tokens: the shape of ``z`` without its channels.

        Raises:
            ValueError: If a shape does not fit, or the dimension of the channels is not clear.
            TypeError: If ``z`` is no floating-point tensor, or the mask is not boolean.
        """
        require_floating(z, "z")
        tokens = z.movedim(1, -1) if self._place(z) == "first" else z
        check_mask(tokens, mask, "z without its channels")
        return zero_padding(tokens, mask)  # a NaN left in the padding would reach the gradients

    def assume(self, rank: int, place: Channels) -> None:
        """Take inputs of so many dimensions to have their channels there, unless it was said otherwise."""
        self._known.setdefault(rank, place)

    def forget(self, rank: int) -> None:
        """Infer the place of the channels anew from the next input of so many dimensions."""
        self._known.pop(rank, None)

    def restore(self, tokens: Tensor) -> Tensor:
        """Tokens ``(*, D)`` with their channels where those of inputs of that rank are.

        Where no such input was seen, three dimensions have them last and more have them first.
        """
        rank = tokens.dim()
        default: Channels = "first" if rank > 3 else "last"
        place = "last" if rank == 2 else self.channels or self._known.get(rank, default)
        return tokens.movedim(-1, 1) if place == "first" else tokens

    def _place(self, z: Tensor) -> Channels:
        if not isinstance(z, Tensor) or z.dim() < 2 or not z.is_floating_point():
            given = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"z must be a floating-point tensor of two or more dimensions; got {given}. Add "
                "the missing ones with unsqueeze."
            )
        rank = z.dim()
        place: Channels | None = "last" if rank == 2 else self.channels or self._known.get(rank)
        if place is None:
            place = self._known[rank] = self._infer(z)
        if z.shape[1 if place == "first" else -1] != self.dim:
            raise ValueError(
                f"z must have its channels, dim = {self.dim}, {'in dimension 1' if place == 'first' else 'last'}; got "
                f"shape {tuple(z.shape)}. Build the quantizer for their number, or set its channels to 'first' or "
                "'last'."
            )
        return place

    def _infer(self, z: Tensor) -> Channels:
        preferred: Channels = "first" if z.dim() > 3 else "last"
        other: Channels = "last" if z.dim() > 3 else "first"
        fits = z.shape[1 if preferred == "first" else -1] == self.dim
        if torch.compiler.is_compiling():  # the other dimension may be one of any size
            return preferred if fits else other
        fits_other = z.shape[1 if other == "first" else -1] == self.dim
        if fits and fits_other:
            raise ValueError(
                f"z of shape {tuple(z.shape)} has dim = {self.dim} in dimension 1 and in the last: say which one holds "
                "the channels by channels='first' or channels='last' of the quantizer."
            )
        if not fits and not fits_other:
            raise ValueError(
                f"z must have its channels, dim = {self.dim}, in dimension 1 or last; got shape {tuple(z.shape)}. "
                "Build the quantizer for their number."
            )
        return preferred if fits else other
