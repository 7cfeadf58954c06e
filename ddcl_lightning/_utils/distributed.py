"""The few collective operations that the layers and callbacks need; each is the identity in a single process."""

import builtins
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddcl_lightning._utils.files import check_folder

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


def take_the_last(value: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the process whose row comes last, for every row, the same everywhere, without gradient.

    Args:
        value: ``(*, d)``.
        place: ``(*)`` int64, where this process's row comes, different on every process; -1 where it has none.

    Returns:
        ``(*, d)``, zero where no process has the row, and ``(*)`` boolean, whether one has.
    """
    last = max_over_processes(place)
    own = (place == last) & (place >= 0)
    return sum_over_processes(value.detach().masked_fill(~own.unsqueeze(-1), 0.0)), last >= 0


def joint_order(samples: int, tokens: int, call: int, device: torch.device) -> Tensor:
    """Positions of this process's tokens ``(samples * tokens,)`` among those of all, ``int64``, increasing.

    Of several processes each has every P-th sample of the joint batch, as the shipped data modules deal them.

    Args:
        samples: Samples of the call.
        tokens: Tokens per sample.
        call: Number of the call.
        device: Where the order is wanted.
    """
    processes, rank = (world_size(), dist.get_rank()) if world_size() > 1 else (1, 0)
    joint = torch.arange(samples, device=device) * processes + rank
    within = torch.arange(tokens, device=device)
    # 22 bits each: four million samples, and tokens of one.
    return (call << 44) + (joint[:, None] << 22).add(within).flatten()


def batch_weight(size: int, device: torch.device) -> Tensor | float:
    """Factor for a process's mean over its samples, under which the mean over processes is that over all samples.

    1 where all processes have as many. DDP averages gradients over processes, whatever their number of samples.

    Args:
        size: Samples of this process in the step.
        device: Where the factor is wanted.
    """
    if world_size() == 1:
        return 1.0
    total = torch.tensor(float(size), device=device)
    dist.all_reduce(total)
    return size * world_size() / total


def token_weight(mask: Tensor | None) -> Tensor | float:
    """Factor for a process's mean over its valid tokens, under which means weighted by samples weigh tokens alike.

    Beside :func:`batch_weight`, or under plain DDP with equal batches, the mean over processes becomes that over all
    valid tokens, however unevenly padding is spread. 1 without padding.

    Args:
        mask: ``(B, *)`` boolean, True for valid tokens.
    """
    if mask is None or world_size() == 1:
        return 1.0
    local = torch.stack([mask.sum(), torch.full_like(mask.sum(), len(mask))]).to(torch.float64)
    total = local.clone()
    dist.all_reduce(total)
    return local[0] / total[0] * total[1] / local[1]


def mean_over_processes(values: Mapping[str, Tensor | float], weight: float = 1.0) -> dict[str, float]:
    """Means of numbers over the processes that have them, weighted by each process's ``weight``, as plain numbers.

    Waits for the device and for all processes: for readings, not for every step.
    """
    by_process = gather_objects((weight, {name: float(value) for name, value in values.items()}))
    means = {}
    for name in dict.fromkeys(name for _, numbers in by_process for name in numbers):
        holders = [(share, numbers[name]) for share, numbers in by_process if name in numbers]
        means[name] = sum(share * number for share, number in holders) / sum(share for share, _ in holders)
    return means


def gather_rows(rows: Tensor) -> Tensor:
    """Rows ``(N, *)`` of all processes, in rank order, on every process; N may differ. Without gradient."""
    if world_size() == 1:
        return rows
    sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    numbers = [int(size) for size in sizes]
    padded = rows.new_zeros(max(numbers), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(gathered, padded)
    return torch.cat([rows_of_process[:number] for rows_of_process, number in zip(gathered, numbers, strict=True)])


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
    """True on the first process. To do something on it alone, use :func:`report`: a branch can hang."""
    return world_size() == 1 or dist.get_rank() == 0


class CollectiveError(RuntimeError):
    """Error that work of one process alone calls an operation over processes, which would wait for ever."""


class _RefuseCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at every operation of torch.distributed, whoever calls it, before it waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise CollectiveError(
                f"{func} was called in work that each process does on its own, where the others may not call it: the "
                "run would wait for ever. Reduce over the processes first, and report afterwards."
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def no_collectives() -> Iterator[None]:
    """Context manager in which an operation over processes is a :class:`CollectiveError` and not a deadlock."""
    if world_size() == 1:
        yield
        return
    with _RefuseCollectives():  # type: ignore[no-untyped-call]
        yield


def end_together() -> None:
    """Wait until every process of the run has come here; an error where one of them ends without that.

    For the end of a command: a process that fails when the work is done (in a ``teardown``, say) would otherwise leave
    the others behind with success. :func:`is_lost_process` knows the error.
    """
    if world_size() > 1:
        dist.barrier()


# What the back ends of torch.distributed say when nobody is at the other end any more.
_LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited|NCCL.*(abort|remote)")


def is_lost_process(error: BaseException) -> bool:
    """True if an error says that another process of the run has ended."""
    return isinstance(error, RuntimeError) and bool(_LOST_PROCESS.search(str(error)))


class _Failure(NamedTuple):
    """Description of an error for the other processes, since exceptions need not survive pickling."""

    rank: int
    kind: str
    message: str

    def error(self) -> Exception:
        """An error of the same kind, or a RuntimeError where that cannot be made from a sentence."""
        kind = getattr(builtins, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(self.message)
            except TypeError:
                pass
        return RuntimeError(f"process {self.rank}: {self.kind}: {self.message}")


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        with no_collectives():
            return work(), None
    except Exception as error:
        return None, error


def on_every_process(work: Callable[[], Result]) -> Result:
    """Result of work on every process; where it fails on one of them, the error is raised on all.

    Args:
        work: Must not contain operations over processes; they are refused.
    """
    result, error = _attempt(work)
    rank = dist.get_rank() if world_size() > 1 else 0
    failures = gather_objects(None if error is None else _Failure(rank, type(error).__name__, str(error)))
    if error is not None:
        raise error
    first = next((failure for failure in failures if failure is not None), None)
    if first is not None:
        raise first.error()
    return cast(Result, result)


def from_first_process(compute: Callable[[], Result], failure: str) -> Result:
    """Result of the first process, on every process.

    An error there is one everywhere, or the others would wait for ever; a ValueError's message starts with ``failure``.
    """
    result: Result | None = None
    error: Exception | None = None
    if is_first_process():
        result, error = _attempt(compute)
        if isinstance(error, ValueError):
            error = ValueError(f"{failure}: {error}")
    problem = None if error is None else _Failure(0, type(error).__name__, str(error))
    shared, failed = broadcast_object((result, problem))
    if error is not None:
        raise error
    if failed is not None:
        raise failed.error()
    return cast(Result, shared)


def require_places(folders: Mapping[str, str | Path]) -> None:
    """Raise on every process unless the first one can write files into all of some folders; it leaves nothing there.

    Args:
        folders: By the argument that gave each; addresses are left alone.

    Raises:
        ValueError: Naming the argument.
    """

    def check() -> str | None:
        try:
            for argument, folder in folders.items():
                if "://" not in str(folder):
                    check_folder(folder, argument)
        except ValueError as error:
            return str(error)
        return None

    sentence = from_first_process(check, "the folders cannot be checked") if folders else None
    if sentence is not None:
        raise ValueError(sentence)


def report(work: Callable[[], Result], name: str, what: str = "its output") -> Result | None:
    """The result of work that the first process does alone; None on the others, and where it fails.

    For what a person reads (tables, figures): an error is a warning there, since it must not cost the run. Operations
    over processes are refused, so evaluate on all processes and reduce before.

    Args:
        work: What to do.
        name: Who reports, for the warning.
        what: That it reports, likewise.
    """
    if not is_first_process():
        return None
    result, error = _attempt(work)
    if error is not None:
        rank_zero_warn(skipped(name, what, error))
    return result


def skipped(name: str, what: str, error: Exception) -> str:
    """Sentence about a report that failed."""
    return f"{name} skipped {what} because of an error; training is not affected. {type(error).__name__}: {error}"


def warn(message: str) -> None:
    """Warn the user, from the first process."""
    rank_zero_warn(message)


def inform(message: str) -> None:
    """Tell the user something, once, from the first process."""
    rank_zero_info(message)
