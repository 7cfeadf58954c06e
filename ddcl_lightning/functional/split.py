"""A test of whether the tokens of a prototype are two clusters or one Gaussian.

Two means are found and the share of the variance that they explain is held against that of Gaussian samples of the same
size and covariance (the cluster index of SigClust; Liu, Hayes, Nobel and Marron, JASA 103, 2008). Two means explain
0.64 of the variance along one direction even of a Gaussian, so the share itself says nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning._utils.seeding import check_seed
from ddcl_lightning.functional._common import require_finite_tokens, token_chunks

MAX_TOKENS = 1024  # with more, ever smaller departures from a Gaussian become significant
MAX_DIMENSIONS = 32  # leading principal directions of the tokens in which the test runs
NUM_NULLS = 100
STARTS = 3  # two means are started along as many leading directions; one of them may cut a cluster in half
ITERATIONS = 12


class SplitTest(NamedTuple):
    """Result of :func:`split_test`.

    Attributes:
        score: Standard deviations by which two means explain more than they do of a Gaussian; minus infinity where no
            admissible split exists.
        centers: The two means, ``(2, d)``, in the dtype of the tokens.
    """

    score: float
    centers: Tensor


@torch.no_grad()
def split_test(tokens: Tensor, *, min_tokens: int = 8, seed: int = 0, num_nulls: int = NUM_NULLS) -> SplitTest:
    """Test two clusters against one Gaussian.

    Args:
        tokens: ``(N, d)``; of more than 1,024 every n-th is used, in their 32 leading principal directions.
        min_tokens: Tokens that each of the two must hold, at least 1, of the N.
        seed: Seed of the Gaussian samples, in [0, 2**32); equal tokens give equal scores.
        num_nulls: Gaussian samples, at least 2.

    Returns:
        Score and means. Compare the score with a quantile of the normal distribution: 2.33 is a chance of 1 %.

    Raises:
        ValueError: If an argument is out of its range, or tokens are not finite.
    """
    if min_tokens < 1 or num_nulls < 2:
        raise ValueError(
            f"min_tokens must be at least 1 and num_nulls at least 2; got min_tokens = {min_tokens}, num_nulls = "
            f"{num_nulls}. Raise them."
        )
    check_seed("seed", seed)
    size, dim = tokens.shape
    nothing = SplitTest(-math.inf, tokens[:1].repeat(2, 1) if size else tokens.new_zeros(2, dim))
    if size < 2 * min_tokens:
        return nothing
    step = math.ceil(size / MAX_TOKENS)
    z = tokens[::step].to("cpu", torch.float64)
    require_finite_tokens(z)
    mean = z.mean(0)
    _, spread, directions = torch.linalg.svd(z - mean, full_matrices=False)
    directions, spread = directions[:MAX_DIMENSIONS], spread[:MAX_DIMENSIONS] / len(z) ** 0.5
    if not float(spread[0]) > 1e-9 * (1 + float(mean.abs().max())):
        return nothing  # copies of one token
    share, centers = _two_means(((z - mean) @ directions.mT).unsqueeze(0), math.ceil(min_tokens / step))
    if not float(share) > 0:
        return nothing
    generator = torch.Generator().manual_seed(seed)
    nulls = []
    for chunk in token_chunks(num_nulls, 4 * z.shape[0] * len(spread)):
        shape = (chunk.stop - chunk.start, len(z), len(spread))
        sample = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        nulls.append(_two_means(sample - sample.mean(1, keepdim=True), 1)[0])
    null = torch.cat(nulls)
    score = float((share - null.mean()) / null.std().clamp(min=1e-12))
    centers_in_space = mean + centers[0] @ directions
    # Their order must not depend on the sign of a direction, which rounding decides.
    fixed = torch.randn(dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return SplitTest(score, centers_in_space[(centers_in_space @ fixed).argsort()].to(tokens))


def _two_means(z: Tensor, min_tokens: int) -> tuple[Tensor, Tensor]:
    """Largest share of the variance of centred ``(S, N, d)`` that two means explain, ``(S,)``, and they, ``(S, 2, d)``.

    The share is 0 where none of the starts leaves ``min_tokens`` to both.
    """
    samples, size, dim = z.shape
    covariance = z.mT @ z / size
    variance = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    _, vectors = torch.linalg.eigh(covariance)
    best, centers = z.new_zeros(samples), z.new_zeros(samples, 2, dim)
    for start in range(min(STARTS, dim)):
        upper = z @ vectors[..., -1 - start, None] > 0
        for _ in range(ITERATIONS):
            means, _ = _means(z, upper)
            normal = (means[:, 1] - means[:, 0]).unsqueeze(-1)
            latest = z @ normal > means.sum(1, keepdim=True) @ normal / 2
            if torch.equal(latest, upper):
                break
            upper = latest
        means, count = _means(z, upper)
        between = count[:, 0] * count[:, 1] / size**2 * (means[:, 1] - means[:, 0]).square().sum(-1)
        share = torch.where(count.amin(-1) >= min_tokens, between / variance, 0.0)
        better = share > best
        best = torch.where(better, share, best)
        centers = torch.where(better[:, None, None], means, centers)
    return best, centers


def _means(z: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``(S, 2, d)`` and counts ``(S, 2)`` of the two sides of centred ``(S, N, d)``."""
    above = upper.mT.to(z.dtype)
    count = above.sum(-1)
    count = torch.cat([z.shape[1] - count, count], -1)
    total = above @ z
    return torch.cat([-total, total], 1) / count.clamp(min=1.0).unsqueeze(-1), count
