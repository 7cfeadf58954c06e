"""The test of one Gaussian against two clusters."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import split_test


def gaussian(size: int, dim: int, seed: int, stretch: float = 1.0) -> Tensor:
    z = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
    z[:, 0] *= stretch
    return z


def two(size: int, dim: int, gap: float, seed: int) -> Tensor:
    """Two spherical clusters, ``gap`` standard deviations apart."""
    z = gaussian(size, dim, seed)
    z[: size // 2, 0] += gap
    return z


@pytest.mark.parametrize("dim", [1, 4, 40])
def test_two_clusters_are_told_from_one_gaussian(dim: int) -> None:
    assert split_test(two(300, dim, 8.0, 0)).score > 5
    result = split_test(two(300, dim, 8.0, 0)).centers
    order = result[:, 0].argsort()
    expected = torch.zeros(2, dim)
    expected[1, 0] = 8.0
    torch.testing.assert_close(result[order], expected, atol=0.35, rtol=0)


@pytest.mark.parametrize("stretch", [1.0, 5.0])
def test_a_gaussian_is_split_as_rarely_as_the_level_says(stretch: float) -> None:
    """At 5 % of 60 Gaussians 3 are expected, and more than 9 in one of 800 runs; stretched ones are no exception."""
    scores = [split_test(gaussian(120, 5, seed, stretch), seed=seed).score for seed in range(60)]
    assert sum(score > NormalDist().inv_cdf(0.95) for score in scores) <= 9


def test_the_score_is_free_of_place_scale_and_direction() -> None:
    z = two(200, 3, 4.0, 1)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)))[0]
    moved = 1e-3 * z @ rotation + 7
    assert split_test(moved.double()).score == pytest.approx(split_test(z).score, abs=0.05)


def test_both_halves_need_their_tokens() -> None:
    z = gaussian(100, 2, 0)
    z[:3] += 100.0
    lonely = split_test(z, min_tokens=1)
    assert lonely.centers[:, 0].max() > 90
    assert split_test(z, min_tokens=10).score < lonely.score


@pytest.mark.parametrize("tokens", [torch.zeros(0, 3), torch.randn(15, 3), torch.ones(50, 3), 1e6 + torch.zeros(50, 3)])
def test_what_cannot_be_split_is_not(tokens: Tensor) -> None:
    result = split_test(tokens)
    assert result.score == -math.inf
    assert result.centers.shape == (2, 3)


def test_many_tokens_are_thinned_out_and_the_result_repeats() -> None:
    z = two(5000, 3, 6.0, 2)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    state = torch.get_rng_state()
    first, second = split_test(z, seed=3), split_test(z, seed=3)
    assert first.score == second.score > 5
    assert torch.equal(torch.get_rng_state(), state)


def test_split_test_refuses_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"min_tokens must be at least 1 .* got min_tokens = 0"):
        split_test(torch.randn(9, 2), min_tokens=0)
