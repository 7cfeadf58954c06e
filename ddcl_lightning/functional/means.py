"""Means of tokens under responsibilities that are normalized over tokens."""

import torch
from torch import Tensor

from ddcl_lightning.functional._common import accumulation_dtype, check_shapes, token_chunks, zero_padding
from ddcl_lightning.functional.assignment import log_assign
from ddcl_lightning.functional.token_statistics import TokenStatistics


@torch.no_grad()
def token_means(
    tokens: Tensor, prototypes: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> TokenStatistics:
    """Mass and mean token of every prototype under the assignments of eq. 2, streamed over tokens.

    The mean is the fixed point of the quantization loss with assignments held constant; in log space a prototype that
    no token is near still has one, that of the tokens nearest to it.

    Args:
        tokens: ``(..., N, d)``.
        prototypes: ``(..., K, d)``.
        temperature: ``T > 0`` in units of squared distance; a float or one value per leading index, ``(...)``.
        mask: ``(..., N)`` boolean, True for valid tokens.

    Returns:
        Statistics in float32 or wider.
    """
    return _stream(tokens, prototypes, temperature, mask, None)


@torch.no_grad()
def assign_codes(
    tokens: Tensor, prototypes: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> tuple[Tensor, TokenStatistics]:
    """Hard codes ``(..., N)`` int64 and :func:`token_means` in one pass; the arguments are the same."""
    codes = torch.empty(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
    return codes, _stream(tokens, prototypes, temperature, mask, codes)


def _stream(
    tokens: Tensor, prototypes: Tensor, temperature: float | Tensor, mask: Tensor | None, codes: Tensor | None
) -> TokenStatistics:
    check_shapes(tokens, prototypes, mask)
    dtype = accumulation_dtype(tokens, prototypes)
    p = prototypes.to(dtype)
    total = TokenStatistics(p.new_full(p.shape[:-1], -torch.inf), torch.zeros_like(p))
    with torch.autocast(tokens.device.type, enabled=False):
        for chunk in token_chunks(tokens.shape[-2], p[..., 0].numel()):
            valid = None if mask is None else mask[..., chunk]
            z = zero_padding(tokens[..., chunk, :].to(dtype), valid)
            log_q = log_assign(z, p, temperature)
            if codes is not None:
                codes[..., chunk] = log_q.argmax(-1)
            if valid is not None:
                log_q = log_q.masked_fill(~valid.unsqueeze(-1), -torch.inf)
            log_mass = log_q.logsumexp(-2)
            # A part of the tokens without a valid one has no mean, and no weight in the total.
            shares = (log_q - log_mass.unsqueeze(-2).clamp(min=torch.finfo(dtype).min)).exp()
            total = total.merge(TokenStatistics(log_mass, shares.mT @ z))
    return total
