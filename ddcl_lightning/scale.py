"""A bound on the scale of embeddings, without which an unsupervised encoder shrinks everything."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning.distributed import sum_over_processes
from ddcl_lightning.functional._common import check_mask, zero_padding

ScaleMode = Literal["none", "per_dimension", "total"]


class EmbeddingScale(nn.Module):
    """Centre tokens and fix their scale, with running statistics for evaluation.

    ``L_q`` falls when an encoder shrinks its embeddings, so under a pure quantisation loss every encoder that
    may do so does, whatever the ratio of the learning rates. Dividing by the standard deviation of the batch takes
    that direction out of the gradient. Unlike batch normalisation it has no affine part (which could shrink
    again), ignores padding, and sums its statistics over all processes.

    Args:
        dim: Dimension D of the tokens.
        mode: ``"per_dimension"`` gives every dimension unit variance; ``"total"`` divides by one number, so that
            the mean variance is 1 and the geometry is kept; ``"none"`` does nothing.
        momentum: Weight of the newest batch in the running statistics, in (0, 1]. The first batches are
            averaged evenly until that weight is reached.

    Raises:
        ValueError: If the mode is unknown or the momentum out of range.
    """

    mean: Tensor
    variance: Tensor
    num_batches: Tensor

    def __init__(self, dim: int, mode: ScaleMode = "per_dimension", momentum: float = 0.1) -> None:
        super().__init__()
        if mode not in get_args(ScaleMode):
            raise ValueError(f"mode must be one of {get_args(ScaleMode)}; got {mode!r}.")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1]; got {momentum}.")
        self.dim, self.mode, self.momentum = dim, mode, momentum
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale tokens ``(..., D)`` with mask ``(...)``; same shape and dtype."""
        if self.mode == "none":
            return tokens
        check_mask(tokens, mask)
        if self.training:
            mean, variance = self._batch_statistics(tokens, mask)
            self._update(mean.detach(), variance.detach())
        else:
            mean, variance = self.mean, self.variance
        return ((tokens - mean) * self._inverse_deviation(variance)).to(tokens.dtype)

    def _batch_statistics(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(D,)`` over the valid tokens of all processes, in two passes for accuracy."""
        flat = zero_padding(tokens, mask).reshape(-1, self.dim).to(self.mean.dtype)
        keep = torch.ones_like(flat[:, :1]) if mask is None else mask.reshape(-1, 1).to(flat.dtype)
        sums = sum_over_processes(torch.cat([flat.sum(0), keep.sum(0)]))
        count = sums[-1].clamp(min=1.0)
        mean = sums[:-1] / count
        variance = sum_over_processes(((flat - mean) * keep).square().sum(0)) / count
        return mean, variance

    def _inverse_deviation(self, variance: Tensor) -> Tensor:
        """Factor ``(D,)`` or ``()``; the floor is relative, so that data in tiny units are scaled up all the same."""
        average = variance.mean()
        floor = 1e-5 * average + torch.finfo(variance.dtype).tiny
        return (average if self.mode == "total" else variance).add(floor).rsqrt()

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches += 1
        weight = (1.0 / self.num_batches).clamp(min=self.momentum).to(mean.dtype)
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(variance, weight)

    def extra_repr(self) -> str:
        return f"{self.dim}, mode={self.mode!r}"
