"""Inverse document frequency of prototypes, and the weights of tokens that follow from it."""

from typing import ClassVar

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import recomputing
from ddcl_lightning._utils.distributed import sum_over_processes
from ddcl_lightning.functional._common import zero_padding
from ddcl_lightning.nn.guarded_state import SHARE, Rules, keep_unless, running_dtype
from ddcl_lightning.nn.running_means import RunningMeans
from ddcl_lightning.nn.settled_state import SettledState

SMALLEST_SHARE = 1e-4  # share of samples below which prototypes are equally rare: ln(1 / share) must stay finite
LEAST = 1e-6  # weight of a token whose prototype is in every sample; where all are, the weights are even


class PrototypeIDF(RunningMeans, SettledState):
    """Weights ``ln(1 / share) ** 2`` of tokens, by the share of samples in which their prototype occurs.

    The logarithm is the inverse document frequency (Sparck Jones 1972); it counts twice, as in the cosine of two
    vectors that are weighted by it. A prototype occurs in a sample as far as the assignments of its tokens sum up to 1.
    The shares are followed from step to step over all processes; before the first batch all tokens weigh the same. A
    batch whose assignments are not finite leaves them as they are.

    Args:
        num_heads: H of the bank whose assignments are read.
        num_prototypes: K.
        momentum: Weight of the newest batch, in (0, 1]. The first batches are averaged evenly until it is reached.

    Attributes:
        share: Buffer ``(H, K)`` in [0, 1], as measured.
        current: Buffer ``(H, K)``, the share that the weights follow: that of the last step. It is not saved.

    Raises:
        ValueError: If the momentum is out of range.
    """

    share: Tensor
    current: Tensor
    state_rules: ClassVar[Rules] = {**RunningMeans.state_rules, "share": SHARE}

    @typed
    def __init__(self, num_heads: int, num_prototypes: int, momentum: float = 0.05) -> None:
        super().__init__(momentum)
        self.register_buffer("share", torch.ones(num_heads, num_prototypes, dtype=running_dtype()))
        self.register_buffer("current", self.share.clone(), persistent=False)

    @torch.no_grad()
    def forward(self, assignments: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights ``(B, T)`` >= 0 of tokens with assignments ``(B, H, T, K)`` and mask ``(B, T)``; 0 for padding."""
        q = assignments.to(self.share.dtype)
        if mask is not None:
            q = zero_padding(q, mask[:, None])
        if self.training and not recomputing():
            samples = q.new_tensor(len(q)) if mask is None else mask.any(-1).sum().to(q.dtype)
            occurrences = q.sum(-2).clamp(max=1.0).sum(0).flatten()
            totals = sum_over_processes(torch.cat([occurrences, samples[None]]))
            usable = torch.isfinite(totals).all() & (totals[-1] > 0)
            first = self.num_batches == 0
            latest = (totals[:-1] / totals[-1].clamp(min=1.0)).view_as(self.share)
            self.take_in(usable, share=self.averaged("share", latest))
            self.measured(first)
        idf = -self.current.clamp(SMALLEST_SHARE, 1.0).log()
        weights = (q * idf[None, :, None, :]).sum(-1).mean(1).square() + LEAST
        return weights if mask is None else weights.masked_fill(~mask, 0.0)

    def take_over(self, where: Tensor | bool = True) -> None:
        """Use the latest measured share for the weights."""
        keep_unless(where, self.current, self.share)

    def begin_from_state(self) -> None:
        """Use the loaded share for the weights."""
        self.current = self.share.clone()
