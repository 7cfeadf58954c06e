"""The first tokens of a training run, on which codes start."""

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.reservoir import Reservoir

TOKENS_PER_CODE = 4  # that a start needs at least
MOST_PER_CODE, FEWEST = 16, 4096  # tokens that are kept for it: so many per code, but not fewer than these


class FirstTokens:
    """A sample of the tokens of the first training calls, the same on every process.

    Args:
        num_codes: K, codes that start on them.
    """

    def __init__(self, num_codes: int) -> None:
        self.needed = TOKENS_PER_CODE * num_codes
        self._sample = Reservoir(max(MOST_PER_CODE * num_codes, FEWEST))

    def add(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """All of the sample so far, ``(N, d)`` in float32 or wider on the CPU, after the tokens of another call.

        None where it has none to add.

        Args:
            tokens: ``(*, d)``. A call with one whose squares are not finite adds nothing.
            mask: ``(*)`` boolean, True for valid tokens.
        """
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
        return len(sample) >= self.needed
