"""A signal of collapse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddcl_lightning import BankRecord, Signal, typed


class LargestShare(Signal):
    """Share of the tokens that go to the most used code, and a warning where that is nearly all of them."""

    name = "largest_share"

    @typed
    def __init__(self, limit: float = 0.9) -> None:
        self.limit = limit

    def read(self, record: BankRecord) -> Tensor:
        codes = torch.cdist(record.valid_tokens(), record.codebook).argmin(-1)
        return torch.stack([head.bincount().max() / len(head) for head in codes])

    def sign(self, value: float, earlier: Sequence[float]) -> str | None:
        return f"one code has {value:.0%} of the tokens. Use fewer codes." if value > self.limit else None
