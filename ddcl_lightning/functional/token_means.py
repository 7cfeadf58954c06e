"""Means of tokens under responsibilities normalised over tokens, and their sums over batches."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional._common import accumulation_dtype, check_shapes, token_chunks
from ddcl_lightning.functional.assignment import _log_assign


class TokenMeans(NamedTuple):
    """What each prototype's tokens look like, whatever their number.

    Attributes:
        log_mass: Logarithm of the tokens assigned to each prototype, ``ln sum_n q_nk``, ``(..., K)``; finite where the
            mass itself underflows.
        mean: ``sum_n w_kn z_n`` with ``w_kn = softmax_n(ln q_nk)``, ``(..., K, d)``.
    """

    log_mass: Tensor
    mean: Tensor


@torch.no_grad()
def token_means(tokens: Tensor, prototypes: Tensor, temperature: float | Tensor) -> TokenMeans:
    """Mass and mean token of every prototype under the assignments of eq. 2, streamed over tokens.

    The mean is the fixed point of the quantisation loss with assignments held constant; in log space a prototype that
    no token is near still has one, that of the tokens nearest to it.

    Args:
        tokens: ``(..., N, d)``, valid tokens only, N >= 1.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.

    Returns:
        Statistics in float32 or wider.
    """
    check_shapes(tokens, prototypes, None)
    dtype = accumulation_dtype(tokens, prototypes)
    p = prototypes.to(dtype)
    total = TokenMeans(p.new_full(p.shape[:-1], -torch.inf), torch.zeros_like(p))
    with torch.autocast(tokens.device.type, enabled=False):
        for part in token_chunks(tokens.shape[-2], p[..., 0].numel()):
            z = tokens[..., part, :].to(dtype)
            log_q = _log_assign(z, p, temperature).mT
            total = merge_token_means(total, TokenMeans(log_q.logsumexp(-1), log_q.softmax(-1) @ z))
    return total


def merge_token_means(first: TokenMeans, second: TokenMeans) -> TokenMeans:
    """Statistics of two sets of tokens together."""
    log_mass = torch.logaddexp(first.log_mass, second.log_mass)
    share = (second.log_mass - log_mass).exp().unsqueeze(-1)
    return TokenMeans(log_mass, torch.lerp(first.mean, second.mean, share))
