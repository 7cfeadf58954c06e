"""Everything that a quantiser wants from its assignments, and all gradients, in one look at them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddcl_lightning.functional._common import (
    accumulation_dtype,
    check_shapes,
    require_tokens,
    temperature_like,
    zero_padding,
)
from ddcl_lightning.functional.assignment import BankOutput, Decomposition, TokenMeans

BLOCK_ELEMENTS = 1 << 18  # entries of one N x K block: a megabyte stays in the cache from one operation to the next
KEPT_ELEMENTS = 1 << 24  # assignments up to this size (64 MiB) are kept for the second sweep, larger ones are redone
STARVED = 1e-20  # a prototype with less mass is summed again in log space, where nothing underflows


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

    For quantisers that pass gradients straight through: the decoder's gradient does not need the derivative of the
    centroids, so that the gradients of the two losses can be found on the way forward, from assignments that are in
    the cache, and no backward pass over them is left.

    Args:
        tokens: ``(..., N, d)``, any float dtype; half precisions are computed in float32.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Hold ``q`` constant in the backward pass (eq. 10); the entropy then has no gradient.
        total: From the logarithm of each prototype's mass here, ``(..., K)``, to that over all processes.

    Returns:
        ``terms.loss`` and ``cost``, the entropy in nats, have gradients for tokens and prototypes; the rest has none.
        The cost is ``-sum_k m_k ln M_k`` for the mean assignment m here and M over all processes, so that its mean over
        processes is the entropy.

    Raises:
        ValueError: If shapes do not fit, there is no token, or the temperature is not positive.
        TypeError: If tokens are not floating point or the mask is not boolean.
    """
    check_shapes(tokens, prototypes, mask)
    require_tokens(tokens)
    dtype = accumulation_dtype(tokens, prototypes)
    with torch.autocast(tokens.device.type, enabled=False):
        scale = temperature_like(temperature, prototypes.to(dtype))
        wanted = torch.is_grad_enabled() and (tokens.requires_grad or prototypes.requires_grad)
        through_q = wanted and not detach_assignments
        found = _Quantize.apply(tokens.to(dtype), prototypes.to(dtype), scale, mask, through_q, total)
    loss, cost, ols, variance, centroids, codes, log_mass, means = found
    return BankOutput(
        centroids.to(tokens.dtype),
        Decomposition(loss, ols, variance),
        None,
        cost,
        codes,
        TokenMeans(log_mass, means),
    )


class _Quantize(torch.autograd.Function):
    """Forward computes the gradients of ``loss`` and ``cost`` too; backward weighs them."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        prototypes: Tensor,
        temperature: Tensor,
        mask: Tensor | None,
        through_q: bool,
        total: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        center = prototypes.mean(-2, keepdim=True)
        z, p = zero_padding(tokens - center, mask), prototypes - center
        ones, norms = torch.ones_like(z[..., :1]), p.square().sum(-1, keepdim=True)
        valid = ones if mask is None else mask.unsqueeze(-1).to(z.dtype)
        count = valid.sum(-2, keepdim=True)
        query = torch.cat([z, ones], -1)
        key = (torch.cat([2 * p, -norms], -1) / temperature).mT
        value = torch.cat([p, norms, torch.ones_like(norms)], -1)
        dim, size = p.shape[-1], p.shape[-2]

        num_tokens = z.shape[-2]
        heads = max(1, z[..., 0].numel() // max(1, num_tokens))
        step = max(1, BLOCK_ELEMENTS // (size * heads))
        blocks = [slice(start, start + step) for start in range(0, max(1, num_tokens), step)]
        keep = through_q and heads * num_tokens * size <= KEPT_ELEMENTS
        kept: list[Tensor] = []

        def relative(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Logits less their largest, that one, and where it is: ``(..., n, K)``, ``(..., n, 1)``, ``(..., n)``."""
            logits = query[..., rows, :] @ key
            largest, where = logits.max(-1, keepdim=True)
            return logits.sub_(largest), largest, where.squeeze(-1)

        # q = weights / sums. Sums over prototypes per token; over tokens per prototype: sum_n q_nk u_n [z_n, 1].
        per_token, sums, offset, codes = [], [], [], []
        wide = dim + 1
        per_prototype = z.new_zeros(*p.shape[:-1], 2 * wide)  # for u = 1 and u = b
        weighted = z.new_zeros(*p.shape[:-1], wide)  # of q l instead of q
        for rows in blocks:
            logits, largest, where = relative(rows)
            weights = logits.exp()
            if keep:
                kept.append(weights)
            attended = weights @ value
            total_weight = attended[..., -1:]
            shares = query[..., rows, :] * (valid[..., rows, :] / total_weight)
            columns = [attended[..., :-1] / total_weight]
            if through_q:
                # b = sum_k q l, and sum_k q l p; l is the logarithm of q up to a constant of the token.
                logits.mul_(weights)
                slopes = logits @ torch.cat([p, torch.ones_like(norms)], -1) / total_weight
                columns.append(slopes)
                weighted += logits.mT @ shares
                shares = torch.cat([shares, slopes[..., -1:] * shares], -1)
            per_prototype[..., : shares.shape[-1]] += weights.mT @ shares
            per_token.append(torch.cat(columns, -1))
            sums.append(total_weight)
            offset.append(largest)
            codes.append(where)
        found = torch.cat(per_token, -2)
        total_weights, offsets = torch.cat(sums, -2), torch.cat(offset, -2)
        centroids, energy = found[..., :dim], found[..., dim : dim + 1]
        mass, tokens_sum = per_prototype[..., dim:wide], per_prototype[..., :dim]

        log_mass, means = mass.squeeze(-1).log(), tokens_sum / mass
        starved = mass.squeeze(-1) < STARVED
        if bool(starved.any()):
            _feed(log_mass, means, starved, z, query, key, offsets + total_weights.log(), valid)

        # Loss terms (eq. 3).
        error = z - centroids
        ols = error.square().sum(-1, keepdim=True)
        variance = (energy - centroids.square().sum(-1, keepdim=True)).clamp_(min=0.0)
        mean_ols, mean_variance = ((term * valid).sum(-2) / count.squeeze(-2) for term in (ols, variance))
        loss = mean_ols + mean_variance

        # Entropy of the mean assignment: a_k = -ln M_k is its derivative, up to a constant.
        everywhere = total(log_mass)
        price = (everywhere.logsumexp(-1, keepdim=True) - everywhere).unsqueeze(-1)
        cost = (log_mass.exp().unsqueeze(-1) * price).sum(-2) / count.squeeze(-2)

        token_loss, token_cost = 2 * error, torch.zeros_like(error)
        prototype_loss, prototype_cost = 2 * (mass * p - tokens_sum), torch.zeros_like(p)
        if through_q:
            slope = found[..., dim + 1 :]
            token_loss -= 2 * (slope[..., :-1] - slope[..., -1:] * centroids)
            pull, reach = per_prototype[..., wide:], weighted
            prototype_loss += 2 * (pull[..., :-1] - reach[..., :-1] - (pull[..., -1:] - reach[..., -1:]) * p)
            priced = torch.cat([price * p, price], -1)
            charged = z.new_zeros(*p.shape[:-1], wide)
            paid = []
            for number, rows in enumerate(blocks):
                weights = kept[number] if keep else relative(rows)[0].exp_()
                part = weights @ priced / total_weights[..., rows, :]
                paid.append(part)
                shares = query[..., rows, :] * (valid[..., rows, :] / total_weights[..., rows, :] * part[..., -1:])
                charged += weights.mT @ shares
            costs = torch.cat(paid, -2)
            token_cost = (2 / temperature) * (costs[..., :-1] - costs[..., -1:] * centroids)
            prototype_cost = (2 / temperature) * (
                price * (tokens_sum - mass * p) - (charged[..., :-1] - charged[..., -1:] * p)
            )
        ctx.save_for_backward(
            *(zero_padding(part, mask) / count for part in (token_loss, token_cost)),
            *(part / count for part in (prototype_loss, prototype_cost)),
        )
        terms = (mean_ols.squeeze(-1), mean_variance.squeeze(-1))
        outputs = (*terms, zero_padding(centroids + center, mask), torch.cat(codes, -1), log_mass, means + center)
        ctx.mark_non_differentiable(*outputs)
        return loss.squeeze(-1), cost.squeeze(-1), *outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        token_loss, token_cost, prototype_loss, prototype_cost = ctx.saved_tensors
        of_loss, of_cost = (gradient.unsqueeze(-1).unsqueeze(-1) for gradient in upstream[:2])
        tokens = of_loss * token_loss + of_cost * token_cost
        prototypes = of_loss * prototype_loss + of_cost * prototype_cost
        return tokens, prototypes, None, None, None, None


def _feed(
    log_mass: Tensor,
    means: Tensor,
    starved: Tensor,
    z: Tensor,
    query: Tensor,
    key: Tensor,
    log_sums: Tensor,
    valid: Tensor,
) -> None:
    """Fill in the mass and the mean token of starved prototypes, in log space, in place."""
    size = key.shape[-1]
    parts = zip(
        log_mass.view(-1, size),
        means.view(-1, *means.shape[-2:]),
        starved.reshape(-1, size),
        z.reshape(-1, *z.shape[-2:]),
        query.reshape(-1, *query.shape[-2:]),
        key.reshape(-1, *key.shape[-2:]),
        log_sums.reshape(-1, *log_sums.shape[-2:]),
        valid.reshape(-1, *valid.shape[-2:]),
        strict=True,
    )
    for masses, centers, hungry, points, asking, keys, totals, counted in parts:
        for some in hungry.nonzero().squeeze(-1).split(max(1, BLOCK_ELEMENTS // max(1, len(points)))):
            log_q = (asking @ keys[:, some] - totals).masked_fill(counted == 0, -torch.inf)
            masses[some] = log_q.logsumexp(0)
            centers[some] = log_q.softmax(0).T @ points
