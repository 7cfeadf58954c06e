"""Effective numbers against their definitions."""

import math

import pytest
import torch

from ddcl_lightning.functional import effective_number, effective_rank, nearest_codes


def test_effective_number_counts_what_is_shared_evenly() -> None:
    assert float(effective_number(torch.tensor([3, 3, 0, 3]))) == pytest.approx(3)
    assert float(effective_number(torch.tensor([0.5, 0.25, 0.25]))) == pytest.approx(2**1.5)
    assert torch.isnan(effective_number(torch.zeros(3)))
    assert effective_number(torch.ones(2, 5, dtype=torch.int64)).tolist() == pytest.approx([5, 5])


def test_effective_rank_is_the_entropy_of_singular_values() -> None:
    rows = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.linalg.svdvals(rows)
    share = share / share.sum(-1, keepdim=True)
    expected = torch.special.entr(share).sum(-1).exp()
    torch.testing.assert_close(effective_rank(rows), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(effective_rank(rows.mT), expected, rtol=1e-6, atol=0.0)


def test_effective_rank_of_vectors_that_are_one_is_one() -> None:
    point = torch.tensor([[1.0, 2.0, 3.0]]).expand(50, 3)
    assert float(effective_rank(point)) == pytest.approx(1, abs=1e-6)
    assert float(effective_rank(point + 1e-4 * torch.randn(50, 3))) == pytest.approx(1, abs=0.01)
    assert math.isnan(float(effective_rank(torch.zeros(4, 3))))


def test_effective_rank_leaves_padding_out() -> None:
    rows, mask = torch.randn(20, 4), torch.arange(20) < 12
    masked = torch.where(mask.unsqueeze(-1), rows, math.nan)
    torch.testing.assert_close(effective_rank(masked, mask), effective_rank(rows[:12]))


def test_nearest_codes_are_those_of_all_pairs() -> None:
    codes = torch.randn(30, 4)
    pairs = torch.cdist(codes.double(), codes.double()).fill_diagonal_(math.inf)
    distances, others = nearest_codes(codes)
    torch.testing.assert_close(distances, pairs.min(1).values)
    assert torch.equal(others, pairs.argmin(1))
    some, _ = nearest_codes(codes, torch.tensor([4, 9]))
    torch.testing.assert_close(some, distances[[4, 9]])
    assert math.isinf(float(nearest_codes(codes[:1])[0]))
