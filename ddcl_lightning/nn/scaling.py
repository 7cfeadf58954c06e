"""Bound on the scale of embeddings, without which an unsupervised encoder shrinks them."""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.compat import recomputing
from ddcl_lightning.functional._common import accumulation_dtype, check_mask, require_floating, zero_padding
from ddcl_lightning.nn.guarded_state import COVARIANCE, FINITE, Rules, running_dtype
from ddcl_lightning.nn.joint_moments import joint_covariance, joint_mean
from ddcl_lightning.nn.running_means import RunningMeans

ScaleMode = Literal["none", "unit", "per_dimension", "total", "whiten"]

SMALLEST_VARIANCE = 1e-24  # tokens below it count as constant; its power -3/2, a gradient, must fit float32


def check_scale_mode(argument: str, mode: str) -> None:
    """Raise a ValueError that names the argument unless there is such a mode."""
    if mode not in get_args(ScaleMode):
        raise ValueError(
            f"{argument} must be one of {get_args(ScaleMode)}; got {mode!r}. Choose one of them, 'none' for no scaling."
        )


class EmbeddingScale(RunningMeans):
    """Centre tokens and fix their scale, with running statistics for evaluation.

    ``L_q`` falls when an encoder shrinks its embeddings, so under a pure quantization loss every encoder that
    can shrink them does, at any ratio of the learning rates. Dividing by the standard deviation of the batch removes
    this direction from the gradient; but with every dimension at unit variance the loss still falls when all
    dimensions become copies of one. Whitening removes that direction too (a fast encoder still ends with about K - 1
    directions in use). Unlike batch normalization there is no affine part (which could shrink again), padding is
    ignored, and statistics are sums over all processes. A batch with a non-finite valid token, or without a valid one,
    leaves the running statistics as they are (and comes out as NaN).

    Args:
        dim: Dimension D of the tokens.
        mode: ``"whiten"`` makes the covariance the identity, by the rotation-free ``C^(-1/2)``;
            ``"per_dimension"`` gives every dimension unit variance; ``"total"`` divides by one number, so that
            the mean variance is 1 and the geometry is kept; ``"unit"`` gives every token unit length, without
            statistics: squared distances become 2 (1 - cosine), what text encoders are compared by (a token of
            zeros stays one); ``"none"`` does nothing. Whitening needs batches of at least ``2 D`` tokens; a smaller one
            (the last of an epoch) is scaled by the running statistics and gives the encoder no gradient.
        momentum: Weight of the newest batch in the running statistics, in (0, 1]. The first batches are
            averaged evenly until that weight is reached.

    Attributes:
        mean: Running mean, ``(D,)``.
        variance: Running variances ``(D,)``, or the running covariance ``(D, D)`` for ``"whiten"``.

    Raises:
        ValueError: If the mode is unknown or the momentum out of range; in training, if the very first batch is too
            small to whiten.
    """

    mean: Tensor
    variance: Tensor
    state_rules: ClassVar[Rules] = {**RunningMeans.state_rules, "mean": FINITE, "variance": COVARIANCE}

    @typed
    def __init__(self, dim: int, mode: ScaleMode = "per_dimension", momentum: float = 0.1) -> None:
        super().__init__(momentum)
        require_at_least(1, dim=dim)
        check_scale_mode("mode", mode)
        self.dim, self.mode = dim, mode
        dtype = running_dtype()
        self.register_buffer("mean", torch.zeros(dim, dtype=dtype))
        self.register_buffer(
            "variance", torch.eye(dim, dtype=dtype) if mode == "whiten" else torch.ones(dim, dtype=dtype)
        )

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale tokens ``(..., D)`` with mask ``(...)``; same shape and dtype."""
        require_floating(tokens)
        if self.mode == "none":
            return tokens
        check_mask(tokens, mask)
        if self.mode == "unit":
            with torch.autocast(tokens.device.type, enabled=False):
                return normalize(tokens.to(accumulation_dtype(tokens)), dim=-1).to(tokens.dtype)
        tokens = zero_padding(tokens, mask)  # a NaN there would reach the gradients, as 0 * NaN
        statistics = self._batch_statistics(tokens, mask) if self.training else None
        if statistics is not None:
            mean, variance, count = statistics
            self._update(mean.detach(), variance.detach(), count.detach())
        else:
            mean, variance = self.mean, self.variance
            if self.training:
                # Against constant statistics shrinking would pay. A zero gradient, not none: plain DDP wants one.
                tokens = tokens.detach() + 0.0 * tokens
        dtype = accumulation_dtype(tokens, variance)
        with torch.autocast(tokens.device.type, enabled=False):
            scaled = self._apply_scale(tokens.to(dtype) - mean.to(dtype), variance.to(dtype))
        return scaled.to(tokens.dtype)

    def _batch_statistics(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean, (co)variance and number of all processes' valid tokens, in two passes; None for too small a batch."""
        flat = tokens.reshape(-1, self.dim)
        mask = None if mask is None else mask.flatten()
        mean, number = joint_mean(flat, mask)
        if self.mode == "whiten" and int(number) < 2 * self.dim:
            if int(self.num_batches) == 0:
                raise ValueError(
                    f"embedding_scale='whiten' needs batches of at least 2 D = {2 * self.dim} valid tokens; the first "
                    f"has {int(number)}. Raise batch_size, lower the dimension, or use 'per_dimension' or 'total'."
                )
            return None
        return mean, joint_covariance(flat, mask, mean, number, diagonal=self.mode != "whiten"), number[0]

    def _apply_scale(self, centred: Tensor, variance: Tensor) -> Tensor:
        """Scale centred tokens; the floors are relative, so that data in tiny units are scaled up all the same."""
        # An overflow would come out as zeros, which look like tokens.
        usable = torch.isfinite(variance).all()
        centred = torch.where(usable, centred, torch.nan)
        if self.mode == "whiten":
            eye = torch.eye(self.dim, dtype=variance.dtype, device=variance.device)
            variance = torch.where(usable, variance, eye)  # eigenvectors of NaN are an error
            floor = 1e-4 * variance.diagonal().mean() + SMALLEST_VARIANCE
            root: Tensor = _InverseSquareRoot.apply(variance + floor * eye)
            return centred @ root
        average = variance.mean()
        floor = 1e-5 * average + SMALLEST_VARIANCE
        return centred * (average if self.mode == "total" else variance).add(floor).rsqrt()

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if recomputing():
            return
        usable = (count > 0) & torch.isfinite(mean).all() & torch.isfinite(variance).all()
        self.take_in(usable, mean=self.averaged("mean", mean), variance=self.averaged("variance", variance))

    def extra_repr(self) -> str:
        """Dimension and mode, for ``print``."""
        return f"{self.dim}, mode={self.mode!r}"


class _InverseSquareRoot(torch.autograd.Function):
    """``C^(-1/2)`` of a positive definite matrix, differentiable where eigenvalues coincide.

    The derivative in the eigenbasis is the Daleckii-Krein formula, an entrywise product with the divided differences of
    ``x^(-1/2)``, ``-1 / (a b (a + b))`` with a and b the square roots of two eigenvalues. Differentiating through the
    eigenvectors instead would divide by differences of eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        ctx.save_for_backward(roots, vectors)
        inverse: Tensor = (vectors / roots) @ vectors.mT
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        row, column = roots.unsqueeze(-1), roots.unsqueeze(-2)
        symmetric = 0.5 * (gradient + gradient.mT)
        differences = -1 / (row * column * (row + column))
        to_matrix: Tensor = vectors @ (differences * (vectors.mT @ symmetric @ vectors)) @ vectors.mT
        return to_matrix
