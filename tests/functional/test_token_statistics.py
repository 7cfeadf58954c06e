"""Statistics of tokens add up, whatever the batches are."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import (
    TokenStatistics,
    cells_of,
    code_counts,
    moments_of,
    nearest_prototype,
    soft_assign,
    token_means,
)

TOKENS = torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROTOTYPES = 2 * torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) < 0.7


def statistics(rows: slice) -> TokenStatistics:
    tokens, mask = TOKENS[:, rows], MASK[:, rows]
    order = torch.arange(90)[rows]
    cells = cells_of(tokens, PROTOTYPES, nearest_prototype(tokens, PROTOTYPES), mask, order)
    return token_means(tokens, PROTOTYPES, 0.5, mask)._replace(cells=cells, moments=moments_of(tokens, mask))


def flat(value: TokenStatistics) -> list[Tensor]:
    assert value.cells is not None
    assert value.moments is not None
    return [value.log_mass, value.mean, *value.cells, *value.moments]


@pytest.mark.parametrize("cuts", [[30], [1, 2, 60], [89]])
def test_token_statistics_of_batches_merge_to_those_of_all_tokens(cuts: list[int]) -> None:
    bounds = [0, *cuts, 90]
    batches = [statistics(slice(start, end)) for start, end in pairwise(bounds)]
    total = batches[0]
    for batch in batches[1:]:
        total = total.merge(batch)
    for merged, whole in zip(flat(total), flat(statistics(slice(0, 90))), strict=True):
        torch.testing.assert_close(merged, whole)


def test_token_statistics_are_those_of_the_definition() -> None:
    weights = soft_assign(TOKENS, PROTOTYPES, 0.5) * MASK.unsqueeze(-1)
    mass = weights.sum(1)
    whole = statistics(slice(0, 90))
    torch.testing.assert_close(whole.log_mass, mass.log())
    torch.testing.assert_close(whole.mean, weights.mT @ TOKENS / mass.unsqueeze(-1))


def test_token_statistics_without_cells_merge_to_none() -> None:
    some = statistics(slice(0, 40))
    assert some.merge(some._replace(cells=None)).cells is None
    assert some.merge(some._replace(moments=None)).moments is None


def test_moments_are_those_of_the_valid_tokens_far_from_zero_too() -> None:
    number, mean, scatter = moments_of((TOKENS + 1e4).float().masked_fill(~MASK.unsqueeze(-1), torch.nan), MASK)
    for head in range(2):
        valid = TOKENS[head][MASK[head]]
        assert int(number[head]) == len(valid)
        torch.testing.assert_close(mean[head].double(), valid.mean(0) + 1e4, rtol=1e-6, atol=0)
        expected = valid.T.cov(correction=0) * len(valid)
        torch.testing.assert_close(scatter[head].double(), expected, rtol=2e-2, atol=0.5)


def test_token_statistics_of_a_call_that_is_not_finite_are_those_of_no_token() -> None:
    some, rest = statistics(slice(0, 40)), statistics(slice(40, 90))
    for poisoned in (
        rest.finite(torch.tensor([1.0, torch.nan])),
        rest._replace(mean=rest.mean.index_fill(1, torch.tensor(2), torch.inf)).finite(torch.tensor(1.0)),
    ):
        for merged, alone in zip(flat(some.merge(poisoned)), flat(some), strict=True):
            assert torch.equal(merged, alone)
    for clean, same in zip(flat(some.finite(torch.tensor(1.0))), flat(some), strict=True):
        assert torch.equal(clean, same)


def test_code_counts_leave_out_padding_of_both_kinds() -> None:
    codes = torch.tensor([[0, 2, 2, -1], [1, 1, 0, 2]])
    assert code_counts(codes, 4).tolist() == [[1, 0, 2, 0], [1, 2, 1, 0]]
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert code_counts(codes, 4, mask).tolist() == [[1, 0, 1, 0], [0, 0, 1, 0]]
