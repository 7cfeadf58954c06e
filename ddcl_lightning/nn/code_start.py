"""When codes start, on which tokens, and when they have to start anew."""

import copy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ddcl_lightning._utils.compat import recomputing
from ddcl_lightning._utils.distributed import gather_objects, sum_over_processes
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.nn.guarded_state import COUNT, NOT_NEGATIVE, GuardedState, Rules, running_dtype
from ddcl_lightning.nn.joint_moments import over_processes, unbiased
from ddcl_lightning.nn.step_statistics import StepCalls

TOKENS_PER_CODE = 4  # that a start needs at least
MOST_PER_CODE, FEWEST = 16, 4096  # tokens that are kept for it: so many per code, but not fewer than these
BEHIND = 3.0  # times the error of the start, or half of the way from it to the error of one code for all
SAMPLE = "first_tokens"  # in states that were saved before the codes had started


class _Call(NamedTuple):
    """A call that no step has counted yet."""

    number: int | None  # None where no step can count it
    rows: Tensor
    total: int  # rows of all processes


class CodeStart(GuardedState):
    """The first tokens of a training run, on which codes start, and a look at the codes after 1, 2, 4, 8, ... steps.

    Codes that have none start within a call, on its tokens and those of the steps before; the step confirms that. Where
    it counts other calls, because that one was skipped, codes start on their tokens instead.

    The outputs of a new encoder move by many times their spread in its first steps, faster than codes follow. Codes
    whose error on the tokens of a step, relative to their variance, has grown to more than three times that of their
    start, or half of the way from there to 1, have fallen behind: they start again, on those tokens.

    Args:
        num_codes: K, codes that start on them.
        width: Dimension of the tokens.

    Attributes:
        limit: Buffer ``()``, relative error from which on codes have fallen behind; 0 before they have started.
        steps: Buffer ``()``, steps that have moved the codes since then.
    """

    limit: Tensor
    steps: Tensor
    _sample: Reservoir | None  # of the tokens that steps have counted; None where no start is to come
    _calls: list[_Call]
    _unfounded: bool  # the tokens on which codes have started belong to no step
    _again: bool  # codes stay until there are enough tokens
    _basis: list[Tensor] | None  # tokens on which codes have started since the last step
    state_rules: ClassVar[Rules] = {"limit": NOT_NEGATIVE, "steps": COUNT}

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.num_codes, self.width = num_codes, width
        self.register_buffer("limit", torch.zeros((), dtype=running_dtype()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._resets, self._started_after = 0, -1
        self._begin(again=False)
        self._number: int | None = 0  # the steps, without a wait for the device; None to look at the buffer

    @property
    def is_collecting(self) -> bool:
        """True while tokens are collected for a start."""
        return self._sample is not None

    @property
    def has_started(self) -> bool:
        """True if codes have started on enough tokens once, not elsewhere."""
        return bool(self.limit > 0)

    def is_due(self) -> bool:
        """True for the step after 1, 2, 4, 8, ... steps since a start."""
        number = self._count()
        return number > 0 and number & (number - 1) == 0 and not self.is_collecting

    def end(self) -> None:
        """Collect no more tokens."""
        self._sample = None

    @torch.no_grad()
    def add(self, tokens: Tensor, mask: Tensor | None, number: int | None, resets: int) -> bool:
        """Note the tokens of a training call; False where it has none.

        Args:
            tokens: ``(*, d)``. A call with one whose squares are not finite adds nothing.
            mask: ``(*)`` boolean, True for valid tokens.
            number: Of the call, as in the calls of a step; None for one that no step counts.
            resets: How often gradients of calls were set to None so far.
        """
        if resets != self._resets:
            self._resets, self._calls = resets, []
            self._unfounded |= self._basis is not None
            self._basis = None
        rows = tokens.detach().flatten(0, -2)
        rows = rows if mask is None else rows[mask.flatten()]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        processes = gather_objects((len(rows), bool(torch.isfinite(rows.square().sum(-1)).all())))
        if not all(finite for _, finite in processes) or not any(size for size, _ in processes):
            return False
        if number is not None and any(call.number is None for call in self._calls):
            self._calls = [call for call in self._calls if call.number is not None]
            # Codes that have started on a call without gradients may start anew, unless this is that call again.
            self._unfounded |= self._basis is not None and not recomputing()
        if sum(call.total for call in self._calls) < self._capacity():
            self._calls.append(_Call(number, rows, sum(size for size, _ in processes)))
        return True

    def may_start(self, steps: int) -> bool:
        """True if codes may start within a call: once between two steps, whose calls see the same codes.

        Args:
            steps: Steps so far.
        """
        if not self.is_collecting:
            return False
        return self._unfounded or (steps != self._started_after and not self.has_started)

    def sample(self) -> Tensor:
        """Tokens to start on, ``(N, d)`` in float32 or wider on the CPU, the same on every process."""
        return self._joint().gather()

    def enough(self, sample: Tensor) -> bool:
        """True if a start on the sample is the last one."""
        return len(sample) >= TOKENS_PER_CODE * self.num_codes

    @torch.no_grad()
    def started(self, error: Tensor | None, number: int, steps: int) -> None:
        """Note a start on ``number`` tokens, with the relative error ``()`` of the codes on them if they were enough.

        Args:
            error: None after a start on too few.
            number: N.
            steps: Steps so far.
        """
        self._started_after, self._basis = steps, [call.rows for call in self._calls]
        self._unfounded = self._again = False
        self.limit.zero_()
        if error is not None:
            # Codes lie closer to the tokens that they were made from than to others.
            codes = min(self.num_codes, number / 2)
            expected = error * (number + codes) / (number - codes)
            self.limit.copy_(torch.minimum(BEHIND * expected, (1 + expected) / 2))
        self.steps.zero_()
        self._number = 0

    @torch.no_grad()
    def count(self, calls: StepCalls) -> bool:
        """Count a step of the codes; True if they are to start on the sample now."""
        rows = [call.rows for call in self._calls if call.number in calls.numbers]
        basis, self._basis, self._calls = self._basis, None, []
        if self.is_due() and self.has_started and self._have_been_left(calls):
            self._begin(again=True)
        self._number = self._count() + 1
        self.steps += 1
        if self._sample is None:
            return False
        for of_call in rows:
            self._sample.add(of_call)
        if basis is not None:
            self._unfounded |= any(gather_objects(not _all_in(basis, rows)))
        if self._unfounded:
            return self._sample.rows is not None
        if self._again:
            return self._sample.rows is not None and self.enough(self.sample())
        if self.has_started:
            self.end()
        return False

    def _begin(self, *, again: bool) -> None:
        """Collect tokens from here on."""
        self._sample = Reservoir(self._capacity())
        self._calls, self._basis = [], None
        self._unfounded, self._again = False, again

    def _joint(self) -> Reservoir:
        """The sample with the tokens of the calls that no step has counted yet."""
        joint = copy.deepcopy(self._sample)
        assert joint is not None
        for call in self._calls:
            joint.add(call.rows)
        return joint

    def _capacity(self) -> int:
        return max(MOST_PER_CODE * self.num_codes, FEWEST)

    def _have_been_left(self, calls: StepCalls) -> bool:
        """True if the tokens of a step are far from the codes."""
        cells, moments = calls.statistics.cells, calls.statistics.moments
        if cells is None or moments is None:
            return False
        number, _, scatter = over_processes(moments)
        distortion = sum_over_processes(cells.distortion.sum())
        spread = scatter.diagonal(dim1=-2, dim2=-1).sum()
        return bool(number[0] > 1) and bool(unbiased(distortion / spread, number[0]) > self.limit)

    def _count(self) -> int:
        if self._number is None:  # a state was loaded
            self._number = int(self.steps)
        return self._number

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": [], "_basis": None, "_resets": 0}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._sample is None or (self.has_started and not self._again):
            return
        rows = self._joint().rows
        if rows is None and self._again:
            rows = self.limit.new_empty(0, self.width)
        if rows is not None:
            destination[f"{prefix}{SAMPLE}"] = rows

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rows = state_dict.pop(f"{prefix}{SAMPLE}", None)
        self._number = None
        if rows is not None and (rows.dim() != 2 or rows.shape[1] != self.width):
            args[-1].append(f"{prefix}{SAMPLE} must have shape (N, {self.width}); got {tuple(rows.shape)}.")
        elif rows is not None and not bool(torch.isfinite(rows).all()):
            args[-1].append(
                f"{prefix}{SAMPLE} must be finite; got NaN or infinity. The state is damaged: load another."
            )
        else:
            started = float(state_dict.get(f"{prefix}limit", 0.0)) > 0
            self._begin(again=started)
            if rows is not None and len(rows) and self._sample is not None:
                self._sample.add(rows)
            elif rows is None and started:
                self.end()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _all_in(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(any(torch.equal(rows, other) for other in others) for rows in some)
