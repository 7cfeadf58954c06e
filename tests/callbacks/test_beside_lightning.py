"""Our callbacks in somebody else's module, beside Lightning's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.callbacks as builtin
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import two_timescale_groups
from ddcl_lightning.callbacks import (
    CollapseWarning,
    DecompositionCheck,
    KMeansInitialization,
    PrototypeFigures,
    RatioGuard,
    TemperatureAnnealing,
)
from tests.callbacks.toys import QUIET, Project, blobs

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Tunable(Project):
    """Has what Lightning's tuners look for."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.learning_rate = 16, 1e-3

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*blobs()), batch_size=self.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(two_timescale_groups(self, 10 * self.learning_rate, rho=0.1))


class Finetuned(Tunable):
    """An encoder that joins later."""

    @property
    def backbone(self) -> torch.nn.Module:
        return self.encoder

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.layer.parameters(), lr=1e-2)


def ours() -> list[pl.Callback]:
    return [
        KMeansInitialization(progress=False),
        TemperatureAnnealing(),
        CollapseWarning(),
        DecompositionCheck(),
        PrototypeFigures(),
        RatioGuard(),
    ]


def fit(folder: Path, *callbacks: pl.Callback, module: type[Project] = Tunable, **kwargs: Any) -> Project:
    torch.manual_seed(0)
    built = module()
    settings = {"max_epochs": 3, "default_root_dir": folder, **kwargs}
    pl.Trainer(callbacks=list(callbacks), **{**QUIET, **settings}).fit(built)
    return built


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The run with our callbacks only."""
    return fit(tmp_path_factory.mktemp("alone"), *ours())


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("build", "module"),
    [
        (lambda: builtin.StochasticWeightAveraging(1e-3, swa_epoch_start=1), Tunable),
        (lambda: builtin.EMAWeightAveraging(decay=0.99), Tunable),
        (lambda: builtin.BackboneFinetuning(1, lambda epoch: 1.0), Finetuned),
        (lambda: builtin.ModelPruning("l1_unstructured"), Tunable),
        (lambda: builtin.GradientAccumulationScheduler({1: 2}), Tunable),
    ],
    ids=["swa", "ema", "finetuning", "pruning", "accumulation"],
)
def test_prototypes_start_and_temperatures_fall_beside_them(
    build: Callable[[], pl.Callback], module: type[Project], first: bool, alone: Project, tmp_path: Path
) -> None:
    callbacks = [build(), *ours()] if first else [*ours(), build()]
    bank = fit(tmp_path, *callbacks, module=module).layer.bank
    assert bool(bank.initialized)
    falling, expected = bank.temperature_state, alone.layer.bank.temperature_state
    torch.testing.assert_close(falling.value, expected.value, rtol=1e-4, atol=0)
    torch.testing.assert_close(falling.current, expected.current, rtol=0.05, atol=0)  # it follows the encoder
    assert not bank._active_observers()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: builtin.BatchSizeFinder(init_val=16, max_trials=1, steps_per_trial=2),
        lambda: builtin.LearningRateFinder(num_training_steps=8, update_attr=False),
    ],
    ids=["batch_size", "learning_rate"],
)
def test_trials_before_training_leave_no_trace(
    build: Callable[[], pl.Callback], first: bool, alone: Project, tmp_path: Path
) -> None:
    callbacks = [build(), *ours()] if first else [*ours(), build()]
    state = fit(tmp_path, *callbacks).state_dict()
    assert [name for name, value in alone.state_dict().items() if not torch.equal(value, state[name])] == []
