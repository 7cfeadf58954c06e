"""Collisions, use of the codes and error of semantic IDs, against written-out definitions."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddcl_lightning import SemanticIDMetrics
from ddcl_lightning.metrics.semantic_id_metrics import colliding_share, conditional_perplexity
from tests.processes import results_of_processes

# Six items: one ID of three, one of two, one of its own.
IDS = torch.tensor([[1, 2], [0, 3], [1, 2], [1, 3], [1, 2], [0, 3]])


def computed(metric: SemanticIDMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def test_metrics_of_ids_by_hand() -> None:
    metric = SemanticIDMetrics(4, 2)
    metric.update(IDS)
    values = computed(metric)
    assert math.isnan(values.pop("relative_error"))
    first = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    in_one = math.exp(-(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)))
    assert values == pytest.approx(
        {
            "items": 6,
            "collisions": 5 / 6,
            "distinct_ids": 3,
            "largest_group": 3,
            "level1_usage": 2 / 4,
            "level1_perplexity": first,
            "level2_usage": 2 / 4,
            "level2_perplexity": 2.0,
            # Prefix 1 has four items, prefix 0 two items of a single code.
            "level2_conditional_perplexity": 4 / 6 * in_one + 2 / 6 * 1.0,
        }
    )


def test_metrics_agree_with_counters_on_random_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (400, 3), generator=generator)
    rows = [tuple(row) for row in ids.tolist()]
    counts = Counter(rows)
    metric = SemanticIDMetrics(8, 3)
    for piece in ids.split(37):
        metric.update(piece)
    values = computed(metric)
    assert values["collisions"] == pytest.approx(sum(counts[row] > 1 for row in rows) / 400)
    assert values["distinct_ids"] == len(counts)
    assert values["largest_group"] == max(counts.values())
    for level in range(3):
        assert values[f"level{level + 1}_usage"] == pytest.approx(len({row[level] for row in rows}) / 8)
        mean = 0.0
        for prefix, size in Counter(row[:level] for row in rows).items():
            codes = Counter(row[level] for row in rows if row[:level] == prefix)
            entropy = -sum(n / size * math.log(n / size) for n in codes.values())
            mean += size / 400 * math.exp(entropy)
        assert float(conditional_perplexity(ids, level, 8)) == pytest.approx(mean)
        name = f"level{level + 1}_conditional_perplexity" if level else "level1_perplexity"
        assert values[name] == pytest.approx(mean)


def test_shares_of_collisions_by_hand() -> None:
    assert float(colliding_share(torch.tensor([1, 1, 1]))) == 0.0
    assert float(colliding_share(torch.tensor([4]))) == 1.0
    assert float(colliding_share(torch.tensor([1, 3, 2]))) == pytest.approx(5 / 6)


def test_relative_error_is_the_squared_error_over_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = 1000 + torch.randn(50, 3, generator=generator)
    decoded = vectors + 0.5 * torch.randn(50, 3, generator=generator)
    metric = SemanticIDMetrics(4, 2)
    ids = torch.randint(0, 4, (50, 2), generator=generator)
    for piece, x, y in zip(ids.split(7), vectors.split(7), decoded.split(7), strict=True):
        metric.update(piece, x, y)
    exact = vectors.double()
    expected = (exact - decoded.double()).square().sum() / (exact - exact.mean(0)).square().sum()
    assert computed(metric)["relative_error"] == pytest.approx(float(expected), rel=1e-4)
    # The mean in the place of every vector has an error of 1.
    metric.reset()
    metric.update(ids, vectors, vectors.mean(0).expand(50, 3))
    assert computed(metric)["relative_error"] == pytest.approx(1.0, rel=1e-4)


def test_padding_counts_nowhere() -> None:
    ids = torch.cat([IDS, torch.full((2, 2), -1)]).reshape(2, 4, 2)
    vectors = torch.randn(2, 4, 3)
    decoded = vectors.clone()
    vectors[1, 2:] = torch.nan
    metric = SemanticIDMetrics(4, 2)
    metric.update(ids, vectors, decoded)
    values = computed(metric)
    assert (values["items"], values["relative_error"]) == (6, 0.0)
    assert values["collisions"] == pytest.approx(5 / 6)


def test_items_with_one_index_count_once() -> None:
    metric = SemanticIDMetrics(4, 2)
    metric.update(IDS[:4], index=torch.tensor([7, 3, 7, 5]))
    metric.update(IDS[4:], index=torch.tensor([3, 9]))
    values = computed(metric)
    assert values["items"] == 4
    assert values["collisions"] == pytest.approx(2 / 4)  # items 3 and 9
    metric.update(IDS)
    assert computed(metric)["items"] == 4 + 6


def test_merged_and_reset_metrics_of_ids() -> None:
    vectors = torch.randn(6, 2)
    whole, first, second = (SemanticIDMetrics(4, 2) for _ in range(3))
    whole.update(IDS, vectors, vectors + 1)
    first.update(IDS[:2], vectors[:2], vectors[:2] + 1)
    second.update(IDS[2:], vectors[2:], vectors[2:] + 1)
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole.compute())
    assert computed(whole) == computed(whole)
    whole.reset()
    whole.update(IDS[:1])
    assert computed(whole)["items"] == 1


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (IDS[:, :1], {}, ValueError, r"ids must have shape \(..., num_levels = 2\); got \(6, 1\)\. Set num_levels"),
        (IDS + 1, {}, ValueError, r"codes must be in \[0, num_codes = 4\)"),
        (IDS.float(), {}, TypeError, "ids must be integers; got torch.float32"),
        (IDS, {"index": torch.arange(5)}, ValueError, r"index must hold one number per item, \(6,\); got \(5,\)"),
        (IDS, {"vectors": torch.zeros(6, 3)}, ValueError, r"both have shape \(6, 'D'\).*; got \(6, 3\) and None"),
        (
            IDS,
            {"vectors": torch.zeros(6, 3), "decoded": torch.zeros(6, 4)},
            ValueError,
            r"got \(6, 3\) and \(6, 4\)\. Leave both out",
        ),
    ],
)
def test_refused_ids_leave_the_metrics_unchanged(
    ids: Tensor, options: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    metric = SemanticIDMetrics(4, 2)
    with pytest.raises(error, match=message):
        metric.update(ids, **options)
    assert metric.rows == metric.moments == []


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_semantic_id_metrics_refuse_sizes_of_zero_and_compute_without_items() -> None:
    for name in ("num_codes", "num_levels"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            SemanticIDMetrics(**{"num_codes": 3, "num_levels": 2, name: 0})
    metric = SemanticIDMetrics(3, 2)
    metric.update(torch.full((4, 2), -1))
    with pytest.raises(RuntimeError, match=r"at least one item before compute\(\).*Call update\(ids\)"):
        metric.compute()


VECTORS = torch.arange(12.0).view(6, 2)


def _metrics_of_a_part(rank: int) -> dict[str, Tensor]:
    """Four items in two batches on one process, three in one on the other, of which one is repeated."""
    metric = SemanticIDMetrics(4, 2)
    for rows in ([0, 1], [2, 3]) if rank == 0 else ([4, 5, 0],):
        metric.update(IDS[rows], VECTORS[rows], VECTORS[rows] + 1, index=torch.tensor(rows))
    metric.compute()
    return metric.compute()  # the state after a gathering is that of before


def _metrics_of_the_first_alone(rank: int) -> dict[str, Tensor]:
    metric = SemanticIDMetrics(4, 2)
    if rank == 0:
        metric.update(IDS, VECTORS, VECTORS + 1)
    return metric.compute()


@pytest.mark.slow
def test_two_processes_count_the_items_of_both(tmp_path: Path) -> None:
    metric = SemanticIDMetrics(4, 2)
    metric.update(IDS, VECTORS, VECTORS + 1)
    expected = metric.compute()
    for result in results_of_processes(tmp_path, _metrics_of_a_part):
        result.pop("relative_error")  # of vectors, which have no index: the repeated one counts twice
        torch.testing.assert_close(result, {key: value for key, value in expected.items() if key in result})


@pytest.mark.slow
def test_a_process_without_items_waits_for_the_other(tmp_path: Path) -> None:
    metric = SemanticIDMetrics(4, 2)
    metric.update(IDS, VECTORS, VECTORS + 1)
    for result in results_of_processes(tmp_path, _metrics_of_the_first_alone):
        torch.testing.assert_close(result, metric.compute())
