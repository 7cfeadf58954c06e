"""The pull of tokens to their codes, of a size that follows the gradient of the decoder."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import sum_over_processes, world_size
from ddcl_lightning.nn.guarded_state import NOT_NEGATIVE, Rules, keep_unless, running_dtype
from ddcl_lightning.nn.joint_moments import joint_spread
from ddcl_lightning.nn.settled_state import SettledState
from ddcl_lightning.nn.straight_through import straight_through, tie

MOST = 0.7  # of the decoder's gradient: a pull as large as that would stop the encoder, a larger one shrink its tokens
RISE = 1e-3  # EMA rate of a weight that rises


class Commitment(SettledState):
    """Straight-through gradients, with a pull of every token to its code added.

    With the decoder's gradient g, tokens get ``g + w (z - e)`` for tokens z and codes e: the gradient of a commitment
    loss, which grows with the distance and so holds tokens at a distance of about ``|g| / w``. Its weight is

        w = ratio * (sum |g|^2 / sum |z - mean z|^2) ^ (1 / 2)

    so the whole pull is ``ratio`` times the square root of the codes' relative error, times the gradient, whatever the
    scale of tokens and loss. It follows the gradient down at once, and up only slowly, so that a decoder which needs
    less leaves a weight that holds the tokens' scale. Sums are over all valid tokens of all processes, whose mean loss
    g is the gradient of. The pull of a call is at most 0.7 of its gradient, so no encoder is shrunk by it.

    What a call measures counts from the next step of an optimizer on. A call whose gradient is not finite, or was set
    to None before the step, adds nothing.

    Args:
        ratio: Strength >= 0.
        resets: Tells how often gradients of calls were set to None; by default nobody looks.

    Attributes:
        weight: Buffer ``()``, w as of the last step; 0 before the first.

    Raises:
        ValueError: If the ratio is out of range.
    """

    weight: Tensor
    state_rules: ClassVar[Rules] = {"weight": NOT_NEGATIVE}

    def __init__(self, ratio: float, resets: Callable[[], int] | None = None) -> None:
        super().__init__()
        check_ratio(ratio)
        self.ratio = ratio
        self.register_buffer("weight", torch.zeros((), dtype=running_dtype()))
        self._sums: Tensor | None = None  # squares of gradients and tokens since the last step, of all processes
        self._resets, self._resets_before = resets, 0

    def forward(
        self,
        value: Tensor,
        carrier: Tensor,
        anchor: Tensor | None,
        mask: Tensor | None,
        spread: Tensor | None = None,
    ) -> Tensor:
        """Exactly ``value``, whose gradient goes to ``carrier`` with the pull.

        Args:
            value: Codes ``(*, d)``.
            carrier: Tokens, of the same shape.
            anchor: See :func:`~ddcl_lightning.nn.straight_through.straight_through`.
            mask: ``(*)`` boolean, True for valid tokens; others have no pull.
            spread: :func:`~ddcl_lightning.nn.joint_moments.joint_spread` of the tokens, where it is known already.
        """
        if not (self.training and carrier.requires_grad and torch.is_grad_enabled()):
            return straight_through(value, carrier, anchor)
        with torch.no_grad():
            if spread is None:
                spread = joint_spread(carrier.flatten(0, -2), None if mask is None else mask.flatten())
            gap = carrier - value
            if mask is not None:
                gap = gap.masked_fill(~mask.unsqueeze(-1), 0.0)
        return tie(_Pull.apply(carrier, value.detach().to(carrier.dtype), gap, spread, self), anchor)

    @torch.no_grad()
    def added_gradient(self, gradient: Tensor, gap: Tensor, spread: Tensor) -> Tensor:
        """The pull of a call on its tokens, which is measured for later ones."""
        dtype, processes = self.weight.dtype, world_size()
        # Each process sees the gradient of its own loss, of which the mean over processes is what trains.
        local = [(gradient.to(dtype) / processes).square().sum(), gap.to(dtype).square().sum()]
        squares = sum_over_processes(torch.stack(local))
        latest = torch.cat([squares[:1], spread.to(dtype).reshape(1)])
        usable = torch.where(torch.isfinite(latest).all(), latest, 0.0)
        self._drop_reset()
        self._sums = usable if self._sums is None else self._sums + usable
        self._measured = True
        target = self._target(latest)
        weight = torch.where(self.weight > 0, torch.minimum(self.weight, target), target)
        most = MOST * (squares[0] / squares[1]).sqrt()
        weight = torch.minimum(weight, torch.where(squares[1] > 0, most, 0.0))
        usable_weight = torch.where(torch.isfinite(weight), weight, 0.0) * processes
        return (usable_weight * gap.to(dtype)).to(gradient.dtype)

    @torch.no_grad()
    def take_over(self, where: Tensor | bool = True) -> None:
        """Set the weight to what was measured."""
        self._drop_reset()
        if self._sums is None:
            return
        target = self._target(self._sums.to(self.weight))
        slowly = torch.where((self.weight > 0) & (target > self.weight), RISE, 1.0)
        keep_unless(torch.isfinite(target) & (target > 0) & where, self.weight, self.weight.lerp(target, slowly))
        self._sums = None

    def begin_from_state(self) -> None:
        """Drop what was measured before the state was loaded."""
        self._sums = None

    def _drop_reset(self) -> None:
        """Drop what was measured of gradients that were set to None since."""
        resets = 0 if self._resets is None else self._resets()
        if resets != self._resets_before:
            self._sums, self._resets_before = None, resets

    def extra_repr(self) -> str:
        """The ratio, for ``print``."""
        return f"ratio={self.ratio}"

    def _target(self, sums: Tensor) -> Tensor:
        return self.ratio * (sums[0] / sums[1]).sqrt()


class _Pull(torch.autograd.Function):
    """The value, whose gradient goes to the carrier with a pull."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, value: Tensor, gap: Tensor, spread: Tensor, commitment: Commitment
    ) -> Tensor:
        ctx.save_for_backward(gap, spread)
        ctx.commitment = commitment
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gradient + ctx.commitment.added_gradient(gradient, *ctx.saved_tensors), None, None, None, None


def check_ratio(ratio: float) -> None:
    """Raise a ValueError if the strength of a commitment is out of range."""
    if not 0 <= ratio < float("inf"):
        raise ValueError(f"commitment_ratio must be finite and >= 0; got {ratio}. Set 0 for none.")
