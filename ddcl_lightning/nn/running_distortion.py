"""The quantization error of tokens, followed from batch to batch."""

from typing import ClassVar

import torch
from torch import Tensor

from ddcl_lightning._utils.compat import recomputing
from ddcl_lightning._utils.distributed import sum_over_processes
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.functional._common import require_finite_tokens
from ddcl_lightning.nn.guarded_state import NOT_NEGATIVE, Rules, running_dtype
from ddcl_lightning.nn.running_means import RunningMeans

SMALLEST_SHARE = 1e-6  # of the codes' own mean square, below which a distance in float32 is rounding


class RunningDistortion(RunningMeans):
    """Mean squared distance of every head's tokens from their nearest codes, over the batches and all processes.

    A batch whose distances are not finite on some process, or without a valid token, leaves it as it is.

    Args:
        num_heads: H.
        momentum: Weight of the newest batch, in (0, 1]. The first batches are averaged evenly until it is reached.

    Attributes:
        mean: Buffer ``(H,)``, in units of squared distance; 0 before the first batch.

    Raises:
        ValueError: If the momentum is out of range.
    """

    mean: Tensor
    state_rules: ClassVar[Rules] = {**RunningMeans.state_rules, "mean": NOT_NEGATIVE}

    def __init__(self, num_heads: int, momentum: float = 0.05) -> None:
        super().__init__(momentum)
        self.register_buffer("mean", torch.zeros(num_heads, dtype=running_dtype()))

    @torch.no_grad()
    def forward(self, tokens: Tensor, mask: Tensor | None, prototypes: Tensor) -> None:
        """Add a batch of ``(H, N, d)`` tokens with mask ``(H, N)``."""
        if not recomputing():
            distances = nearest_distances(tokens, prototypes, mask)
            number = distances.new_full((), distances.shape[1]) if mask is None else mask[0].sum()
            self.add(distances.sum(-1), number, prototypes)

    @torch.no_grad()
    def add(self, distortion: Tensor, number: Tensor, prototypes: Tensor) -> None:
        """Add a batch that was measured.

        Args:
            distortion: Sum over the valid tokens of this process, ``(H,)``.
            number: How many those are, a scalar.
            prototypes: ``(H, K, d)``, whose scale limits what can be measured.
        """
        dtype = self.mean.dtype
        total = sum_over_processes(torch.cat([distortion.to(dtype), number.to(dtype).reshape(1)]))
        latest = total[:-1] / total[-1].clamp(min=1.0)
        codes = prototypes.to(dtype)
        floor = SMALLEST_SHARE * (codes - codes.mean(1, keepdim=True)).square().sum(-1).mean(-1)
        mean = self.averaged("mean", torch.maximum(latest, floor))
        self.take_in((total[-1] > 0) & torch.isfinite(mean).all(), mean=mean)

    @torch.no_grad()
    def start(self, tokens: Tensor, prototypes: Tensor) -> None:
        """Restart from a sample ``(H, N, d)``, the same on every process.

        Raises:
            ValueError: If a token is not finite.
        """
        require_finite_tokens(tokens)
        self.mean.copy_(nearest_distances(tokens, prototypes, None).mean(-1))
        self.num_batches.fill_(1)


def nearest_distances(tokens: Tensor, prototypes: Tensor, mask: Tensor | None) -> Tensor:
    """Squared distances ``(H, N)`` of ``(H, N, d)`` tokens from the nearest of ``(H, K, d)``; 0 where masked."""
    z, codes = tokens.to(running_dtype()), prototypes.to(tokens.device, running_dtype())
    index = nearest_prototype(z, codes).unsqueeze(-1).expand(-1, -1, z.shape[-1])
    distance = (z - codes.gather(1, index)).square().sum(-1)
    return distance if mask is None else distance.masked_fill(~mask, 0.0)
