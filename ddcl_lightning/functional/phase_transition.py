"""Critical temperatures: where a collapsed bank stops attracting and starts repelling.

Expanding ``L_q`` around "all prototypes at the data mean" gives the second variation ``I - (4 / T) C`` with the full
gradient and ``I - (2 / T) C`` with assignments held constant, ``C`` the covariance of the tokens (the second is the
threshold of deterministic annealing; Rose, Proc. IEEE 86, 1998). Collapse repels only below
``T_c = 4 lambda_max(C)`` (or ``2 lambda_max(C)``), whatever the learning rates are.
"""

import torch
from torch import Tensor

from ddcl_lightning.functional._common import (
    check_mask,
    check_shapes,
    require_finite_tokens,
    temperature_like,
    token_chunks,
    zero_padding,
)
from ddcl_lightning.functional.assignment import log_assign

EXACT_DIMENSION = 1024  # above it eigvalsh of a d x d matrix costs more than power iteration on the tokens
EXACT_ELEMENTS = 1 << 25  # entries of all the covariances, 256 MiB in float64


@torch.no_grad()
def critical_temperature(tokens: Tensor, mask: Tensor | None = None, *, detach_assignments: bool = False) -> Tensor:
    """Temperature above which a collapsed bank is attracting, in units of squared distance.

    Args:
        tokens: ``(..., N, d)``; the covariance is taken over valid tokens.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Whether the layer holds assignments constant, which halves the threshold.

    Returns:
        ``T_c``, ``(...)`` float64. Exact (eigvalsh) up to d = 1024; by power iteration beyond, which is low by less
        than 0.1 % even on white noise.

    Raises:
        ValueError: If tokens are not finite or the mask leaves none.
    """
    check_mask(tokens, mask)
    z, keep = _valid_tokens(tokens, mask)
    weight = (keep / keep.sum(-1, keepdim=True)).unsqueeze(-2)
    return critical_factor(detach_assignments) * _weighted_lambda_max(z, weight, weight @ z).squeeze(-1)


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
        ``(..., K)`` float64. Tokens are weighted in log space, so even a prototype without mass has a value.

    Raises:
        ValueError: If tokens are not finite or the mask leaves none.
    """
    check_shapes(tokens, prototypes, mask)
    z, keep = _valid_tokens(tokens, mask)
    weights = _responsibilities(z, keep, prototypes.to(torch.float64), temperature)
    return critical_factor(detach_assignments) * _weighted_lambda_max(z, weights, weights @ z)


@torch.no_grad()
def split_margins(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    detach_assignments: bool = False,
) -> Tensor:
    """Margin of each prototype against a split: below 1, two of half its mass at its place move apart.

    With detached assignments it is ``T / (2 lambda_max(Cov_k))``, ``Cov_k`` the covariance about ``p_k`` of the tokens
    weighted by ``q_nk``. With the full gradient, ``d_nk = ||z_n - p_k||^2``, ``L_n = sum_k q_nk d_nk`` and
    ``g_nk = 1 - (d_nk - L_n) / T``, it is the mean of ``g_nk`` under these weights over ``(2 / T) lambda_max`` of the
    mean of ``(1 + g_nk) (z_n - p_k)(z_n - p_k)^T``: ``T / (4 lambda_max(Cov_k))`` where g is 1. Both are exact for a
    pair that coincides, wherever it is; its members share the margin. As T falls, the smallest names the next to split.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Whether the layer holds assignments constant.

    Returns:
        ``(..., K)`` float64; infinite where the tokens of a prototype are all at its place. Stores the ``N x K``
        assignments.

    Raises:
        ValueError: If tokens are not finite or the mask leaves none.
    """
    check_shapes(tokens, prototypes, mask)
    z, keep = _valid_tokens(tokens, mask)
    p = prototypes.to(torch.float64)
    value = temperature_like(temperature, z)
    weights = _responsibilities(z, keep, p, temperature)
    isotropic, directed = torch.ones_like(weights[..., 0]), weights
    if not detach_assignments:
        distances = torch.cdist(p, z, compute_mode="donot_use_mm_for_euclid_dist").square()
        q = (-distances / value).softmax(-2)
        response = 1 - (distances - (q * distances).sum(-2, keepdim=True)) / value
        isotropic, directed = (weights * response).sum(-1), weights * (1 + response)
    return isotropic * value.squeeze(-1) / (2 * _weighted_lambda_max(z, directed, p))


def _responsibilities(tokens: Tensor, keep: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Assignments normalized over tokens, ``(..., K, N)``; in log space, so that a prototype without mass has some."""
    log_q = log_assign(tokens, prototypes, temperature).mT
    return (log_q + keep.log().unsqueeze(-2)).softmax(-1)


def _valid_tokens(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens in float64 with padding at zero, and 1 for valid tokens, ``(..., N)``."""
    z = zero_padding(tokens.to(torch.float64), mask)
    require_finite_tokens(z)
    keep = torch.ones_like(z[..., 0]) if mask is None else mask.to(z.dtype)
    if bool((keep.sum(-1) == 0).any()):
        raise ValueError("mask leaves no valid token; a covariance needs at least one. Check the padding mask.")
    return z, keep


def critical_factor(detach_assignments: bool = False) -> float:
    """``T_c / lambda_max(C)``: 4 with the full gradient, 2 with assignments held constant."""
    return 2.0 if detach_assignments else 4.0


def _weighted_lambda_max(tokens: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
    """Largest eigenvalue of ``sum_n w_kn (z_n - c_k)(z_n - c_k)^T``: weights ``(..., K, N)``, centers c."""
    dim = tokens.shape[-1]
    if dim > EXACT_DIMENSION or centers.numel() * dim > EXACT_ELEMENTS:
        return _power_iteration(tokens, weights, centers)
    covariance = centers.new_zeros(*centers.shape, dim)
    for chunk in token_chunks(tokens.shape[-2], centers.numel()):
        centred = tokens[..., None, chunk, :] - centers.unsqueeze(-2)
        covariance += (centred * weights[..., chunk].unsqueeze(-1)).mT @ centred
    eigenvalues: Tensor = torch.linalg.eigvalsh(covariance)
    return eigenvalues[..., -1].clamp(min=0.0)


def _power_iteration(tokens: Tensor, weights: Tensor, centers: Tensor, iterations: int = 200) -> Tensor:
    """Largest eigenvalue without the covariance: every iteration is two products with the tokens."""
    generator = torch.Generator(device="cpu").manual_seed(0)  # a diagnostic must not move the global random state
    vector = torch.randn(centers.shape, generator=generator, dtype=tokens.dtype).to(tokens.device)
    vector /= torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    value = torch.zeros_like(centers[..., 0])
    for _ in range(iterations):
        offset = (centers * vector).sum(-1, keepdim=True)
        response = weights * (vector @ tokens.mT - offset)
        # Their sum is zero but for rounding about the mean, and counts where the tokens lie far from the origin.
        product = response @ tokens - response.sum(-1, keepdim=True) * centers
        latest: Tensor = torch.linalg.vector_norm(product, dim=-1)
        vector = product / latest.clamp(min=torch.finfo(tokens.dtype).tiny).unsqueeze(-1)
        if bool(((latest - value).abs() <= 1e-9 * latest).all()):
            return latest
        value = latest
    return value
