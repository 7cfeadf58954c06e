"""The sample is uniform, bounded, and the same for the same rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ddcl_lightning._utils.reservoir import Reservoir, evenly_spaced


def feed(reservoir: Reservoir, rows: Tensor, sizes: list[int]) -> Tensor:
    for chunk in rows.split(sizes):
        reservoir.add(chunk)
    return reservoir.gather()


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 13, 40], [15, 45]])
def test_sample_is_uniform(sizes: list[int]) -> None:
    counts, rows, trials = np.zeros(60), torch.arange(60.0).unsqueeze(1), 600
    for seed in range(trials):
        counts[feed(Reservoir(15, seed), rows, sizes).flatten().long().numpy()] += 1
    assert counts.sum() == 15 * trials
    expected = trials * 15 / 60
    chi_square = ((counts - expected) ** 2 / (expected * (1 - 15 / 60))).sum() * 59 / 60
    assert chi_square < 98  # 0.1 % of the distribution with 59 degrees of freedom lies beyond


def test_keeps_everything_that_fits() -> None:
    rows = torch.randn(50, 3)
    kept = feed(Reservoir(50), rows, [20, 30])
    assert torch.equal(torch.unique(kept, dim=0), torch.unique(rows, dim=0))


def test_never_keeps_more_than_its_capacity() -> None:
    reservoir = Reservoir(10)
    for size in (3, 3, 3, 3, 500, 0, 1):
        reservoir.add(torch.randn(size, 2))
        assert reservoir.gather().shape[0] <= 10
    assert reservoir.num_rows == 513
    assert reservoir.gather().shape == (10, 2)


def test_rows_of_a_batch_that_draw_the_same_slot() -> None:
    # 1,000 rows for two slots: nearly every kept one is overwritten again within the same call.
    lasts = [feed(Reservoir(2, seed), torch.arange(1000.0).unsqueeze(1), [2, 998]) for seed in range(300)]
    sample = torch.cat(lasts).flatten()
    assert float(sample.mean()) == pytest.approx(499.5, abs=60)  # first winners would sit near 0
    assert all(len(torch.unique(last)) == 2 for last in lasts)


def test_order_does_not_depend_on_arrival() -> None:
    rows = torch.randn(40, 2, 3)
    first = feed(Reservoir(40), rows, [40])
    second = feed(Reservoir(40), rows[torch.randperm(40)], [10, 30])
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_keeps_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = torch.randint(0, 200, (30, *shape)).to(dtype)
    kept = feed(Reservoir(20), rows, [30])
    assert kept.shape == (20, *shape)
    assert kept.dtype == dtype


def test_rows_are_copies() -> None:
    rows = torch.zeros(5, 2, requires_grad=True)
    reservoir = Reservoir(9)
    reservoir.add(rows)
    with torch.no_grad():
        rows += 1
    assert not reservoir.gather().any()
    assert not reservoir.gather().requires_grad


def test_reservoir_refuses_a_capacity_of_zero_and_a_sample_without_rows() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1 row; got 0"):
        Reservoir(0)
    with pytest.raises(ValueError, match="gave no valid token"):
        Reservoir(5).gather()
    empty = Reservoir(5)
    empty.add(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="gave no valid token"):
        empty.gather()


def test_rows_that_a_mask_leaves_out_are_not_sampled() -> None:
    tokens, mask = torch.arange(12.0).view(2, 3, 2), torch.tensor([[True, False, True], [False, True, False]])
    reservoir = Reservoir(10)
    reservoir.add(tokens, mask)
    assert sorted(reservoir.gather().tolist()) == [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]


def test_evenly_spaced_rows_begin_and_end_with_those_of_the_tensor() -> None:
    rows = torch.arange(10)
    assert evenly_spaced(rows, 4).tolist() == [0, 3, 6, 9]
    assert torch.equal(evenly_spaced(rows, 20), rows)
    assert evenly_spaced(rows.view(5, 2), 2).tolist() == [[0, 1], [8, 9]]
    assert evenly_spaced(rows[:1], 3).tolist() == [0]
