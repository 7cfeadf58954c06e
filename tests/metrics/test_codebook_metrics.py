"""Use of codes by hard counts, exact over batches and processes."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddcl_lightning import CodebookMetrics
from ddcl_lightning.metrics.codebook_metrics import codebook_counts, soft_perplexity
from tests.processes import results_of_processes

CODES = torch.tensor([[[0, 3], [0, 1], [2, -1]], [[0, 3], [-1, -1], [2, 1]]])  # (2, 3, 2), -1 is padding
SHARES = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.25] * 4], [[0.0, 1.0, 0.0, 0.0], [0.25] * 4]])


def test_counts_by_hand() -> None:
    assert codebook_counts(CODES, 4).tolist() == [[3, 0, 2, 0], [0, 2, 0, 2]]
    assert codebook_counts(CODES[..., :1].int(), 5).tolist() == [[3, 0, 2, 0, 0]]
    assert codebook_counts(torch.full((2, 3, 1), -1), 2).tolist() == [[0, 0]]


def test_figures_by_hand() -> None:
    metric = CodebookMetrics(4, 2)
    metric.update(CODES, SHARES)
    figures = {name: float(value) for name, value in metric.compute().items()}
    first = math.exp(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    soft = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    expected = {"codebook0_usage": 0.5, "codebook0_perplexity": first, "codebook0_soft_perplexity": soft}
    expected |= {"codebook1_usage": 0.5, "codebook1_perplexity": 2.0, "codebook1_soft_perplexity": 4.0}
    expected |= {"usage": 0.5, "perplexity": (first + 2) / 2, "soft_perplexity": (soft + 4) / 2}
    assert figures == pytest.approx(expected)


def test_hard_and_soft_perplexity_are_told_apart() -> None:
    """Tokens that all share their mass evenly, with the same strongest code: soft says K, hard says 1."""
    metric = CodebookMetrics(8)
    metric.update(torch.zeros(4, 5, 1, dtype=torch.int64), torch.full((4, 1, 8), 1 / 8))
    figures = metric.compute()
    assert float(figures["perplexity"]) == 1.0
    assert float(figures["usage"]) == 1 / 8
    assert float(figures["soft_perplexity"]) == pytest.approx(8)
    assert set(figures) == {"usage", "perplexity", "soft_perplexity"}
    assert float(soft_perplexity(torch.tensor([0.0, 7.0, 0.0]))) == 1.0


def test_usage_has_no_threshold() -> None:
    metric = CodebookMetrics(2)
    metric.update(torch.zeros(1000, 50, 1, dtype=torch.int64))
    metric.update(torch.ones(1, 1, 1, dtype=torch.int64))
    assert float(metric.compute()["usage"]) == 1.0


def test_batches_add_up_and_reset_forgets() -> None:
    codes, shares = torch.randint(-1, 5, (20, 7, 2)), torch.rand(20, 2, 5)
    whole, summed = CodebookMetrics(5, 2), CodebookMetrics(5, 2)
    whole.update(codes, shares)
    for c, s in zip(codes.split(6), shares.split(6), strict=True):
        summed.update(c, s)
    torch.testing.assert_close(whole.compute(), summed.compute())
    summed.reset()
    summed.update(codes)
    assert bool(summed.compute()["soft_perplexity"].isnan())


@pytest.mark.parametrize(
    ("codes", "shares", "error", "message"),
    [
        (torch.tensor([[[4]]]), None, ValueError, r"codes must be in \[0, num_codes = 4\).*from 4 to 4.*num_codes"),
        (torch.tensor([[[-2]]]), None, ValueError, "got values from -2 to -2"),
        (torch.zeros(1, 2, 1), None, TypeError, "codes must be integers; got torch.float32"),
        ([1, 2], None, TypeError, "codes must be a tensor of integers; got a list of 2. Use torch.as_tensor"),
        (CODES[..., :1], [[0.5]], TypeError, "assignments must be a tensor; got list. Convert"),
        (CODES[..., :1], SHARES, ValueError, r"shape \(B, 1, 4\), .*; got \(2, 2, 4\). Leave"),
    ],
)
def test_refused_codes_leave_codebook_metrics_unchanged(
    codes: Tensor, shares: Tensor | None, error: type[Exception], message: str
) -> None:
    metric = CodebookMetrics(4)
    with pytest.raises(error, match=message):
        metric.update(codes, shares)
    assert not metric.counts.any()
    assert not metric.mass.any()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_codebook_metrics_refuse_sizes_of_zero_and_compute_without_tokens() -> None:
    for name in ("num_codes", "num_codebooks"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            CodebookMetrics(**{"num_codes": 3, name: 0})
    with pytest.raises(RuntimeError, match=r"at least one token before compute\(\).*Call update\(codes\)"):
        CodebookMetrics(3).compute()


def _metrics_of_half(rank: int) -> dict[str, Tensor]:
    metric = CodebookMetrics(4, 2)
    metric.update(CODES[rank::2], SHARES[rank::2])
    return metric.compute()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    metric = CodebookMetrics(4, 2)
    metric.update(CODES, SHARES)
    for result in results_of_processes(tmp_path, _metrics_of_half):
        torch.testing.assert_close(result, metric.compute())
