"""When codes start, on which tokens, and when they have to start anew."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.nn.guarded_state import COUNT, NOT_NEGATIVE, GuardedState, Rules, running_dtype

TOKENS_PER_CODE = 4  # that a start needs at least
MOST_PER_CODE, FEWEST = 16, 4096  # tokens that are kept for it: so many per code, but not fewer than these
BEHIND = 3.0  # times the error of the start, or half of the way from it to the error of one code for all
SAMPLE = "first_tokens"  # in states that were saved before the codes had started


class CodeStart(GuardedState):
    """The first tokens of a training run, on which codes start, and a look at the codes after 1, 2, 4, 8, ... steps.

    The outputs of a new encoder move by many times their spread in its first steps, faster than codes follow. Codes
    whose error, relative to the variance of the tokens, has grown to more than three times that of their start, or half
    of the way from there to 1, have fallen behind: they start again. Tokens are a sample of those of the latest calls,
    the same on every process.

    Args:
        num_codes: K, codes that start on them.
        width: Dimension of the tokens.

    Attributes:
        limit: Buffer ``()``, relative error from which on codes have fallen behind; 0 before they have started.
        steps: Buffer ``()``, steps that have moved the codes since then.
    """

    limit: Tensor
    steps: Tensor
    _sample: Reservoir | None
    state_rules: ClassVar[Rules] = {"limit": NOT_NEGATIVE, "steps": COUNT}

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.num_codes, self.width = num_codes, width
        self.register_buffer("limit", torch.zeros((), dtype=running_dtype()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.begin_anew()
        self._number: int | None = 0  # the steps, without a wait for the device; None to look at the buffer
        self._looked = 0  # at so many steps

    @property
    def is_collecting(self) -> bool:
        """True while tokens are collected for a start."""
        return self._sample is not None

    @property
    def has_started(self) -> bool:
        """True if codes have started on a sample once, not elsewhere."""
        return bool(self.limit > 0)

    def is_due(self) -> bool:
        """True in the first call after 1, 2, 4, 8, ... steps since a start."""
        number, looked = self._count(), self._looked
        self._looked = number
        return number != looked and number & (number - 1) == 0

    def begin_anew(self) -> None:
        """Collect tokens from here on."""
        self._sample = Reservoir(max(MOST_PER_CODE * self.num_codes, FEWEST))

    def end(self) -> None:
        """Collect no more tokens."""
        self._sample = None

    @torch.no_grad()
    def started(self, error: Tensor, number: int) -> None:
        """Note the relative error ``()`` of codes on the ``number`` tokens on which they have started."""
        self.end()
        # Codes lie closer to the tokens that they were made from than to others.
        codes = min(self.num_codes, number / 2)
        expected = error * (number + codes) / (number - codes)
        self.limit.copy_(torch.minimum(BEHIND * expected, (1 + expected) / 2))
        self.steps.zero_()
        self._number, self._looked = 0, 0

    def add(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """All of the sample so far, ``(N, d)`` in float32 or wider on the CPU, after the tokens of another call.

        None where it has none to add.

        Args:
            tokens: ``(*, d)``. A call with one whose squares are not finite adds nothing.
            mask: ``(*)`` boolean, True for valid tokens.
        """
        assert self._sample is not None
        rows = tokens.detach().flatten(0, -2)
        rows = rows if mask is None else rows[mask.flatten()]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        calls = gather_objects((len(rows), bool(torch.isfinite(rows.square().sum(-1)).all())))
        if not all(finite for _, finite in calls) or not any(number for number, _ in calls):
            return None
        self._sample.add(rows)
        return self._sample.gather()

    def enough(self, sample: Tensor) -> bool:
        """True if a start on the sample is the last one."""
        return len(sample) >= TOKENS_PER_CODE * self.num_codes

    def step(self) -> None:
        """Count a step of the codes."""
        self._number = self._count() + 1
        self.steps += 1

    def _count(self) -> int:
        if self._number is None:  # a state was loaded
            self._number, self._looked = int(self.steps), 0
        return self._number

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rows = None if self._sample is None else self._sample.rows
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
            self.begin_anew()
            if rows is not None and self._sample is not None:
                self._sample.add(rows)
            elif float(state_dict.get(f"{prefix}limit", 0.0)) > 0:
                self.end()
        super()._load_from_state_dict(state_dict, prefix, *args)
