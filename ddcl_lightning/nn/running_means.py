"""Means over batches that are followed while training."""

from typing import ClassVar

import torch
from torch import Tensor

from ddcl_lightning.nn.guarded_state import COUNT, GuardedState, Rules, keep_unless


class RunningMeans(GuardedState):
    """A module whose buffers are means over batches: the first batches count alike, later means are exponential.

    Args:
        momentum: Weight of the newest batch, in (0, 1], once it is larger than that of an even mean.

    Attributes:
        num_batches: Buffer, batches so far, int64.

    Raises:
        ValueError: If the momentum is out of range.
    """

    num_batches: Tensor
    state_rules: ClassVar[Rules] = {"num_batches": COUNT}

    def __init__(self, momentum: float) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1]; got {momentum}. 0.05 averages over about 20 batches.")
        self.momentum = momentum
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def averaged(self, name: str, latest: Tensor) -> Tensor:
        """Mean ``name`` with the ``latest`` batch added; :meth:`take_in` stores it."""
        mean: Tensor = getattr(self, name)
        weight = (1.0 / (self.num_batches + 1)).clamp(min=self.momentum)
        return mean.lerp(latest.to(mean.dtype), weight.to(mean.dtype))

    def take_in(self, usable: Tensor, **buffers: Tensor) -> None:
        """Count a batch and replace buffers by name, where the batch is ``usable``, a boolean on the device."""
        self.num_batches += usable
        for name, value in buffers.items():
            keep_unless(usable, getattr(self, name), value)
