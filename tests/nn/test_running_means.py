"""Means over batches: even at first, exponential later, and left alone by what cannot be used."""

import pytest
import torch

from ddcl_lightning import EmbeddingScale
from ddcl_lightning.nn.idf import PrototypeIDF
from ddcl_lightning.nn.running_covariance import RunningCovariance
from ddcl_lightning.nn.running_means import RunningMeans


class Level(RunningMeans):
    """One running number."""

    def __init__(self, momentum: float) -> None:
        super().__init__(momentum)
        self.register_buffer("level", torch.zeros(()))

    def see(self, value: float) -> float:
        latest = torch.tensor(value)
        self.take_in(torch.isfinite(latest), level=self.averaged("level", latest))
        return float(self.get_buffer("level"))


def test_running_means_are_even_until_the_momentum_is_reached_and_exponential_after() -> None:
    level = Level(0.25)
    assert [level.see(value) for value in (4.0, 8.0, 0.0, 8.0)] == pytest.approx([4.0, 6.0, 4.0, 5.0])
    assert level.see(1.0) == pytest.approx(4.0)  # a quarter of the way from 5 to 1


def test_batches_that_cannot_be_used_leave_running_means_as_they_are() -> None:
    level = Level(0.25)
    level.see(4.0)
    assert level.see(float("nan")) == 4.0
    assert int(level.num_batches) == 1


def test_every_module_with_running_means_has_the_same_rule() -> None:
    for module in (EmbeddingScale(3), PrototypeIDF(1, 2), RunningCovariance(1, 3)):
        assert isinstance(module, RunningMeans)
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]; got .* averages over about"):
            RunningMeans(momentum)
