"""The loss decomposition from its definitions in float64, as a reference for the terms that a layer trained with.

Computing ``V`` as ``L_q - L_OLS`` would make eq. 3 true by construction. Here ``L_q`` comes from pairwise distances,
``L_OLS`` from the centroids and ``V`` from the distances of prototypes to centroids, each on its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional._common import check_shapes, temperature_like, token_chunks, zero_padding
from ddcl_lightning.functional.assignment import Decomposition


class DecompositionErrors(NamedTuple):
    """Largest errors of a decomposition over the leading dimensions, as plain floats.

    All but ``rows`` are relative to the energy ``mean(||z - m||^2 + sum_k q_k ||p_k - m||^2)``, with ``m`` the mean
    prototype: the scale against which finite precision rounds. An error relative to ``L_q`` itself says nothing once
    the tokens sit on their prototypes and ``L_q`` goes to zero. See :func:`energy_floor` for tokens and prototypes that
    all coincide.

    Attributes:
        identity: ``|L_q - (L_OLS + V)|`` of the float64 terms.
        loss: ``|L_q(trained) - L_q(float64)|``.
        ols: The same for ``L_OLS``.
        variance: The same for ``V``.
        rows: Largest ``|sum_k q_nk - 1|``.
        energy: The energy itself (the smallest over the leading dimensions).
        sharpness: Largest ratio energy / T. Assignments computed with relative precision eps carry an error of
            about eps * sharpness, which moves loss between ``L_OLS`` and ``V`` but leaves their sum alone.
    """

    identity: float
    loss: float
    ols: float
    variance: float
    rows: float
    energy: float
    sharpness: float


class _Sums(NamedTuple):
    terms: Decomposition
    energy: Tensor
    rows: Tensor


@torch.no_grad()
def decompose(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
) -> Decomposition:
    """``L_q``, ``L_OLS`` and ``V`` (eq. 2 and 3) in float64, each from its own definition.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance.
        mask: ``(..., N)`` boolean, True for valid tokens.
        weights: Assignments ``(..., N, K)`` to use instead of the softmax of eq. 2, to check another layer's.

    Returns:
        The three terms, float64, ``(...)`` each.
    """
    return _decompose(tokens, prototypes, temperature, mask, weights).terms


@torch.no_grad()
def decomposition_errors(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    trained: Decomposition,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
) -> DecompositionErrors:
    """Compare the terms a layer trained with to the float64 decomposition of the same tokens.

    Args:
        tokens: ``(..., N, d)``, exactly what the layer saw.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance.
        trained: The terms that entered the loss, ``(...)`` each.
        mask: ``(..., N)`` boolean, True for valid tokens.
        weights: The layer's own assignments ``(..., N, K)``, if it returned them.

    Returns:
        Errors as plain floats. A wrong softmax, padding in a mean or rows that do not sum to 1 make them large.
    """
    sums = _decompose(tokens, prototypes, temperature, mask, weights)
    exact = sums.terms
    energy = sums.energy + energy_floor(prototypes, trained.loss.dtype)
    value = temperature_like(temperature, energy).reshape(-1)

    def worst(difference: Tensor) -> float:
        # A NaN must fail the check, and max() of a tensor with NaN is NaN.
        return float((difference.abs() / energy).max())

    def against(name: str) -> float:
        return worst(getattr(trained, name).to(torch.float64) - getattr(exact, name))

    return DecompositionErrors(
        identity=worst(exact.loss - exact.ols - exact.variance),
        loss=against("loss"),
        ols=against("ols"),
        variance=against("variance"),
        rows=float(sums.rows.max()),
        energy=float(energy.min()),
        sharpness=float((energy.reshape(-1) / value).max()),
    )


def energy_floor(prototypes: Tensor, dtype: torch.dtype) -> Tensor:
    """Energy below which terms computed in ``dtype`` are rounding: where all tokens and prototypes coincide.

    It is a share of the squared distance of the prototypes ``(..., K, d)`` to the origin, 1e-9 for float32 and 1e-18
    for float64: centring leaves them at a distance of about the machine epsilon times that; ``(...)`` float64.
    """
    share = 1e-18 if dtype == torch.float64 else 1e-9
    tiny = torch.finfo(torch.float64).tiny
    return share * prototypes.detach().to(torch.float64).square().sum(-1).amax(-1) + tiny


def _decompose(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
) -> _Sums:
    check_shapes(tokens, prototypes, mask)
    center = prototypes.to(torch.float64).mean(-2, keepdim=True)
    p = prototypes.to(torch.float64) - center  # every term depends on differences only; the origin only rounds
    value = temperature_like(temperature, p)
    lead = tokens.shape[:-2]
    loss, ols, variance, energy, rows = (p.new_zeros(lead) for _ in range(5))
    count = p.new_zeros(lead) + tokens.shape[-2] if mask is None else mask.sum(-1).to(torch.float64)

    for chunk in token_chunks(tokens.shape[-2], p[..., 0].numel()):
        valid = None if mask is None else mask[..., chunk]
        z = zero_padding(tokens[..., chunk, :].to(torch.float64) - center, valid)
        distances = _squared_distances(z, p)
        q = (-distances / value).softmax(-1) if weights is None else weights[..., chunk, :].to(torch.float64)
        q = zero_padding(q, valid)
        centroids = q @ p
        keep = torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device) if valid is None else valid.to(z.dtype)
        spread = z.square().sum(-1) + (q * p.square().sum(-1).unsqueeze(-2)).sum(-1)
        loss += ((q * distances).sum(-1) * keep).sum(-1)
        ols += ((z - centroids).square().sum(-1) * keep).sum(-1)
        variance += ((q * _squared_distances(centroids, p)).sum(-1) * keep).sum(-1)
        energy += (spread * keep).sum(-1)
        rows = torch.maximum(rows, ((q.sum(-1) - 1).abs() * keep).amax(-1))
    terms = Decomposition(loss / count, ols / count, variance / count)
    return _Sums(terms, energy / count, rows)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences, not by the expanded square: this is the side that must not round.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
