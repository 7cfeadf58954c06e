"""Bounded samples of rows: a uniform one from a stream, equal on every process, and an evenly spaced one."""

import numpy as np
import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import gather_objects, world_size
from ddcl_lightning._utils.seeding import check_seed


class Reservoir:
    """Uniform sample of at most ``capacity`` rows of a stream (Vitter's algorithm R).

    Args:
        capacity: Rows to keep, over all processes.
        seed: Seed of the sample, in [0, 2**32).

    Raises:
        ValueError: If the capacity is below 1, or the seed is not in [0, 2**32).
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 row; got {capacity}. Pass 1 or more.")
        check_seed("seed", seed)
        self.capacity = max(1, capacity // world_size())
        self.num_rows = 0
        self._rows: Tensor | None = None
        self._generator = np.random.default_rng(seed)

    def add(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Feed rows ``(N, *)``, or with a mask ``(...)`` those of ``(..., *)`` for which it is True."""
        rows = (rows if mask is None else rows[mask]).detach().cpu()
        if self._rows is None:
            self._rows = rows.new_empty((0, *rows.shape[1:]))
        room = self.capacity - len(self._rows)
        head, tail = rows[:room], rows[room:]
        self._rows = torch.cat([self._rows, head]) if len(head) else self._rows
        self.num_rows += len(head)
        if len(tail):
            # Row number i (from 0) of the stream replaces a kept one with probability capacity / (i + 1).
            slots = self._generator.integers(0, self.num_rows + 1 + np.arange(len(tail)))
            kept = slots < self.capacity
            # Later rows win where two draw the same slot; a dictionary keeps the last, indexing need not.
            winners = dict(zip(slots[kept].tolist(), np.flatnonzero(kept).tolist(), strict=True))
            if winners:
                self._rows[list(winners)] = tail[list(winners.values())]
            self.num_rows += len(tail)

    @property
    def rows(self) -> Tensor | None:
        """The rows of this process, ``(N, *)``; None before the first."""
        return self._rows

    def gather(self) -> Tensor:
        """The sample of all processes, ``(M, *)``, in an order that does not depend on who saw which row.

        Raises:
            ValueError: If nothing was fed on any process.
        """
        samples = [sample for sample in gather_objects(self._rows) if sample is not None and len(sample)]
        if not samples:
            raise ValueError(
                "the data loader gave no valid token. Check that the data set is not empty, that drop_last does not "
                "discard its only batch, and that the mask is True for valid tokens."
            )
        rows = torch.cat(samples)
        # Ordered along one fixed direction: unlike an order of bytes or of the first column it hardly depends on
        # rounding (a scale summed over processes rounds differently) nor on ties (pixels that are always zero).
        flat = rows.reshape(len(rows), -1).to(torch.float64)
        direction = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return rows[(flat @ direction).argsort(stable=True)]


def evenly_spaced(rows: Tensor, limit: int) -> Tensor:
    """At most ``limit`` rows of a tensor ``(N, *)``, evenly spaced, the first and the last among them."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), limit)).long()]
