"""Collisions of semantic IDs: groups, running numbers and balanced codes, against written-out definitions."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import assign_balanced, disambiguate, group_tuples

IDS = torch.tensor([[1, 2], [0, 5], [1, 2], [1, 3], [1, 2], [0, 5]])


def test_groups_of_tuples_by_hand() -> None:
    tuples, group, counts = group_tuples(IDS)
    assert tuples.tolist() == [[0, 5], [1, 2], [1, 3]]
    assert group.tolist() == [1, 0, 1, 2, 1, 0]
    assert counts.tolist() == [2, 3, 1]


def test_running_numbers_follow_the_order_of_the_items() -> None:
    assert disambiguate(IDS).tolist() == [[1, 2, 0], [0, 5, 0], [1, 2, 1], [1, 3, 0], [1, 2, 2], [0, 5, 1]]
    assert len(disambiguate(torch.zeros(300, 2, dtype=torch.uint8)).unique(dim=0)) == 300  # beyond its own range
    assert disambiguate(IDS[:0]).shape == (0, 3)


def test_running_numbers_agree_with_a_counter_and_are_unique() -> None:
    ids = torch.randint(0, 4, (500, 3), generator=torch.Generator().manual_seed(0))
    counted: dict[tuple[int, ...], int] = {}
    expected = []
    for row in map(tuple, ids.tolist()):
        expected.append([*row, counted.get(row, 0)])
        counted[row] = expected[-1][-1] + 1
    told_apart = disambiguate(ids)
    assert told_apart.tolist() == expected
    assert len(torch.unique(told_apart, dim=0)) == 500


def test_padding_is_not_numbered() -> None:
    ids = torch.tensor([[-1, -1], [2, 2], [-1, -1], [2, -1]])
    assert disambiguate(ids).tolist() == [[-1, -1, -1], [2, 2, 0], [-1, -1, -1], [2, -1, -1]]


def least_cost(costs: Tensor, capacity: int) -> float:
    """Over all assignments in which no code is taken more often than its capacity."""
    choices = product(range(costs.shape[1]), repeat=len(costs))
    return min(
        float(costs[torch.arange(len(costs)), torch.tensor(codes)].sum())
        for codes in choices
        if max(codes.count(code) for code in codes) <= capacity
    )


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_balanced_codes_have_the_least_cost_of_all_assignments(capacity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 4):
        costs = torch.rand(size, 4, generator=generator, dtype=torch.float64)
        codes = assign_balanced(torch.zeros(size, 1, dtype=torch.int64), costs, capacity)[:, 1]
        assert int(codes.bincount().max()) <= capacity
        assert float(costs[torch.arange(size), codes].sum()) == pytest.approx(least_cost(costs, capacity))


def test_an_item_of_a_full_tuple_goes_to_the_code_where_that_costs_least() -> None:
    # Code 0 is the nearest of all; the second item loses least by code 1, the third least by code 2.
    costs = torch.tensor([[0.0, 9.0, 9.0], [0.1, 0.3, 5.0], [0.2, 5.0, 0.5]])
    assert assign_balanced(torch.zeros(3, 2, dtype=torch.int64), costs).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_prefixes_without_collisions_keep_their_nearest_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randint(0, 5, (60, 2), generator=generator)
    costs = torch.rand(60, 8, generator=generator)
    ids = assign_balanced(prefixes, costs)
    assert ids[:, :2].tolist() == prefixes.tolist()
    nearest = torch.cat([prefixes, costs.argmin(1, keepdim=True)], 1)
    crowded = {tuple(row[:2]) for row in nearest.tolist() if nearest.tolist().count(row) > 1}
    assert crowded
    for before, after in zip(nearest.tolist(), ids.tolist(), strict=True):
        assert before == after or tuple(before[:2]) in crowded
    assert len(torch.unique(ids, dim=0)) == 60


def test_a_prefix_without_room_is_shared_evenly() -> None:
    costs = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    ids = assign_balanced(torch.zeros(10, 1, dtype=torch.int64), costs)
    codes = ids[:, 1]
    assert sorted(codes.bincount().tolist()) == [2, 2, 3, 3]
    # No exchange of two items, and no move to a code of two items, costs less.
    for first in range(10):
        for second in range(first):
            now = costs[first, codes[first]] + costs[second, codes[second]]
            assert costs[first, codes[second]] + costs[second, codes[first]] >= now
        if int((codes == codes[first]).sum()) == 3:
            assert all(costs[first, code] >= costs[first, codes[first]] for code in range(4) if sum(codes == code) == 2)
    assert len(torch.unique(disambiguate(ids), dim=0)) == 10


def test_a_single_level_has_empty_prefixes() -> None:
    ids = assign_balanced(torch.zeros(3, 0, dtype=torch.int64), torch.tensor([[0.0, 1.0, 4.0]] * 3))
    assert sorted(ids[:, 0].tolist()) == [0, 1, 2]
    assert assign_balanced(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 3)).shape == (0, 3)


def test_balanced_codes_do_not_depend_on_numpy_or_torch_seeds() -> None:
    costs, prefixes = torch.rand(200, 16), torch.zeros(200, 1, dtype=torch.int64)
    first = assign_balanced(prefixes, costs, capacity=13)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(assign_balanced(prefixes, costs, capacity=13), first)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            torch.zeros(2, 2),
            TypeError,
            r"ids must be a tensor of integers; got a tensor \(2, 2\) of torch.float32\. Pass what",
        ),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"ids must have shape \(N, L\).*; got \(2,\)\. Flatten"),
        (torch.tensor([[-2]]), ValueError, "ids must be at least -1; got -2"),
    ],
)
def test_what_is_no_id_is_refused(ids: Tensor, error: type[Exception], message: str) -> None:
    for function in (disambiguate, group_tuples):
        with pytest.raises(error, match=message):
            function(ids)


def test_costs_that_do_not_fit_are_refused() -> None:
    prefixes = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"costs must have shape \(N, K\) = \(2, K\).*; got \(3, 4\)"):
        assign_balanced(prefixes, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="costs must be finite; got NaN"):
        assign_balanced(prefixes, torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        assign_balanced(prefixes, torch.zeros(2, 4), capacity=0)
    with pytest.raises(ValueError, match="prefixes must be at least 0; got -1"):
        assign_balanced(prefixes - 1, torch.zeros(2, 4))
