"""The sample is uniform, bounded, and the same for the same rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ddcl_lightning.reservoir import Reservoir


def feed(reservoir: Reservoir, rows: Tensor, sizes: list[int]) -> Tensor:
    for part in rows.split(sizes):
        reservoir.add(part)
    return reservoir.gather()


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 13, 40], [15, 45]])
def test_sample_is_uniform(sizes: list[int]) -> None:
    counts, rows, trials = np.zeros(60), torch.arange(60.0).unsqueeze(1), 2000
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
    assert reservoir.seen == 513
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


def test_refusals() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1 row; got 0"):
        Reservoir(0)
    with pytest.raises(ValueError, match="gave no valid token"):
        Reservoir(5).gather()
    empty = Reservoir(5)
    empty.add(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="gave no valid token"):
        empty.gather()


def _sample_on_two(rank: int, init_file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    try:
        reservoir, rows = Reservoir(40), torch.arange(60.0).unsqueeze(1)
        reservoir.add(rows[rank::2])
        few = Reservoir(40)
        if rank == 1:  # the other process has nothing to give
            few.add(rows[:3])
        torch.save((reservoir.gather(), few.gather()), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_one_sample(tmp_path: Path) -> None:
    mp.spawn(_sample_on_two, args=(str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    (first, few), (second, few_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert len(torch.unique(first)) == 40
    assert torch.equal(few, few_too)
    assert sorted(few.flatten().tolist()) == [0.0, 1.0, 2.0]
