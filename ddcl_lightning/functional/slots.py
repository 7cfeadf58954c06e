"""Summaries of a sample, one per prototype: responsibilities normalized over tokens."""

import torch
from torch import Tensor

from ddcl_lightning.functional._common import accumulation_dtype, check_shapes, zero_padding
from ddcl_lightning.functional.assignment import log_assign


def prototype_slots(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    *,
    detach_assignments: bool = False,
    values: Tensor | None = None,
) -> Tensor:
    """Mean of a sample's tokens as each prototype sees it: ``s_k = sum_n w_kn z_n``, ``w_kn = softmax_n(log q_nk)``.

    The assignments ``q`` (eq. 2) say which prototypes a token belongs to; normalized over tokens instead they say
    which tokens belong to a prototype, whatever its share of the sample. It is the read-out of one iteration of
    slot attention (Locatello et al. 2020, Algorithm 1, lines 7 and 8) with distances to prototypes as its logits, in
    log space: a prototype that no token is near still gets the tokens nearest to it, not 0 / 0.

    Args:
        tokens: ``(..., N, d)``, the tokens of one sample in the last two dimensions.
        prototypes: ``(..., K, d)``; leading dimensions broadcast against those of the tokens.
        temperature: ``T > 0`` in units of squared distance; a float, or a tensor that broadcasts to the leading
            dimensions.
        mask: ``(..., N)`` boolean, True for valid tokens.
        detach_assignments: Hold ``w`` constant in the backward pass; the prototypes then get no gradient from here.
        values: ``(..., N, e)``, what to average; by default the tokens themselves. Leading dimensions broadcast.

    Returns:
        ``(..., K, d)``, or ``(..., K, e)`` of the values, float32 or wider; NaN where a sample has no valid token.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
        TypeError: If tokens are not floating point or the mask is not boolean.
    """
    prototypes = prototypes.expand(*tokens.shape[:-2], *prototypes.shape[-2:])
    check_shapes(tokens, prototypes, mask)
    dtype = accumulation_dtype(tokens, prototypes)
    with torch.autocast(tokens.device.type, enabled=False):
        z = zero_padding(tokens.to(dtype), mask)
        averaged = z if values is None else values.to(dtype)
        logits = log_assign(z, prototypes.to(dtype), temperature)
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        weights = logits.softmax(-2)
        if detach_assignments:
            weights = weights.detach()
        return weights.mT @ averaged
