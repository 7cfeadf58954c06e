"""How many directions or codes are in use, in effect: exponentials of entropies; and how far apart codes are."""

import torch
from torch import Tensor

from ddcl_lightning.functional._common import require_finite_tokens, token_chunks, zero_padding


def effective_number(weights: Tensor) -> Tensor:
    """Exponential of the entropy (in nats) of non-negative weights: how many of them share the whole, in effect.

    Of the tokens on each code it is the perplexity of a codebook.

    Args:
        weights: ``(..., K)`` of any dtype; they need not sum to 1.

    Returns:
        ``(...)`` float64 or the dtype of the weights, in [1, K]; NaN where all weights are zero.
    """
    mass = weights if weights.is_floating_point() else weights.to(torch.float64)
    entropy: Tensor = torch.special.entr(mass / mass.sum(-1, keepdim=True)).sum(-1)
    return entropy.exp()


@torch.no_grad()
def effective_rank(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Effective rank of vectors (RankMe, Garrido et al. 2023, eq. 1), in float64.

    The exponential of the entropy of the singular values of the vectors, normalised to sum to 1. Nothing is subtracted
    first, so that vectors which have become one have rank 1.

    Args:
        rows: Tokens or codes, ``(..., N, d)``, finite where valid.
        mask: ``(..., N)`` boolean, True for valid rows.

    Returns:
        ``(...)`` float64 in [1, min(N, d)]; NaN where all rows are zero.

    Raises:
        ValueError: If a valid row is not finite.
    """
    values = zero_padding(rows.detach().to(torch.float64), mask)
    require_finite_tokens(values)
    gram = values.mT @ values if values.shape[-1] <= values.shape[-2] else values @ values.mT
    return effective_number(torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt())


@torch.no_grad()
def nearest_codes(codebook: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance of codes to the nearest other code, and which one that is, by rows, so that large codebooks fit.

    Args:
        codebook: ``(K, d)``.
        rows: Indices of the codes to look at, ``(M,)``; by default all.

    Returns:
        Distances ``(M,)`` in float64, infinite for a single code, and indices ``(M,)`` int64.
    """
    codes = codebook.detach().to(torch.float64)
    rows = torch.arange(len(codes), device=codes.device) if rows is None else rows
    others = [
        torch.cdist(codes[rows[chunk]], codes, compute_mode="use_mm_for_euclid_dist")
        .scatter(1, rows[chunk].unsqueeze(1), torch.inf)
        .argmin(1)
        for chunk in token_chunks(len(rows), len(codes))
    ]
    nearest = torch.cat(others)
    # A matrix product finds them, and their distance is then exact: that of equal codes is zero.
    distances = (codes[rows] - codes[nearest]).norm(dim=-1)
    return distances.masked_fill(rows == nearest, torch.inf), nearest
