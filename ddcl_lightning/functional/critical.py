"""Critical temperatures: where a collapsed bank stops attracting and starts repelling.

Expanding ``L_q`` around "all prototypes at the data mean" gives the second variation ``I - (4 / T) C`` with the full
gradient and ``I - (2 / T) C`` with assignments held constant, ``C`` the covariance of the tokens (the second is the
threshold of deterministic annealing; Rose, Proc. IEEE 86, 1998). Collapse repels only below
``T_c = 4 lambda_max(C)`` (or ``2 lambda_max(C)``), whatever the learning rates are.
"""

import torch
from torch import Tensor

from ddcl_lightning.functional._common import check_mask, check_shapes, token_chunks, zero_padding
from ddcl_lightning.functional.assignment import _log_assign

EXACT_DIMENSION = 1024  # above it eigvalsh of a d x d matrix costs more than power iteration on the tokens
EXACT_ELEMENTS = 1 << 25  # entries of all K per-prototype covariances, 256 MiB in float64


@torch.no_grad()
def critical_temperature(tokens: Tensor, mask: Tensor | None = None, *, detach_assignments: bool = False) -> Tensor:
    """Temperature above which a collapsed bank is attracting, in units of squared distance.

    Args:
        tokens: ``(..., N, d)``; the covariance is taken over valid tokens.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Whether the layer holds assignments constant, which halves the threshold.

    Returns:
        ``T_c``, ``(...)`` float64. Exact (eigvalsh) up to d = 1024, by power iteration beyond.

    Raises:
        ValueError: If tokens are not finite or the mask leaves none.
    """
    check_mask(tokens, mask)
    z = zero_padding(tokens.to(torch.float64), mask)
    if not bool(torch.isfinite(z).all()):
        raise ValueError("tokens must be finite; got NaN or infinity among the valid ones. Check the encoder.")
    keep = torch.ones_like(z[..., 0]) if mask is None else mask.to(z.dtype)
    if bool((keep.sum(-1) == 0).any()):
        raise ValueError("mask leaves no valid token; a covariance needs at least one. Check the padding mask.")
    weight = keep / keep.sum(-1, keepdim=True)
    factor = _factor(detach_assignments)
    return factor * _weighted_lambda_max(z, weight.unsqueeze(-2)).squeeze(-1)


@torch.no_grad()
def prototype_critical_temperatures(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    detach_assignments: bool = False,
) -> Tensor:
    """Critical temperature of each prototype, from the covariance of the tokens it is responsible for.

    A prototype below its own value is about to split (there is structure inside it that a second prototype
    would pick up); prototypes that share tokens above it are about to merge.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Whether the layer holds assignments constant, which halves the threshold.

    Returns:
        ``(..., K)`` float64. Prototypes are weighted in log space, so even one that attracts next to no mass has a value.
    """
    check_shapes(tokens, prototypes, mask)
    z = zero_padding(tokens.to(torch.float64), mask)
    log_q = _log_assign(z, prototypes.to(torch.float64), temperature).mT
    if mask is not None:
        log_q = log_q.masked_fill(~mask.unsqueeze(-2), -torch.inf)
    return _factor(detach_assignments) * _weighted_lambda_max(z, log_q.softmax(-1))


def _factor(detach_assignments: bool) -> float:
    return 2.0 if detach_assignments else 4.0


def _weighted_lambda_max(tokens: Tensor, weights: Tensor) -> Tensor:
    """Largest eigenvalue of ``sum_n w_kn (z_n - m_k)(z_n - m_k)^T`` for weights ``(..., K, N)`` that sum to 1."""
    dim, size = tokens.shape[-1], weights.shape[-2]
    mean = weights @ tokens
    if dim <= EXACT_DIMENSION and size * dim * dim <= EXACT_ELEMENTS:
        covariance = torch.zeros(*mean.shape, dim, dtype=tokens.dtype, device=tokens.device)
        for part in token_chunks(tokens.shape[-2], size * dim):
            centred = tokens[..., None, part, :] - mean.unsqueeze(-2)
            covariance += (centred * weights[..., part].unsqueeze(-1)).mT @ centred
        return torch.linalg.eigvalsh(covariance)[..., -1].clamp(min=0.0)
    return _power_iteration(tokens, weights, mean)


def _power_iteration(tokens: Tensor, weights: Tensor, mean: Tensor, iterations: int = 200) -> Tensor:
    """The same without the covariance: every iteration is two products with the tokens."""
    generator = torch.Generator(device="cpu").manual_seed(0)  # a diagnostic must not move the global random state
    vector = torch.randn(mean.shape, generator=generator, dtype=tokens.dtype).to(tokens.device)
    vector /= vector.norm(dim=-1, keepdim=True)
    value = torch.zeros_like(mean[..., 0])
    for _ in range(iterations):
        offset = (mean * vector).sum(-1, keepdim=True)
        response = weights * (vector @ tokens.mT - offset)
        product = response @ tokens - response.sum(-1, keepdim=True) * mean
        latest = product.norm(dim=-1)
        vector = product / latest.clamp(min=torch.finfo(tokens.dtype).tiny).unsqueeze(-1)
        if bool(((latest - value).abs() <= 1e-9 * latest).all()):
            return latest
        value = latest
    return value
