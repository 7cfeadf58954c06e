"""Straight-through gradients that an optimizer of the codes can follow."""

from typing import Any

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import sum_over_processes


def straight_through(
    value: Tensor,
    carrier: Tensor,
    anchor: Tensor | None,
    *,
    commitment_ratio: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Exactly ``value``, with a gradient that goes to ``carrier`` unchanged, or with a commitment added.

    With the gradient g of the value, the carrier gets ``g + r ||g|| / ||z - e|| (z - e)`` for the ratio r, tokens z and
    values e: the pull of a commitment loss, of r times the size of the decoder's gradient whatever the scale of
    tokens and loss. Norms are over all tokens of all processes.

    Args:
        value: What is read, any shape ``(*, d)``.
        carrier: What gets the gradient, of the same shape.
        anchor: That of the bank's output, by which an optimizer knows of the backward pass.
        commitment_ratio: r >= 0.
        mask: ``(*)`` boolean, True for valid tokens; others have no commitment.
    """
    if commitment_ratio and carrier.requires_grad and torch.is_grad_enabled():
        gap = (carrier - value).detach()
        if mask is not None:
            gap = gap.masked_fill(~mask.unsqueeze(-1), 0.0)
        result: Tensor = _Committed.apply(carrier, value.detach().to(carrier.dtype), gap, commitment_ratio)
    else:
        result = value.detach() + (carrier - carrier.detach())
    if anchor is not None:
        result = _Tie.apply(result, anchor)
    return result


class _Committed(torch.autograd.Function):
    """The value, whose gradient goes to the carrier with a commitment of a size relative to it."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor, gap: Tensor, ratio: float) -> Tensor:
        ctx.save_for_backward(gap)
        ctx.ratio = ratio
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (gap,) = ctx.saved_tensors
        dtype = torch.promote_types(gap.dtype, torch.float32)
        norms = torch.stack([torch.linalg.vector_norm(value.to(dtype)) for value in (gradient, gap)])
        of_gradient, of_gap = sum_over_processes(norms.square()).sqrt()
        weight = torch.where(of_gap > 0, ctx.ratio * of_gradient / of_gap, 0.0)
        return gradient + (weight * gap).to(gradient.dtype), None, None, None


class _Anchor(torch.autograd.Function):
    """A zero that depends on prototypes and gives them a gradient of zero: one that ``zero_grad`` can take away."""

    @staticmethod
    def forward(ctx: Any, prototypes: Tensor) -> Tensor:
        ctx.shape = prototypes.shape
        return prototypes.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_zeros(ctx.shape)


class _Tie(torch.autograd.Function):
    """The value, whose backward pass reaches the anchor too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.dtype = anchor.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros((), dtype=ctx.dtype)


def anchor_of(prototypes: Tensor) -> Tensor:
    """Zero that depends on prototypes, for :func:`straight_through`; gives them a gradient that can be taken away."""
    result: Tensor = _Anchor.apply(prototypes)
    return result
