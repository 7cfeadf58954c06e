"""The covariance of tokens, followed from batch to batch, and its largest eigenvalue."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import recomputing
from ddcl_lightning.functional import Moments, moments_of
from ddcl_lightning.functional._common import require_finite_tokens
from ddcl_lightning.nn.guarded_state import COVARIANCE, DIRECTION, NOT_NEGATIVE, Rules, running_dtype
from ddcl_lightning.nn.joint_moments import over_processes
from ddcl_lightning.nn.running_means import RunningMeans

ITERATIONS = 4  # of the power method per batch: the direction is kept, so they add up over the batches


class RunningCovariance(RunningMeans):
    """Covariance of every head's tokens and its largest eigenvalue, which sets their critical temperature.

    The covariance is that of all processes; its largest eigenvalue is found by a power method that goes on from batch
    to batch, so that a step costs ``H d^2`` beyond the covariance itself and never waits for the device. A batch with a
    non-finite valid token on any process, or without a valid one, leaves everything as it is.

    Args:
        num_heads: H.
        dim: d.
        momentum: Weight of the newest batch, in (0, 1]. The first batches are averaged evenly until it is reached.

    Attributes:
        lambda_max: Buffer ``(H,)``, variance along the direction of largest variance; 0 before the first batch.
        covariance: Buffer ``(H, d, d)``.
        num_batches: Buffer, batches so far.

    Raises:
        ValueError: If the momentum is out of range.
    """

    lambda_max: Tensor
    covariance: Tensor
    direction: Tensor
    state_rules: ClassVar[Rules] = {
        **RunningMeans.state_rules,
        "lambda_max": NOT_NEGATIVE,
        "covariance": COVARIANCE,
        "direction": DIRECTION,
    }

    @typed
    def __init__(self, num_heads: int, dim: int, momentum: float = 0.05) -> None:
        super().__init__(momentum)
        generator = torch.Generator().manual_seed(0)  # the same start everywhere, and the global state left alone
        dtype = running_dtype()
        self.register_buffer("lambda_max", torch.zeros(num_heads, dtype=dtype))
        self.register_buffer("covariance", torch.zeros(num_heads, dim, dim, dtype=dtype))
        self.register_buffer("direction", torch.randn(num_heads, dim, generator=generator, dtype=dtype))

    @torch.no_grad()
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of ``(H, N, d)`` tokens with mask ``(H, N)``."""
        if not recomputing():
            self.add(moments_of(tokens, mask))

    @torch.no_grad()
    def add(self, moments: Moments) -> None:
        """Add a batch of which this process has tokens of these moments."""
        with torch.autocast(moments.scatter.device.type, enabled=False):
            number, _, scatter = over_processes(moments)
            covariance = self.averaged("covariance", scatter / number.clamp(min=1.0)[:, None, None])
            direction = self.direction
            for _ in range(ITERATIONS):
                image = (covariance @ direction.unsqueeze(-1)).squeeze(-1)
                length = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
                # Tokens without variance leave the direction as it is, for those that come.
                direction = torch.where(length > 0, image / length, direction)
            # Not finite in one place is not finite here, and everywhere alike: sums are those of all processes.
            usable = (number[0] > 0) & torch.isfinite(length).all() & torch.isfinite(covariance).all()
            self.take_in(usable, covariance=covariance, direction=direction, lambda_max=length.squeeze(-1))

    def total_variance(self) -> Tensor:
        """Trace of the covariance, ``(H,)``; 0 before the first batch."""
        return self.covariance.flatten(-2)[..., :: self.covariance.shape[-1] + 1].sum(-1)

    @torch.no_grad()
    def start(self, tokens: Tensor) -> None:
        """Restart from a sample ``(H, N, d)``, the same on every process; later batches get weight ``momentum``.

        Raises:
            ValueError: If a token is not finite.
        """
        require_finite_tokens(tokens)
        z = tokens.to(self.covariance.device, torch.float64)
        centred = z - z.mean(-2, keepdim=True)
        covariance = centred.mT @ centred / z.shape[-2]
        values, vectors = torch.linalg.eigh(covariance)
        self.covariance.copy_(covariance)
        self.direction.copy_(vectors[..., -1])
        self.lambda_max.copy_(values[..., -1].clamp(min=0.0))
        self.num_batches.fill_(math.ceil(1 / self.momentum))
