"""MSE, PSNR and SSIM equal torchmetrics' over the whole set, in batches and over processes."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.regression import MeanSquaredError

from ddcl_lightning import ReconstructionMetrics
from ddcl_lightning.metrics.reconstruction_metrics import peak_signal_to_noise
from tests.processes import results_of_processes


def images(size: int = 16, count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(count, 3, size, size, generator=generator)
    return target + 0.2 * torch.randn(target.shape, generator=generator), target


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_equals_torchmetrics_in_any_batches(data_range: float) -> None:
    prediction, target = images()
    metric = ReconstructionMetrics(data_range)
    for p, t in zip(prediction.split(3), target.split(3), strict=True):
        metric.update(p, t)
    figures = metric.compute()
    reference = {
        "mse": MeanSquaredError(),
        "psnr": PeakSignalNoiseRatio(data_range=data_range),
        "ssim": StructuralSimilarityIndexMeasure(data_range=data_range),
    }
    for name, other in reference.items():
        other.update(prediction, target)
        torch.testing.assert_close(figures[name], other.compute(), msg=name)


def test_psnr_by_hand() -> None:
    metric = ReconstructionMetrics()
    metric.update(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5))
    assert float(metric.compute()["psnr"]) == pytest.approx(20.0, abs=1e-4)
    assert float(peak_signal_to_noise(torch.tensor(0.0))) == math.inf


def test_small_images_have_no_ssim_and_vectors_no_psnr() -> None:
    metric = ReconstructionMetrics()
    metric.update(*images(size=10))
    figures = metric.compute()
    assert math.isfinite(figures["psnr"])
    assert bool(figures["ssim"].isnan())
    metric.reset()
    metric.update(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5))
    figures = metric.compute()
    assert float(figures["mse"]) == 0.25
    assert bool(figures["psnr"].isnan())


def test_padding_does_not_count() -> None:
    metric, mask = ReconstructionMetrics(), torch.tensor([[True, True, False], [True, False, False]])
    prediction = torch.zeros(2, 3, 2)
    prediction[~mask] = math.nan
    metric.update(prediction, torch.arange(6.0).reshape(2, 3, 1).expand(2, 3, 2), mask)
    assert float(metric.compute()["mse"]) == pytest.approx((0 + 1 + 9) / 3)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_reconstruction_metrics_refuse_other_shapes_and_compute_without_data() -> None:
    with pytest.raises(ValueError, match="data_range must be > 0; got 0"):
        ReconstructionMetrics(0)
    with pytest.raises(ValueError, match=r"same shape; got \(2, 3\) and \(3, 2\)"):
        ReconstructionMetrics().update(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match=r"at least one image or vector before compute\(\)"):
        ReconstructionMetrics().compute()


def _metrics_of_half(rank: int) -> dict[str, Tensor]:
    metric = ReconstructionMetrics()
    metric.update(*(pictures[rank::2] for pictures in images()))
    return metric.compute()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    metric = ReconstructionMetrics()
    metric.update(*images())
    for result in results_of_processes(tmp_path, _metrics_of_half):
        torch.testing.assert_close(result, metric.compute())
