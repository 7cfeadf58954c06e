"""Signals of a bank's health: separation (eq. 8), entropy and usage (eq. 9), and the repulsion that keeps both up."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional._common import (
    CHUNK_ELEMENTS,
    accumulation_dtype,
    check_mask,
    check_shapes,
    masked_mean,
    token_chunks,
    zero_padding,
)
from ddcl_lightning.functional.assignment import log_assign
from ddcl_lightning.functional.token_statistics import code_counts


class Separation(NamedTuple):
    """Distances between the prototypes of a bank, in units of distance, shape ``(...)`` each.

    Attributes:
        minimum: ``Delta = min_{j<k} ||p_j - p_k||`` (eq. 8); infinite for a bank of one prototype.
        mean: Mean pairwise distance; NaN for a bank of one prototype.
        closest: Indices of the closest pair, ``(..., 2)`` int64.
    """

    minimum: Tensor
    mean: Tensor
    closest: Tensor


class AssignmentStatistics(NamedTuple):
    """Summary of the soft and hard assignments of valid tokens.

    Attributes:
        entropy: ``H = -mean_n sum_k q_nk ln q_nk`` in [0, ln K] nats (eq. 9), ``(...)``.
        mass: Mean soft assignment per prototype, ``(..., K)``, sums to 1.
        counts: Tokens whose nearest prototype is k, ``(..., K)`` int64.
    """

    entropy: Tensor
    mass: Tensor
    counts: Tensor


@torch.no_grad()
def separation(prototypes: Tensor) -> Separation:
    """Smallest and mean distance between prototypes (eq. 8), in float64 and by rows, so that large banks fit.

    Args:
        prototypes: ``(..., K, d)``.

    Returns:
        Minimum and mean ``(...)`` and the closest pair ``(..., 2)``.
    """
    p = prototypes.detach().to(torch.float64)
    size = p.shape[-2]
    lead = p.shape[:-2]
    minimum = p.new_full(lead, math.inf)
    total = p.new_zeros(lead)
    closest = torch.zeros(*lead, 2, dtype=torch.int64, device=p.device)
    index = torch.arange(size, device=p.device)
    for rows in token_chunks(size, max(1, p[..., 0].numel())):
        distances = torch.cdist(p[..., rows, :], p, compute_mode="donot_use_mm_for_euclid_dist")
        upper = index.unsqueeze(0) > index[rows].unsqueeze(1)  # every pair once, no prototype with itself
        total += distances.masked_fill(~upper, 0.0).sum((-1, -2))
        value, flat = distances.masked_fill(~upper, math.inf).flatten(-2).min(-1)
        pair = torch.stack([flat // size + rows.start, flat % size], -1)
        closest = torch.where((value < minimum).unsqueeze(-1), pair, closest)
        minimum = torch.minimum(minimum, value)
    pairs = size * (size - 1) // 2
    return Separation(minimum, total / pairs if pairs else torch.full_like(total, math.nan), closest)


@torch.no_grad()
def assignment_statistics(
    tokens: Tensor, prototypes: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> AssignmentStatistics:
    """Entropy, mean soft assignment and hard counts, streamed over tokens.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance.
        mask: ``(..., N)`` boolean, True for valid tokens.

    Returns:
        Statistics in float32 or wider; NaN entropy and mass where no token is valid.
    """
    check_shapes(tokens, prototypes, mask)
    dtype = accumulation_dtype(tokens, prototypes)
    p = prototypes.to(dtype)
    entropy = p.new_zeros(p.shape[:-2])
    mass = p.new_zeros(p.shape[:-1])
    counts = torch.zeros(p.shape[:-1], dtype=torch.int64, device=p.device)
    with torch.autocast(tokens.device.type, enabled=False):
        for chunk in token_chunks(tokens.shape[-2], p[..., 0].numel()):
            valid = None if mask is None else mask[..., chunk]
            log_q = log_assign(zero_padding(tokens[..., chunk, :].to(dtype), valid), p, temperature)
            q = zero_padding(log_q.exp(), valid)
            entropy += torch.special.entr(q).sum((-1, -2))  # -q ln q, and 0 where q underflows
            mass += q.sum(-2)
            counts += code_counts(log_q.argmax(-1), p.shape[-2], valid)
    count = torch.full_like(entropy, tokens.shape[-2]) if mask is None else mask.sum(-1).to(dtype)
    return AssignmentStatistics(entropy / count, mass / count.unsqueeze(-1), counts)


@torch.no_grad()
def total_variance(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance of valid tokens to their mean, the trace of the covariance, ``(...)`` in float64.

    Args:
        tokens: ``(..., N, d)``.
        mask: ``(..., N)`` boolean, True for valid tokens.
    """
    return masked_mean(_centred(tokens, mask).square().sum(-1), mask)


@torch.no_grad()
def effective_dimension(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Participation ratio ``(tr C)^2 / tr(C^2)`` of the covariance of valid tokens, in [1, d]; ``(...)`` float64.

    The number of directions that the tokens really use: d if the covariance is a multiple of the identity, 1 if all
    tokens lie on a line, NaN if they have no variance.

    Args:
        tokens: ``(..., N, d)``.
        mask: ``(..., N)`` boolean, True for valid tokens.
    """
    centred = _centred(tokens, mask)
    # The smaller of the two Gram matrices has the same trace and the same trace of its square.
    gram = centred.mT @ centred if tokens.shape[-1] <= tokens.shape[-2] else centred @ centred.mT
    shares = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # the square of a sum may overflow
    return 1 / shares.square().sum((-1, -2))


def _centred(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens minus the mean of the valid ones in float64, zero at padding."""
    check_mask(tokens, mask)
    z = zero_padding(tokens.to(torch.float64), mask)
    return zero_padding(z - masked_mean(z, mask, dim=-2).unsqueeze(-2), mask)


def repulsion_energy(prototypes: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Repulsion ``mean_{j<k} ln(1 + scale^2 / ||p_j - p_k||^2) >= 0``, which grows without bound as two meet.

    The paper's free energy (eq. 15) needs a repulsion of this kind for its global result; the plain loss has
    none at coinciding prototypes. Nearer than the scale a pair is driven apart as by ``-ln ||p_j - p_k||^2``; beyond
    it the force falls with the third power of the distance, and the energy ends at 0: no prototype can lower it without
    limit by running away. A pair that coincides exactly has no direction to part in: it enters with a large
    finite value and no gradient.

    Args:
        prototypes: ``(..., K, d)``; K must be at least 2.
        scale: Length within which prototypes repel, >= 0, that of the tokens' spread as a rule; a float or ``(...)``.

    Returns:
        ``(...)``, float32 or wider. Stores the ``K^2`` distances: meant for banks of up to a few thousand prototypes.

    Raises:
        ValueError: If there are fewer than two prototypes, or more than 16,384, or a scale is a negative number.
    """
    size = prototypes.shape[-2]
    if size < 2:
        raise ValueError(
            f"prototypes must hold at least 2 prototypes for a repulsion; got K = {size}. Build the bank with more, or "
            "leave the repulsion out."
        )
    if size * size > 64 * CHUNK_ELEMENTS:
        raise ValueError(
            f"repulsion_energy stores K^2 distances; got K = {size}. Use it with at most 16,384 prototypes."
        )
    if not isinstance(scale, Tensor) and not scale >= 0:
        raise ValueError(
            f"scale must be >= 0, a length such as the spread of the tokens; got {scale}. Pass 1 where tokens are "
            "standardized."
        )
    p = prototypes.to(accumulation_dtype(prototypes))
    first, second = torch.triu_indices(size, size, offset=1, device=p.device)
    distances = torch.cdist(p, p, compute_mode="donot_use_mm_for_euclid_dist")[..., first, second]
    log_distances = distances.clamp(min=torch.finfo(p.dtype).tiny).log()
    log_scale = torch.as_tensor(scale, dtype=p.dtype, device=p.device).log().unsqueeze(-1)
    ratio = 2 * (log_scale - log_distances)
    return torch.logaddexp(ratio, torch.zeros_like(ratio)).mean(-1)
