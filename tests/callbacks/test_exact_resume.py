"""Runs that go on from any of their checkpoints, beside the run that never stopped."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from ddcl_lightning import DDCLReadout, DDCLReadoutModule, IdentityBackbone, SizeRules
from ddcl_lightning._utils.random_state import random_states, set_random_states
from ddcl_lightning.callbacks import AdaptiveBankSize, ExactResume, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.tasks import Classification
from tests.callbacks.toys import Project, fit
from tests.tiny import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
HOOKS = ("train_epoch_start", "train_batch_end", "validation_start", "validation_end", "train_epoch_end")


class Hooks(pl.Callback):
    """The hooks of a run, in order."""

    def __init__(self) -> None:
        self.called: list[tuple[str, int, int]] = []


def _note(name: str) -> Any:
    def hook(self: Hooks, trainer: pl.Trainer, *_: Any) -> None:
        self.called.append((name, trainer.current_epoch, trainer.global_step))

    return hook


for _name in HOOKS:
    setattr(Hooks, f"on_{_name}", _note(_name))


class DroppedOut(IdentityBackbone):
    """A trainable encoder that draws from all generators of a process."""

    def __init__(self) -> None:
        super().__init__(64)
        self.net = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.3))
        self.embed_dim = 8

    def forward(self, batch: Any) -> Any:
        tokens = super().forward(batch)
        noise = 1 + 0.1 * self.training * (np.random.rand() + random.random())  # noqa: NPY002
        return tokens._replace(values=noise * self.net(tokens.values))


def run(folder: Path | None, resume: Path | None = None, callbacks: Any = (), **kwargs: Any) -> tuple[Any, Any, Any]:
    """Trains on the digits in 5 batches an epoch, saving at every step and the end of every epoch."""
    pl.seed_everything(0, verbose=False)
    module = DDCLReadoutModule(DroppedOut(), DDCLReadout(4), Classification(10))
    hooks = Hooks()
    saving: list[pl.Callback] = []
    if folder is not None:
        every: dict[str, Any] = {"save_top_k": -1, "auto_insert_metric_name": False}
        saving = [
            ModelCheckpoint(folder, "batch-{step}", every_n_train_steps=1, **every),
            ModelCheckpoint(folder, "end-{step}", every_n_epochs=1, save_on_train_epoch_end=True, **every),
        ]
    trainer = quiet_trainer(
        callbacks=[hooks, *callbacks, *saving],
        enable_checkpointing=bool(saving),
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **kwargs},
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=400, seed=0, num_workers=0), ckpt_path=resume)
    return module, trainer, hooks


def assert_same_end(whole: tuple[Any, Any, Any], resumed: tuple[Any, Any, Any]) -> None:
    torch.testing.assert_close(resumed[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    for first, other in zip(whole[1].optimizers, resumed[1].optimizers, strict=True):
        torch.testing.assert_close(other.state_dict()["state"], first.state_dict()["state"], rtol=0, atol=0)
        assert other.state_dict()["param_groups"] == first.state_dict()["param_groups"]


@pytest.mark.parametrize(
    "options",
    [{}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 2}, {"max_steps": 9}],
    ids=["validation", "none", "every_second_epoch", "inside_epochs", "max_steps"],
)
def test_a_run_resumed_anywhere_does_what_was_left_once(options: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path, **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    last = whole[1].global_step
    assert len(checkpoints) == last + 2
    for path in checkpoints:
        kind, step = path.stem.split("-")
        hook = {"batch": "train_batch_end", "end": "train_epoch_end"}[kind]
        place = max(at for at, (name, _, at_step) in enumerate(whole[2].called) if (name, at_step) == (hook, int(step)))
        if "max_steps" in options and int(step) == last:
            continue  # nothing more happens there: Lightning sees that the run is over and skips all of it
        resumed = run(None, path, **options)
        assert resumed[2].called == whole[2].called[place + 1 :], path.name
        assert_same_end(whole, resumed)


def test_a_run_resumed_at_the_end_of_an_epoch_changes_the_number_of_prototypes_alike(tmp_path: Path) -> None:
    def adaptive() -> list[pl.Callback]:
        start = KMeansInitialization(progress=False, num_restarts=1, seed=0)
        return [
            TemperatureAnnealing(),
            start,
            AdaptiveBankSize(SizeRules(2, 16, significance=None), duration=3, seed=0),
        ]

    whole = run(tmp_path, callbacks=(callbacks := adaptive()), max_epochs=3)
    history = callbacks[2].history  # type: ignore[attr-defined]
    assert len(history["head.attention.bank"]) > 2
    for name in ("batch-5", "batch-10", "end-5"):
        resumed = run(None, tmp_path / f"{name}.ckpt", callbacks=(callbacks := adaptive()), max_epochs=3)
        assert callbacks[2].history == history, name  # type: ignore[attr-defined]
        assert_same_end(whole, resumed)


class StopsInValidation(pl.Callback):
    """Saves in the middle of a validation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:  # type: ignore[override]
        torch.rand(1)  # what a validation draws
        if number == 2 and trainer.current_epoch == 0 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_run_resumed_inside_a_validation_begins_it_anew(tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    whole = run(None, callbacks=[StopsInValidation(path)])
    resumed = run(None, path, callbacks=[StopsInValidation(path)])
    assert resumed[2].called[0] == ("validation_start", 0, 5)
    assert_same_end(whole, resumed)
    assert resumed[1].callback_metrics["val/loss"] == whole[1].callback_metrics["val/loss"]


def test_a_project_of_ones_own_with_a_plain_loader_resumes_between_epochs(tmp_path: Path) -> None:
    def train(*callbacks: pl.Callback, **kwargs: Any) -> Tensor:
        torch.manual_seed(1)
        module = Project(dropout=0.5, lr=0.1)
        torch.manual_seed(2)
        fit(module, *callbacks, max_epochs=3, **kwargs)
        return module.layer.bank.prototypes.detach()

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=1, save_top_k=-1)
    whole = train(ExactResume(), saving, enable_checkpointing=True)
    torch.manual_seed(3)
    assert torch.equal(train(ExactResume(), ckpt_path=tmp_path / "step=6.ckpt"), whole)
    assert not torch.equal(train(ckpt_path=tmp_path / "step=6.ckpt"), whole)  # the seed alone does not do it


def test_states_of_all_generators_go_through_a_safe_file(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    random.gauss(0, 1)  # leaves a half of a pair behind
    torch.save(random_states(cpu), tmp_path / "states")

    def draw() -> list[float]:
        return [float(torch.rand(1)), random.gauss(0, 1), random.random(), np.random.rand()]  # noqa: NPY002

    drawn = draw()
    set_random_states(torch.load(tmp_path / "states", weights_only=True), cpu)
    assert draw() == drawn


def test_states_of_another_number_of_processes_are_left_alone() -> None:
    callback = ExactResume()
    trainer = quiet_trainer()
    callback.load_state_dict({"random": [random_states(torch.device("cpu"))] * 2})
    before = torch.get_rng_state()
    torch.rand(1)
    with pytest.warns(UserWarning, match="2 processes and this run has 1"):
        callback.on_fit_start(trainer, Project())
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_trainer_gets_one_of_them(tmp_path: Path) -> None:
    for callbacks in ([], [ExactResume()]):
        module, trainer, _ = run(None, callbacks=callbacks, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
        assert sum(isinstance(callback, ExactResume) for callback in trainer.callbacks) == 1
        trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
        assert sum(isinstance(callback, ExactResume) for callback in trainer.callbacks) == 1


def test_a_pass_over_a_shipped_loader_leaves_the_global_generator_alone() -> None:
    data = DigitsDataModule(batch_size=400, seed=0, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    before = torch.get_rng_state()
    for epoch in range(2):
        train = data.train_dataloader()
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        assert len(list(train)) == 5
    assert torch.equal(torch.get_rng_state(), before)


class EndReader(pl.Callback):
    """What the training has logged, as EarlyStopping reads it at the end of an epoch."""

    def __init__(self) -> None:
        self.read: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.read[trainer.current_epoch] = values


def test_a_run_resumed_at_the_end_of_an_epoch_reads_what_the_epoch_logged(tmp_path: Path) -> None:
    reader = EndReader()
    stopping = EarlyStopping("train/loss", patience=9, check_on_train_epoch_end=True)
    run(tmp_path, callbacks=[reader, stopping])
    assert reader.read[0]["train/loss"] > 0
    for path in sorted(tmp_path.glob("batch-*.ckpt")):
        resumed = EndReader()
        run(None, path, [resumed, EarlyStopping("train/loss", patience=9, check_on_train_epoch_end=True)])
        for epoch, values in resumed.read.items():
            for name, value in values.items():
                if name in reader.read[epoch] and path.stem in ("batch-5", "batch-10"):
                    assert value == pytest.approx(reader.read[epoch][name], rel=1e-6), (path.name, name)
            assert "train/loss" in values, path.name
