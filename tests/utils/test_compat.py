"""The private fields of Lightning that compat.py relies on: these fail when one of them changes."""

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, SpikeDetection, WeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.optimization import manual
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ddcl_lightning._utils import compat
from tests.tiny import Blobs, clustering_module, loader, quiet_trainer


def test_lightning_still_counts_by_hooks_on_each_optimizer() -> None:
    source = inspect.getsource(manual._ManualOptimization.on_run_start)
    assert "_on_before_step" in source
    assert "_on_after_step" in source
    optimizer = LightningOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    assert callable(optimizer._on_before_step)
    assert callable(optimizer._on_after_step)


def test_two_optimizers_count_twice_without_us() -> None:
    """When this fails Lightning has fixed its issue 17958 and count_one_step can go."""
    counts = []
    original = compat.count_one_step
    compat.count_one_step = lambda optimizers: None
    try:
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(clustering_module(), loader())
        counts.append(trainer.global_step)
    finally:
        compat.count_one_step = original
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(clustering_module(), loader())
    assert [*counts, trainer.global_step] == [8, 4]


def test_loggers_count_by_a_field_of_the_epoch_loop() -> None:
    assert hasattr(quiet_trainer(max_epochs=1).fit_loop.epoch_loop, "_batches_that_stepped")


def test_hyperparameters_of_the_cli_come_through_a_context_variable() -> None:
    assert not compat.given_by_cli()
    token = _given_hyperparameters.set({"a": 1})
    try:
        assert compat.given_by_cli()
    finally:
        _given_hyperparameters.reset(token)


class Passes(pl.Callback):
    """Makes a pass of its own over the training data before training, and notes what training then sees."""

    def __init__(self, interfere: bool, batches: int | None = None) -> None:
        self.interfere, self.batches = interfere, batches
        self.own: list[int] = []
        self.trained: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interfere:
            for number, batch in enumerate(compat.train_batches(trainer)):
                self.own += batch["index"].tolist()
                if number + 1 == self.batches:
                    break

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trained += batch["index"].tolist()


def shuffled(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Blobs(), batch_size=16, shuffle=True, **kwargs)


def run(callback: Passes, **kwargs: Any) -> Passes:
    torch.manual_seed(0)
    loader_kwargs = kwargs.pop("loader_kwargs", {})
    quiet_trainer(max_epochs=2, callbacks=[callback], **kwargs).fit(clustering_module(), shuffled(**loader_kwargs))
    return callback


def test_a_pass_leaves_the_training_order_and_the_random_state_alone() -> None:
    for loader_kwargs in ({}, {"num_workers": 1, "persistent_workers": True}):
        plain = run(Passes(False), loader_kwargs=loader_kwargs)
        interfered = run(Passes(True, batches=2), loader_kwargs=loader_kwargs)
        assert interfered.trained == plain.trained
        assert len(interfered.own) == 32


def test_a_pass_respects_the_limit_on_training_batches() -> None:
    callback = run(Passes(True), limit_train_batches=3)
    assert len(callback.own) == 48


def test_silent_logging_restores_the_module() -> None:
    module = clustering_module()
    with compat.silent_logging(module):
        module.log("outside of any loop", 1.0)
        module.log_dict({"a": 1.0})
    assert "log" not in module.__dict__
    assert "log_dict" not in module.__dict__


def test_checkpoints_are_read_from_files_and_without_pickles(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"rho": 0.1}}, tmp_path / "a.ckpt")
    assert compat.load_checkpoint(tmp_path / "a.ckpt", weights_only=True) == {"hyper_parameters": {"rho": 0.1}}
    with (tmp_path / "a.ckpt").open("rb") as file:
        assert compat.load_checkpoint(file, map_location="meta", weights_only=True)["hyper_parameters"]


def test_a_restricted_class_method_says_so_on_an_instance() -> None:
    class Loads:
        @compat.restricted_classmethod
        def load(cls) -> type:
            return cls

    assert Loads.load() is Loads
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Loads().load()


def test_lightning_still_leaves_out_what_follows_the_last_batch_of_a_resumed_epoch(tmp_path: Path) -> None:
    """When this fails Lightning does by itself what settle_progress is for."""

    class Validations(pl.Callback):
        count = 0

        def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.count += not trainer.sanity_checking

    counts = []
    for settle in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not settle:
                patch.setattr(compat, "settle_progress", lambda *_: None)
            saving = ModelCheckpoint(tmp_path / str(settle), "{step}", every_n_train_steps=4)
            quiet_trainer(max_epochs=1, callbacks=[saving], enable_checkpointing=True).fit(
                clustering_module(), loader(), loader()
            )
            again = ModelCheckpoint(tmp_path / "again", "{step}", every_n_train_steps=4)
            resumed = quiet_trainer(
                max_epochs=1, callbacks=[validations := Validations(), again], enable_checkpointing=True
            )
            resumed.fit(clustering_module(), loader(), loader(), ckpt_path=saving.best_model_path)
            counts.append(validations.count)
    assert counts == [1, 0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_knows_that_it_is_run_again(reentrant: bool) -> None:
    flags = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        flags.append(compat.recomputing())
        return x.sin().square()

    checkpoint(forward, torch.ones(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert flags == [False, True]
    assert not compat.recomputing()


def test_checkpoints_by_the_clock_are_left_out_under_manual_optimization(tmp_path: Path) -> None:
    """When this fails Lightning saves them itself and save_by_time can go."""
    original = compat.save_by_time
    compat.save_by_time = lambda *args: None
    try:
        callback = ModelCheckpoint(tmp_path, train_time_interval=timedelta(0))
        quiet_trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=True).fit(clustering_module(), loader())
    finally:
        compat.save_by_time = original
    assert list(tmp_path.glob("*")) == []
    assert callback._train_time_interval == timedelta(0)


def test_spike_detection_still_asks_for_a_field_that_it_has_not() -> None:
    """When this fails let_spike_detection_resume can go."""
    callback = SpikeDetection()
    with pytest.raises(AttributeError, match="running"):
        callback.load_state_dict(callback.state_dict())
    callback = SpikeDetection()
    compat.let_spike_detection_resume(callback)
    callback.load_state_dict(callback.state_dict())


def test_pruned_modules_and_averaged_copies_are_where_they_were() -> None:
    layer = torch.nn.Linear(2, 2)
    assert compat.pruned_modules(ModelPruning("l1_unstructured", [(layer, "weight")])) == [layer]
    average, module = WeightAveraging(), clustering_module()
    trainer = quiet_trainer(callbacks=[average])
    assert compat.averaged_copies(trainer) == []
    average.setup(trainer, module, "fit")
    (copy,) = compat.averaged_copies(trainer)
    assert type(copy) is type(module)
    assert copy is not module


class Loads(pl.LightningDataModule):
    def test_dataloader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        return loader()


def test_the_data_module_of_the_stage_is_told_from_an_earlier_one() -> None:
    trainer, module, data = quiet_trainer(), clustering_module(), Loads()
    assert compat.current_datamodule(trainer) is None
    trainer.test(module, datamodule=data)
    assert compat.current_datamodule(trainer) is data
    trainer.test(module, dataloaders=loader())
    assert (compat.current_datamodule(trainer), trainer.datamodule) == (None, data)
