"""The nearest of a stream are the nearest of all."""

import torch

from ddcl_lightning.explain.nearest import MembersFirst, Nearest


def test_nearest_of_a_stream_are_the_nearest_of_all_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 6, (3, 40), generator=generator).double()  # with ties
    order = torch.randperm(40, generator=generator)
    for size in (1, 7, 40):
        nearest: Nearest[int] = Nearest(3, 5)
        for rows in order.split(size):
            nearest.add(distances[:, rows], rows, lambda prototype, row, rows=rows: 100 * prototype + int(rows[row]))
        for prototype in range(3):
            expected = sorted(range(40), key=lambda n: (float(distances[prototype, n]), n))[:5]
            assert [kept - 100 * prototype for _, kept in nearest.of(prototype)] == expected
            assert [distance for distance, _ in nearest.of(prototype)] == [
                float(distances[prototype, n]) for n in expected
            ]


def test_nearest_shows_winners_only_and_leaves_out_infinite_distances() -> None:
    nearest: Nearest[int] = Nearest(1, 2)
    shown: list[int] = []

    def show(prototype: int, row: int) -> int:
        shown.append(row)
        return row

    nearest.add(torch.tensor([[3.0, 1.0, 2.0, torch.inf]]), torch.arange(4), show)
    assert [kept for _, kept in nearest.of(0)] == [1, 2]
    assert sorted(shown) == [1, 2]
    nearest.add(torch.tensor([[9.0]]), torch.tensor([9]), show)
    assert len(shown) == 2
    few: Nearest[int] = Nearest(1, 5)
    few.add(torch.tensor([[torch.inf, 1.0]]), torch.arange(2), show)
    assert few.of(0) == [(1.0, 1)]


def test_members_come_before_nearer_strangers() -> None:
    kept: MembersFirst[int] = MembersFirst(2, 2)
    distances = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    members = torch.tensor([[False, False, True], [False, False, False]])
    kept.add(distances, members, torch.arange(3), lambda prototype, row: row)
    assert kept.of(0) == [2]
    assert kept.of(1) == [0, 1]  # it has none, so the nearest of all
