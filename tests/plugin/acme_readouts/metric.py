"""A metric."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WithinOne(Metric):
    """Share of the predictions that are off by less than one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("hits", "total"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.hits += ((prediction - target).abs() < 1).sum()
        self.total += target.numel()

    def compute(self) -> Tensor:
        return self.hits / self.total
