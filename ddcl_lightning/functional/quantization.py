"""Fused forward pass and analytic gradients of a quantizer: codes, losses, entropy and token means in two sweeps.

The derivation is in docs/fused-quantization.md. Notation: ``q_nk`` assignments, ``l_nk`` their logarithms up to a
constant of the token, ``c_n`` soft centroids, ``s_k`` the surprisal ``-ln M_k`` of the mean assignment M.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional._common import (
    accumulation_dtype,
    check_shapes,
    require_tokens,
    temperature_like,
    zero_padding,
)
from ddcl_lightning.functional.assignment import BankOutput, Decomposition
from ddcl_lightning.functional.token_statistics import TokenStatistics

BLOCK_ELEMENTS = 1 << 18  # entries of one N x K block: a megabyte stays in the cache from one operation to the next
STORED_ELEMENTS = 1 << 24  # 64 MiB: assignments up to this size are stored for the second sweep, others are redone
LOWEST_LOGIT = -80.0  # below it a weight is a denormal number, by which a CPU computes ten times as slowly
SMALLEST_MASS = 1e-20  # a prototype with less mass is summed again in log space, where nothing underflows


def quantize(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    detach_assignments: bool = False,
    total: Callable[[Tensor], Tensor] = lambda log_mass: log_mass,
) -> BankOutput:
    """Soft centroids without gradients, loss terms, hard codes, token means and the entropy of the mean assignment.

    For quantizers that pass gradients straight through: the decoder's gradient does not need the derivative of the
    centroids, so that the gradients of the two losses can be found on the way forward, from assignments that are in
    the cache, and no backward pass over them is left.

    Args:
        tokens: ``(..., N, d)``, any float dtype; half precisions are computed in float32.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Hold ``q`` constant in the backward pass (eq. 10); the entropy then has no gradient.
        total: From the logarithm of each prototype's mass on this process, ``(..., K)``, to that over all processes.

    Returns:
        ``terms.loss`` and ``entropy`` (nats) have gradients for tokens and prototypes; the rest has none. The entropy
        is ``-sum_k m_k ln M_k`` for the mean assignment m on this process and M over all, so that its mean over
        processes is the entropy of M.

    Raises:
        ValueError: If shapes do not fit, there is no token, or the temperature is not positive.
        TypeError: If tokens are not floating point or the mask is not boolean.
    """
    check_shapes(tokens, prototypes, mask)
    require_tokens(tokens)
    dtype = accumulation_dtype(tokens, prototypes)
    with torch.autocast(tokens.device.type, enabled=False):
        scale = temperature_like(temperature, prototypes.to(dtype))
        differentiable = torch.is_grad_enabled() and (tokens.requires_grad or prototypes.requires_grad)
        outputs = _FusedQuantization.apply(
            tokens.to(dtype), prototypes.to(dtype), scale, mask, differentiable and not detach_assignments, total
        )
    loss, entropy, ols, variance, centroids, codes, log_mass, means = outputs
    return BankOutput(
        centroids.to(tokens.dtype),
        Decomposition(loss, ols, variance),
        None,
        entropy,
        codes,
        TokenStatistics(log_mass, means),
    )


class _FusedQuantization(torch.autograd.Function):
    """Forward computes the gradients of the loss and of the entropy too; backward weighs them."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        prototypes: Tensor,
        temperature: Tensor,
        mask: Tensor | None,
        through_assignments: bool,
        total: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        center = prototypes.mean(-2, keepdim=True)
        problem = _Problem(zero_padding(tokens - center, mask), prototypes - center, temperature, mask)
        sums = _first_sweep(problem, through_assignments)
        log_mass, means = _token_means(problem, sums)

        # Loss terms (eq. 3).
        residual = problem.z - sums.centroids
        ols = residual.square().sum(-1, keepdim=True)
        variance = (sums.energy - sums.centroids.square().sum(-1, keepdim=True)).clamp_(min=0.0)
        count = problem.count.squeeze(-2)
        mean_ols, mean_variance = ((term * problem.valid).sum(-2) / count for term in (ols, variance))
        loss = mean_ols + mean_variance

        # Entropy of the mean assignment: its derivative by M_k is the surprisal, up to a constant.
        log_total = total(log_mass)
        surprisal = (log_total.logsumexp(-1, keepdim=True) - log_total).unsqueeze(-1)
        entropy = (log_mass.exp().unsqueeze(-1) * surprisal).sum(-2) / count

        gradients = (
            *_loss_gradients(problem, sums, residual),
            *_entropy_gradients(problem, sums, surprisal, through_assignments),
        )
        token_loss, prototype_loss, token_entropy, prototype_entropy = gradients
        ctx.save_for_backward(
            *(zero_padding(gradient, mask) / problem.count for gradient in (token_loss, token_entropy)),
            *(gradient / problem.count for gradient in (prototype_loss, prototype_entropy)),
        )
        terms = (mean_ols.squeeze(-1), mean_variance.squeeze(-1))
        outputs = (*terms, zero_padding(sums.centroids + center, mask), sums.codes, log_mass, means + center)
        ctx.mark_non_differentiable(*outputs)
        return loss.squeeze(-1), entropy.squeeze(-1), *outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        token_loss, token_entropy, prototype_loss, prototype_entropy = ctx.saved_tensors
        of_loss, of_entropy = (gradient.unsqueeze(-1).unsqueeze(-1) for gradient in upstream[:2])
        tokens = of_loss * token_loss + of_entropy * token_entropy
        prototypes = of_loss * prototype_loss + of_entropy * prototype_entropy
        return tokens, prototypes, None, None, None, None


class _Problem:
    """Centred tokens and prototypes in the form of one attention: query ``[z, 1]``, key ``[2 p, -||p||^2] / T``.

    Args:
        z: Tokens less the mean prototype, ``(..., N, d)``, zero at padding.
        p: Prototypes less their mean, ``(..., K, d)``.
        temperature: ``(..., 1, 1)``.
        mask: ``(..., N)`` boolean or None.
    """

    def __init__(self, z: Tensor, p: Tensor, temperature: Tensor, mask: Tensor | None) -> None:
        ones = torch.ones_like(z[..., :1])
        self.z, self.p, self.temperature = z, p, temperature
        self.norms = p.square().sum(-1, keepdim=True)
        self.valid = ones if mask is None else mask.unsqueeze(-1).to(z.dtype)
        self.count = self.valid.sum(-2, keepdim=True)
        self.query = torch.cat([z, ones], -1)
        self.key = (torch.cat([2 * p, -self.norms], -1) / temperature).mT
        self.num_tokens, self.num_prototypes, self.dim = z.shape[-2], p.shape[-2], p.shape[-1]
        self.num_heads = max(1, z[..., 0].numel() // max(1, self.num_tokens))

    def blocks(self) -> Iterator[slice]:
        """Rows of tokens whose assignments stay in the cache."""
        step = max(1, BLOCK_ELEMENTS // (self.num_prototypes * self.num_heads))
        return (slice(start, start + step) for start in range(0, max(1, self.num_tokens), step))

    def fits_in_memory(self) -> bool:
        """True if the assignments may be stored from the first sweep to the second."""
        return self.num_heads * self.num_tokens * self.num_prototypes <= STORED_ELEMENTS

    def logits(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Logits less their maximum ``(..., n, K)``, the maximum ``(..., n, 1)`` and its index ``(..., n)``."""
        logits = self.query[..., rows, :] @ self.key
        largest, codes = logits.max(-1, keepdim=True)
        return logits.sub_(largest), largest, codes.squeeze(-1)


class _Sums(NamedTuple):
    """Sums of the first sweep; ``q = weights / weight_sums``.

    Attributes:
        codes: Nearest prototype, ``(..., N)``.
        centroids: ``c_n = sum_k q_nk p_k``, ``(..., N, d)``.
        energy: ``sum_k q_nk ||p_k||^2``, ``(..., N, 1)``.
        slope: ``[sum_k q_nk l_nk p_k, b_n = sum_k q_nk l_nk]``, ``(..., N, d + 1)``; None without gradients through q.
        weight_sums: ``(..., N, 1)``.
        log_sums: Logarithm of the sums before the largest logit was taken out, ``(..., N, 1)``.
        tokens: ``[sum_n q_nk z_n, sum_n q_nk]``, ``(..., K, d + 1)``.
        sloped_tokens: The same weighted by ``b_n``, zero without gradients through q.
        logged_tokens: The same weighted by ``l_nk``, zero without gradients through q.
        weights: Those of every block, where they are stored.
    """

    codes: Tensor
    centroids: Tensor
    energy: Tensor
    slope: Tensor | None
    weight_sums: Tensor
    log_sums: Tensor
    tokens: Tensor
    sloped_tokens: Tensor
    logged_tokens: Tensor
    weights: list[Tensor]


def _first_sweep(problem: _Problem, through_assignments: bool) -> _Sums:
    """Sums over prototypes per token, and over tokens per prototype."""
    p, norms, dim, width = problem.p, problem.norms, problem.dim, problem.dim + 1
    value = torch.cat([p, norms, torch.ones_like(norms)], -1)
    store = through_assignments and problem.fits_in_memory()
    per_token, weight_sums, offsets, codes, stored = [], [], [], [], []
    per_prototype = p.new_zeros(*p.shape[:-1], 2 * width)
    logged_tokens = p.new_zeros(*p.shape[:-1], width)
    for rows in problem.blocks():
        logits, largest, nearest = problem.logits(rows)
        weights = logits.clamp(min=LOWEST_LOGIT).exp_()
        if store:
            stored.append(weights)
        attended = weights @ value
        weight_sum = attended[..., -1:]
        scaled_tokens = problem.query[..., rows, :] * (problem.valid[..., rows, :] / weight_sum)
        columns = [attended[..., :-1] / weight_sum]
        if through_assignments:
            logits.mul_(weights)
            slopes = logits @ torch.cat([p, torch.ones_like(norms)], -1) / weight_sum
            columns.append(slopes)
            logged_tokens += logits.mT @ scaled_tokens
            scaled_tokens = torch.cat([scaled_tokens, slopes[..., -1:] * scaled_tokens], -1)
        per_prototype[..., : scaled_tokens.shape[-1]] += weights.mT @ scaled_tokens
        per_token.append(torch.cat(columns, -1))
        weight_sums.append(weight_sum)
        offsets.append(largest)
        codes.append(nearest)
    of_tokens, all_sums = torch.cat(per_token, -2), torch.cat(weight_sums, -2)
    return _Sums(
        codes=torch.cat(codes, -1),
        centroids=of_tokens[..., :dim],
        energy=of_tokens[..., dim : dim + 1],
        slope=of_tokens[..., dim + 1 :] if through_assignments else None,
        weight_sums=all_sums,
        log_sums=torch.cat(offsets, -2) + all_sums.log(),
        tokens=per_prototype[..., :width],
        sloped_tokens=per_prototype[..., width:],
        logged_tokens=logged_tokens,
        weights=stored,
    )


def _loss_gradients(problem: _Problem, sums: _Sums, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss for tokens ``(..., N, d)`` and prototypes ``(..., K, d)``."""
    mass, tokens_sum = sums.tokens[..., -1:], sums.tokens[..., :-1]
    for_tokens, for_prototypes = 2 * residual, 2 * (mass * problem.p - tokens_sum)
    if sums.slope is not None:
        for_tokens -= 2 * (sums.slope[..., :-1] - sums.slope[..., -1:] * sums.centroids)
        sloped, logged = sums.sloped_tokens, sums.logged_tokens
        for_prototypes += 2 * (sloped[..., :-1] - logged[..., :-1] - (sloped[..., -1:] - logged[..., -1:]) * problem.p)
    return for_tokens, for_prototypes


def _entropy_gradients(
    problem: _Problem, sums: _Sums, surprisal: Tensor, through_assignments: bool
) -> tuple[Tensor, Tensor]:
    """The second sweep: gradients of the summed entropy for tokens and prototypes, zero where q is held constant."""
    p, factor = problem.p, 2 / problem.temperature
    if not through_assignments:
        return torch.zeros_like(problem.z), torch.zeros_like(p)
    value = torch.cat([surprisal * p, surprisal], -1)
    surprised_tokens = p.new_zeros(*p.shape[:-1], problem.dim + 1)
    per_token = []
    for number, rows in enumerate(problem.blocks()):
        weights = sums.weights[number] if sums.weights else problem.logits(rows)[0].clamp_(min=LOWEST_LOGIT).exp_()
        weight_sums = sums.weight_sums[..., rows, :]
        surprise = weights @ value / weight_sums  # [sum_k q s p, sum_k q s] of each token
        per_token.append(surprise)
        scaled_tokens = problem.query[..., rows, :] * (problem.valid[..., rows, :] / weight_sums * surprise[..., -1:])
        surprised_tokens += weights.mT @ scaled_tokens
    surprise = torch.cat(per_token, -2)
    mass, tokens_sum = sums.tokens[..., -1:], sums.tokens[..., :-1]
    for_tokens = factor * (surprise[..., :-1] - surprise[..., -1:] * sums.centroids)
    for_prototypes = factor * (
        surprisal * (tokens_sum - mass * p) - (surprised_tokens[..., :-1] - surprised_tokens[..., -1:] * p)
    )
    return for_tokens, for_prototypes


def _token_means(problem: _Problem, sums: _Sums) -> tuple[Tensor, Tensor]:
    """Logarithm of each prototype's mass ``(..., K)`` and its mean token ``(..., K, d)``, also where it underflows."""
    mass = sums.tokens[..., -1]
    log_mass, means = mass.log(), sums.tokens[..., :-1] / mass.unsqueeze(-1)
    underflows = mass < SMALLEST_MASS
    if bool(underflows.any()):
        _fill_in_log_space(problem, sums, underflows, log_mass, means)
    return log_mass, means


def _fill_in_log_space(problem: _Problem, sums: _Sums, chosen: Tensor, log_mass: Tensor, means: Tensor) -> None:
    """Overwrite mass and mean token of the chosen prototypes ``(..., K)``, in place, head by head."""

    def by_head(value: Tensor, dims: int) -> Tensor:
        return value.reshape(-1, *value.shape[-dims:])

    for head in range(problem.num_heads):
        points = by_head(problem.z, 2)[head]
        query, key = by_head(problem.query, 2)[head], by_head(problem.key, 2)[head]
        log_sums, padding = by_head(sums.log_sums, 2)[head], by_head(problem.valid, 2)[head] == 0
        indices = by_head(chosen, 1)[head].nonzero().squeeze(-1)
        for some in torch.split(indices, max(1, BLOCK_ELEMENTS // max(1, len(points)))):
            log_q = (query @ key[:, some] - log_sums).masked_fill(padding, -torch.inf)
            log_mass.view(-1, problem.num_prototypes)[head, some] = log_q.logsumexp(0)
            means.view(-1, *means.shape[-2:])[head, some] = log_q.softmax(0).T @ points
