"""The few collective operations that the layers and callbacks need; each is the identity in a single process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def world_size() -> int:
    """Number of processes that train together, 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes whose backward sums the gradients over processes, as the chain rule asks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def sum_over_processes(value: Tensor) -> Tensor:
    """Differentiable sum of ``value`` over processes, same shape."""
    if world_size() == 1:
        return value
    reduced: Tensor = _AllReduceSum.apply(value)
    return reduced


def max_over_processes(value: Tensor) -> Tensor:
    """Element-wise maximum over processes, without gradient, same shape."""
    if world_size() > 1:
        value = value.detach().clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def log_sum_over_processes(value: Tensor) -> Tensor:
    """``ln sum exp`` of ``value`` over processes, without gradient, same shape; finite where the sum underflows."""
    if world_size() == 1:
        return value
    largest = max_over_processes(value)
    return largest + sum_over_processes((value - largest).exp()).log()


def take_from_one_process(value: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
    """For every row that of one process which has it, the same everywhere, without gradient.

    Args:
        value: ``(*, d)``.
        available: ``(*)`` boolean, whether this process has the row.

    Returns:
        ``(*, d)``, zero where no process has the row, and ``(*)`` boolean, whether one has.
    """
    value = value.masked_fill(~available.unsqueeze(-1), 0.0)
    if world_size() == 1:
        return value, available
    number = dist.get_rank() + 1
    owner = max_over_processes(available.long() * number)
    mine = available & (owner == number)
    return sum_over_processes(value.detach().masked_fill(~mine.unsqueeze(-1), 0.0)), owner > 0


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """The value of the first process, on every process."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def is_first_process() -> bool:
    """Whether this process is the one that computes on behalf of all."""
    return world_size() == 1 or dist.get_rank() == 0


def from_first_process(compute: Callable[[], Result], failure: str) -> Result:
    """What the first process computes, on every process.

    A ValueError there is one everywhere, or the others would wait for ever; its message starts with ``failure``.
    """
    result: Result | ValueError | None = None
    if is_first_process():
        try:
            result = compute()
        except ValueError as error:
            result = ValueError(f"{failure}: {error}")
    shared: Result | ValueError = broadcast_object(result)
    if isinstance(shared, ValueError):
        raise shared
    return shared
