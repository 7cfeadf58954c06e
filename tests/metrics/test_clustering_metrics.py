"""The figures equal scikit-learn's; the state adds up over batches and processes."""

import copy
import math
import pickle
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from ddcl_lightning.metrics.clustering_metrics import (
    ClusteringMetrics,
    adjusted_rand_index,
    count_matrix,
    hungarian_accuracy,
    hungarian_matching,
    normalized_mutual_info,
    perplexity,
    purity,
    usage,
)
from tests.processes import results_of_processes


def random_labelling(seed: int) -> tuple[Tensor, Tensor, int, int]:
    """N from 1 to 200, K and C from 1 to 8, clusters that follow the classes or do not, some empty."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 3, 10, 200]))
    k, c = (int(v) for v in rng.integers(1, 9, size=2))
    labels = rng.integers(0, rng.integers(1, c + 1), size=n)
    noise = rng.integers(0, rng.integers(1, k + 1), size=n)
    assignments = np.where(rng.random(n) < rng.random(), labels % k, noise)
    return torch.from_numpy(assignments), torch.from_numpy(labels), k, c


def brute_force_accuracy(counts: Tensor) -> float:
    """Best matching by trying all of them, after padding to a square."""
    size = max(counts.shape)
    square = torch.zeros(size, size, dtype=torch.int64)
    square[: counts.shape[0], : counts.shape[1]] = counts
    best = max(sum(int(square[i, j]) for i, j in enumerate(p)) for p in permutations(range(size)))
    return best / int(counts.sum())


@pytest.mark.parametrize("seed", range(200))
def test_equals_scikit_learn(seed: int) -> None:
    assignments, labels, k, c = random_labelling(seed)
    metric = ClusteringMetrics(k, c)
    metric.update(assignments, labels)
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in metric.compute().values())
    assert figures["nmi"] == pytest.approx(normalized_mutual_info_score(labels, assignments), abs=1e-9)
    assert figures["ari"] == pytest.approx(adjusted_rand_score(labels, assignments), abs=1e-9)
    majority = sum(np.bincount(labels[assignments == j]).max() for j in assignments.unique())
    assert figures["purity"] == pytest.approx(majority / len(labels), abs=1e-12)
    assert figures["usage"] == pytest.approx(len(assignments.unique()) / k, abs=1e-12)
    shares = np.unique(assignments, return_counts=True)[1] / len(assignments)
    assert figures["perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_accuracy_is_that_of_the_best_matching(seed: int) -> None:
    k, c = np.random.default_rng(seed).integers(1, 6, size=2)
    counts = torch.randint(0, 20, (int(k), int(c)), generator=torch.Generator().manual_seed(seed))
    counts[0, 0] += 1
    assert hungarian_accuracy(counts).item() == pytest.approx(brute_force_accuracy(counts), abs=1e-12)
    matching = hungarian_matching(counts)
    matched = matching >= 0
    assert matched.sum() == min(k, c)
    assert matching[matched].unique().numel() == min(k, c)
    agreeing = counts[matched].gather(1, matching[matched, None]).sum() / counts.sum()
    assert agreeing.item() == pytest.approx(hungarian_accuracy(counts).item())


@pytest.mark.parametrize(
    ("counts", "nmi", "ari"),
    [
        ([[5]], 1.0, 1.0),  # one cluster, one class: 1 in scikit-learn, 0 in torchmetrics 1.9
        ([[3, 2]], 0.0, 0.0),  # one cluster, two classes
        ([[3], [2]], 0.0, 0.0),  # two clusters, one class
        ([[0, 3], [2, 0], [0, 0]], 1.0, 1.0),  # renamed, with an empty cluster
    ],
)
def test_agreement_of_degenerate_clusterings_is_zero_or_one(counts: list[list[int]], nmi: float, ari: float) -> None:
    assert normalized_mutual_info(torch.tensor(counts)).item() == pytest.approx(nmi, abs=1e-12)
    assert adjusted_rand_index(torch.tensor(counts)).item() == ari


def test_ari_of_a_huge_sample_does_not_overflow() -> None:
    # ARI depends on N only through a term of order 1/N.
    small = torch.tensor([[700, 20, 3], [15, 600, 9], [1, 2, 500]])
    huge = adjusted_rand_index(small * 10**6).item()
    assert huge == pytest.approx(adjusted_rand_index(small * 10**3).item(), abs=1e-5)


def test_samples_without_label_count_for_usage_only() -> None:
    metric = ClusteringMetrics(num_clusters=4, num_classes=2)
    metric.update(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, -1, -100]))
    figures = metric.compute()
    assert figures["acc"] == figures["nmi"] == figures["ari"] == figures["purity"] == 1.0
    assert figures["usage"] == 0.75
    entropy = -2 * 0.4 * math.log(0.4) - 0.2 * math.log(0.2)
    assert figures["perplexity"].item() == pytest.approx(math.exp(entropy))


def test_without_any_label_agreement_is_undefined_and_usage_is_not() -> None:
    metric = ClusteringMetrics(2, 3)
    metric.update(torch.tensor([0, 1]), torch.tensor([-1, -1]))
    figures = metric.compute()
    assert all(figures[name].isnan() for name in ("acc", "nmi", "ari", "purity"))
    assert figures["usage"] == 1.0
    assert figures["perplexity"].item() == pytest.approx(2.0)


def test_usage_and_perplexity_take_the_matrix_or_the_sizes() -> None:
    counts = torch.tensor([[3, 1], [0, 0], [4, 0]])
    assert usage(counts) == usage(counts.sum(1))
    assert perplexity(counts) == perplexity(counts.sum(1))
    assert purity(counts).item() == pytest.approx(7 / 8)


# torchmetrics warns before our error, which says the same and the remedy.
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_compute_without_samples_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"Call update\(assignments, labels\) first"):
        ClusteringMetrics(3, 3).compute()
    metric = ClusteringMetrics(3, 3)
    metric.update(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="at least one sample"):
        metric.compute()


@pytest.mark.parametrize(
    ("assignments", "labels", "error", "message"),
    [
        ([0, 3], [0, 1], ValueError, r"assignments must be below num_clusters=3; got 3"),
        ([0, -1], [0, 1], ValueError, r"assignments must be at least 0; got -1"),
        ([0, 1], [0, 2], ValueError, r"labels must be below num_classes=2; got 2"),
        ([0, 1], [0, 1, 1], ValueError, r"same length; got 2 and 3"),
        ([[0, 1]], [0, 1], ValueError, r"assignments must have one dimension.*\(1, 2\)"),
        ([0.0, 1.0], [0, 1], TypeError, r"assignments must be integers; got torch.float32"),
        ([0, 1], [True, False], TypeError, r"labels must be integers; got torch.bool"),
    ],
)
def test_refused_labels_leave_clustering_metrics_unchanged(
    assignments: list[float], labels: list[float], error: type[Exception], message: str
) -> None:
    metric = ClusteringMetrics(num_clusters=3, num_classes=2)
    with pytest.raises(error, match=message):
        metric.update(torch.tensor(assignments), torch.tensor(labels))
    assert not metric.counts.any()
    assert not metric.sizes.any()


def test_bad_counts_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_clusters must be at least 1; got 0"):
        ClusteringMetrics(0, 3)
    with pytest.raises(ValueError, match=r"shape \(K, C\); got \(3,\)"):
        purity(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(K, C\) or \(K,\)"):
        usage(torch.ones(1, 1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"counts must be integers; got torch.float32"):
        hungarian_accuracy(torch.ones(2, 2))
    with pytest.raises(ValueError, match="zeros only"):
        normalized_mutual_info(torch.zeros(2, 2, dtype=torch.int64))


def test_batches_add_up_and_reset_forgets() -> None:
    assignments, labels, k, c = random_labelling(7)
    whole, summed = ClusteringMetrics(k, c), ClusteringMetrics(k, c)
    whole.update(assignments, labels)
    for a, y in zip(assignments.split(7), labels.split(7), strict=True):
        summed(a, y)  # forward() keeps the total too
    assert torch.equal(whole.counts, summed.counts)
    assert torch.equal(whole.counts, count_matrix(assignments, labels, k, c))
    assert whole.compute() == summed.compute()
    summed.reset()
    assert not summed.counts.any()
    assert not summed.sizes.any()


def test_state_of_two_metrics_merges() -> None:
    first, second, whole = (ClusteringMetrics(3, 3) for _ in range(3))
    a, y = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([2, 1, 0, -1, 1])
    first.update(a[:2], y[:2])
    second.update(a[2:], y[2:])
    whole.update(a, y)
    first.merge_state(second)
    assert first.compute() == whole.compute()


def test_copies_pickles_and_moves() -> None:
    metric = ClusteringMetrics(3, 2)
    metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 1]))
    figures = metric.compute()
    pickled = pickle.loads(pickle.dumps(metric))
    for twin in (copy.deepcopy(metric), pickled, copy.deepcopy(metric).double(), metric.to("cpu")):
        assert twin.compute() == figures
        assert twin.counts.dtype == torch.int64
        twin.reset()
        twin.update(torch.tensor([0]), torch.tensor([0]))
        assert twin.sizes.sum() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    assignments, labels, k, c = random_labelling(7)
    metric = ClusteringMetrics(k, c).to("cuda")
    metric.update(assignments.cuda(), labels.cuda())
    expected = ClusteringMetrics(k, c)
    expected.update(assignments, labels)
    assert {name: value.cpu() for name, value in metric.compute().items()} == expected.compute()


def _metrics_of_half(rank: int) -> dict[str, Tensor]:
    assignments, labels, k, c = random_labelling(7)
    metric = ClusteringMetrics(k, c)
    metric.update(assignments[rank::2], labels[rank::2])
    return metric.compute()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    assignments, labels, k, c = random_labelling(7)
    metric = ClusteringMetrics(k, c)
    metric.update(assignments, labels)
    for result in results_of_processes(tmp_path, _metrics_of_half):
        assert result == metric.compute()
