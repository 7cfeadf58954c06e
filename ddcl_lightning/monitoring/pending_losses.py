"""Losses of steps until the next reading, kept without waiting for a device."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning.monitoring.argument_checks import require_loss

MAX_LOSSES = 1000  # that wait for a reading


class PendingLosses:
    """Losses of this process since the last reading, the latest thousand.

    Args:
        losses: Those of a saved state.
    """

    def __init__(self, losses: Iterable[Tensor | float] = ()) -> None:
        self._losses = list(losses)

    def add(self, loss: Tensor | float) -> None:
        """Keep a number or a tensor of one; a TypeError or ValueError for anything else."""
        require_loss(loss)
        self._losses = [*self._losses, loss.detach() if isinstance(loss, Tensor) else loss][-MAX_LOSSES:]

    def take(self) -> float | None:
        """The mean over all processes, which is waited for, and forget them; None without any."""
        losses, self._losses = self._losses, []
        rows = [torch.as_tensor(loss).float().reshape(()).cpu() for loss in losses]
        mean = float(torch.stack(rows).mean()) if rows else None
        means = [each for each in gather_objects(mean) if each is not None]
        return sum(means) / len(means) if means else None

    def state(self) -> list[float]:
        """Plain numbers."""
        return [float(loss) for loss in self._losses]
