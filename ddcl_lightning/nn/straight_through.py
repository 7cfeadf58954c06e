"""Straight-through gradients that an optimizer of the codes can follow."""

from typing import Any

import torch
from torch import Tensor


def straight_through(value: Tensor, carrier: Tensor, anchor: Tensor | None) -> Tensor:
    """Exactly ``value``, with a gradient that goes to ``carrier`` unchanged.

    Args:
        value: What is read, any shape.
        carrier: What gets the gradient, of the same shape.
        anchor: That of the bank's output, by which an optimizer knows of the backward pass.
    """
    return tie(value.detach() + (carrier - carrier.detach()), anchor)


def tie(value: Tensor, anchor: Tensor | None) -> Tensor:
    """The value, whose backward pass reaches the anchor too."""
    if anchor is None:
        return value
    result: Tensor = _Tie.apply(value, anchor)
    return result


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
