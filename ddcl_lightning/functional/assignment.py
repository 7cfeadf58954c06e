"""Soft assignment of tokens to prototypes (eq. 2), soft centroids (eq. 4) and the loss terms (eq. 3)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ddcl_lightning.functional._common import (
    accumulation_dtype,
    check_shapes,
    masked_mean,
    temperature_like,
    token_chunks,
    zero_padding,
)
from ddcl_lightning.functional.token_statistics import TokenStatistics

# CUDA's memory-efficient kernel refuses float32 rows of another multiple, and the fallback stores the N x K matrix.
ROW_ALIGNMENT = 4


class Decomposition(NamedTuple):
    """The three terms of eq. 3, each a mean over valid tokens in units of squared distance, shape ``(...)``.

    Attributes:
        loss: ``L_q``, the soft quantization loss.
        ols: ``L_OLS``, squared distance of the tokens to their soft centroids.
        variance: ``V >= 0``, spread of the prototypes around the soft centroids; ``loss = ols + variance``.
    """

    loss: Tensor
    ols: Tensor
    variance: Tensor


class BankOutput(NamedTuple):
    """Output of a bank of prototypes for ``(..., N, d)`` tokens.

    Attributes:
        centroids: Soft centroids, ``(..., N, d)``, in the dtype of the tokens; zero at padding.
        terms: Loss terms, ``(...)`` each, float32 or wider.
        weights: Soft assignments ``(..., N, K)``, zero at padding, or None where they were not asked for.
        entropy: Mean over valid tokens of ``sum_k q_nk s_k`` with the surprisal s, ``(...)``, or None without one.
        codes: Hard codes, where a :class:`~ddcl_lightning.PrototypeBank` was asked for them.
        statistics: Mass and mean token of each prototype, where codes were asked for.
        anchor: A zero on which gradients hang that are passed around such a call of a bank, or None unless an optimizer
            follows it.
        scale: What the terms and the entropy are multiplied by beyond being means over these tokens, for the mean over
            processes.
    """

    centroids: Tensor
    terms: Decomposition
    weights: Tensor | None
    entropy: Tensor | None = None
    codes: Tensor | None = None
    statistics: TokenStatistics | None = None
    anchor: Tensor | None = None
    scale: Tensor | float = 1.0

    def replaced(self, **changes: Any) -> "BankOutput":
        """Copy with other values by name, as ``_replace`` makes it, which torch 2.6 cannot compile."""
        values: list[Any] = [changes.get(name, value) for name, value in zip(BankOutput._fields, self, strict=True)]
        return BankOutput(*values)


def soft_assign(tokens: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Boltzmann assignments ``q = softmax_k(-||z_n - p_k||^2 / T)`` (eq. 2).

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.

    Returns:
        ``(..., N, K)``, rows sum to 1, float32 or wider.
    """
    check_shapes(tokens, prototypes, None)
    dtype = accumulation_dtype(tokens, prototypes)
    with torch.autocast(tokens.device.type, enabled=False):
        return log_assign(tokens.to(dtype), prototypes.to(dtype), temperature).exp()


def log_assign(tokens: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Logarithm of the assignments, ``(..., N, K)``: finite where the assignments themselves underflow."""
    center = prototypes.mean(-2, keepdim=True)
    z, p = tokens - center, prototypes - center
    # ||z||^2 is the same for every prototype and cancels in the softmax.
    logits = 2 * z @ p.mT - p.square().sum(-1).unsqueeze(-2)
    return (logits / temperature_like(temperature, logits)).log_softmax(-1)


def prototype_attention(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    detach_assignments: bool = False,
    surprisal: Tensor | None = None,
) -> BankOutput:
    """Soft centroids and loss terms in one attention call, without the ``N x K`` matrix in memory.

    With the query ``[z, 1]``, the key ``[2 p, -||p||^2] / T`` and the value ``[p, ||p||^2]``, one
    ``scaled_dot_product_attention`` gives ``c = sum_k q_k p_k`` and ``e = sum_k q_k ||p_k||^2``; then
    ``L_OLS = ||z - c||^2`` and ``V = e - ||c||^2``. Tokens and prototypes are centred on the mean prototype
    first, since ``V`` is a difference of large numbers when the data lie far from the origin. (On a GPU, float64
    has no fused kernel and stores the matrix after all.)

    Args:
        tokens: ``(..., N, d)``, any float dtype; half precisions are computed in float32.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.
        mask: ``(..., N)`` boolean, True for valid tokens. Padding enters no term and no gradient.
        detach_assignments: Hold ``q`` constant in the backward pass, the paper's stop-gradient form
            (eq. 10); by default gradients flow through ``q`` too.
        surprisal: ``(..., K)``, ``-ln`` of the mean assignment to each prototype; its mean over the assignments is the
            entropy of the mean assignment, whose gradient is that of this mean.

    Returns:
        Centroids and terms; the weights are None. Terms are NaN where the mask leaves no token.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
        TypeError: If tokens are not floating point or the mask is not boolean.
    """
    check_shapes(tokens, prototypes, mask)
    dtype = accumulation_dtype(tokens, prototypes)
    with torch.autocast(tokens.device.type, enabled=False):
        center = prototypes.detach().to(dtype).mean(-2, keepdim=True)
        z = zero_padding(tokens.to(dtype) - center, mask)
        p = prototypes.to(dtype) - center
        norms = p.square().sum(-1, keepdim=True)

        query = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        key = torch.cat([2 * p, -norms], -1) / temperature_like(temperature, p)
        if detach_assignments:
            query, key = query.detach(), key.detach()
        extra = [] if surprisal is None else [surprisal.to(dtype).unsqueeze(-1)]
        attended = _attend(query, key, torch.cat([p, norms, *extra], -1))
        dim = p.shape[-1]
        centroids, energy = attended[..., :dim], attended[..., dim]

        ols = (z - centroids).square().sum(-1)
        # Rounding can leave a hard assignment a hair below zero.
        variance = (energy - centroids.square().sum(-1)).clamp(min=0.0)
        terms = _mean_terms(ols + variance, ols, variance, mask)
        entropy = None if surprisal is None else masked_mean(attended[..., dim + 1], mask)
        centroids = zero_padding(centroids + center, mask)
    return BankOutput(centroids.to(tokens.dtype), terms, None, entropy)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Unscaled attention of ``(..., N, e)`` queries; the fused kernels want four dimensions and aligned rows."""
    lead = query.shape[:-2]
    filled = (pad(x, (0, -x.shape[-1] % ROW_ALIGNMENT)) for x in (query, key, value))
    query, key, padded = (x.reshape(1, lead.numel(), *x.shape[-2:]) for x in filled)
    attended: Tensor = scaled_dot_product_attention(query, key, padded, scale=1.0)[..., : value.shape[-1]]
    return attended.reshape(*lead, *attended.shape[-2:])


def prototype_attention_reference(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    detach_assignments: bool = False,
    surprisal: Tensor | None = None,
) -> BankOutput:
    """Reference of :func:`prototype_attention`, written out plainly and with the assignments returned.

    Every term is computed from its own definition. It stores the ``N x K`` assignments, so it serves
    ``need_weights=True`` and the tests of the fused call.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Hold ``q`` constant in the backward pass (eq. 10).
        surprisal: ``(..., K)``, see :func:`prototype_attention`.

    Returns:
        Centroids, terms, weights and entropy.
    """
    check_shapes(tokens, prototypes, mask)
    dtype = accumulation_dtype(tokens, prototypes)
    with torch.autocast(tokens.device.type, enabled=False):
        center = prototypes.detach().to(dtype).mean(-2, keepdim=True)
        z = zero_padding(tokens.to(dtype) - center, mask)
        p = prototypes.to(dtype) - center
        weights = log_assign(z, p, temperature).exp()
        if detach_assignments:
            weights = weights.detach()
        centroids = weights @ p
        loss = (weights * _squared_distances(z, p)).sum(-1)
        ols = (z - centroids).square().sum(-1)
        variance = (weights * _squared_distances(centroids, p)).sum(-1)
        terms = _mean_terms(loss, ols, variance, mask)
        entropy = None
        if surprisal is not None:
            entropy = masked_mean((weights @ surprisal.to(dtype).unsqueeze(-1)).squeeze(-1), mask)
        centroids = zero_padding(centroids + center, mask)
    return BankOutput(centroids.to(tokens.dtype), terms, zero_padding(weights, mask), entropy)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``||x_n - y_k||^2`` as ``(..., N, K)``, by the expansion of the square: differentiable and cheap."""
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ y.mT).clamp(min=0.0)


def _mean_terms(loss: Tensor, ols: Tensor, variance: Tensor, mask: Tensor | None) -> Decomposition:
    return Decomposition(masked_mean(loss, mask), masked_mean(ols, mask), masked_mean(variance, mask))


@torch.no_grad()
def nearest_prototype(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Hard codes: the index of the nearest prototype, which is also the largest assignment at any temperature.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.

    Returns:
        ``(..., N)`` int64. Streamed over tokens: the ``N x K`` distances are never stored whole.
    """
    check_shapes(tokens, prototypes, None)
    dtype = accumulation_dtype(tokens, prototypes)
    center = prototypes.to(dtype).mean(-2, keepdim=True)
    p = prototypes.to(dtype) - center
    half_norms = 0.5 * p.square().sum(-1).unsqueeze(-2)
    codes = torch.empty(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        for rows in token_chunks(tokens.shape[-2], p[..., 0].numel()):
            z = tokens[..., rows, :].to(dtype) - center
            codes[..., rows] = (z @ p.mT - half_norms).argmax(-1)
    return codes


@torch.no_grad()
def sample_codes(tokens: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """One prototype per token, drawn from its soft assignment, so that the mean of ``p_code`` is the soft centroid.

    The draw is a race of exponential clocks with rates ``q_nk``, in log space (the Gumbel-max trick), from the global
    random state.

    Args:
        tokens: ``(..., N, d)``, finite at padding too.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.

    Returns:
        ``(..., N)`` int64. Streamed over tokens: the ``N x K`` assignments are never stored whole.
    """
    check_shapes(tokens, prototypes, None)
    dtype = accumulation_dtype(tokens, prototypes)
    p = prototypes.to(dtype)
    codes = torch.empty(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        for rows in token_chunks(tokens.shape[-2], p[..., 0].numel()):
            log_q = log_assign(tokens[..., rows, :].to(dtype), p, temperature)
            codes[..., rows] = (log_q - torch.empty_like(log_q).exponential_().log()).argmax(-1)
    return codes
