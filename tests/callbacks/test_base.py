import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toys import PROJECTS, QUIET, Project, fit, loader

from ddcl_lightning import Classification, DDCLReadoutModule, Head, ReadoutOutput
from ddcl_lightning.callbacks import (
    CollapseWarning,
    DecompositionCheck,
    FitSummary,
    KMeansInitialization,
    PrototypeFigures,
    RatioGuard,
    TemperatureAnnealing,
)
from ddcl_lightning.callbacks._base import BankCallback
from ddcl_lightning.monitoring.recording import BankRecord
from ddcl_lightning.nn.discovery import find_banks
from tests.tiny import LinearBackbone
from tests.tiny import loader as blob_batches


class Spy(BankCallback):
    def __init__(self, every_n_batches=1):
        super().__init__(every_n_batches)
        self.steps = []

    def observe(self, trainer, pl_module, records):
        self.steps.append((trainer.fit_loop.epoch_loop.total_batch_idx, sorted(records)))


@pytest.mark.parametrize("name", PROJECTS)
def test_every_callback_attaches_to_any_project(name, tmp_path):
    make, data = PROJECTS[name]
    module = make()
    callbacks = [
        TemperatureAnnealing(),
        KMeansInitialization(),
        DecompositionCheck(every_n_batches=1),
        CollapseWarning(every_n_batches=1),
        PrototypeFigures(every_n_epochs=5),
        RatioGuard(on_violation="warn") if name == "two_optimizers" else FitSummary(),
    ]
    trainer = fit(module, *callbacks, data=data(), default_root_dir=tmp_path)
    banks = find_banks(module)
    assert all(bool(bank.initialized) for bank in banks.values())
    assert all(bool((bank.temperature != 1.0).all()) for bank in banks.values())
    check = callbacks[2]
    assert (check.checks, check.violations) == (12 * len(banks), 0)
    logged = {key.split("/")[1] for key in trainer.callback_metrics if key.startswith("ddcl/")}
    assert {"temperature", "delta_min", "delta_relative", "temperature_ratio", "entropy"} <= logged
    # Nothing stays behind.
    assert not any(bank._active_observers() for bank in banks.values())


def test_only_due_batches_are_observed_and_validation_never_is():
    class Validated(Project):
        def validation_step(self, batch, batch_idx):
            self.layer.train()(self.tokens(batch))

    spy = Spy(every_n_batches=4)
    trainer = pl.Trainer(callbacks=[spy], max_epochs=2, num_sanity_val_steps=1, val_check_interval=1, **QUIET)
    trainer.fit(Validated(), loader(), loader(16, shuffle=False))
    assert [step for step, _ in spy.steps] == [0, 4, 8]


def test_recording_costs_nothing_between_due_batches(monkeypatch):
    looks = []
    of_call = BankRecord.of_call
    monkeypatch.setattr(BankRecord, "of_call", lambda *args: looks.append(1) or of_call(*args))
    fit(Project(), Spy(every_n_batches=6))
    assert len(looks) == 2


@pytest.mark.parametrize(
    "callback",
    [Spy(), TemperatureAnnealing(), KMeansInitialization(), RatioGuard(), DecompositionCheck()],
)
def test_a_module_without_a_bank_is_refused(callback):
    module = Project()
    module.layer = nn.Identity()
    with pytest.raises(ValueError, match=f"{type(callback).__name__} found no PrototypeBank in Project"):
        fit(module, callback)


def test_a_callback_that_never_sees_a_call_says_so():
    class Silent(Project):
        def training_step(self, batch, batch_idx):
            return self.tokens(batch).square().mean()

    with pytest.warns(UserWarning, match="Spy saw no call of layer.bank in 12 training batches"):
        fit(Silent(), Spy())


def test_calls_of_forward_are_seen_too():
    class Direct(Project):
        def training_step(self, batch, batch_idx):
            return self.layer.bank.forward(self.tokens(batch)).terms.loss.sum()

    spy = Spy()
    fit(Direct(), spy)
    assert len(spy.steps) == 12


def test_the_interval_survives_a_restart(tmp_path):
    whole = Spy(every_n_batches=5)
    fit(Project(), whole, data=loader(shuffle=False), max_epochs=3)
    first, rest = Spy(every_n_batches=5), Spy(every_n_batches=5)
    trainer = fit(Project(), first, data=loader(shuffle=False), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit(Project(), rest, data=loader(shuffle=False), max_epochs=3, ckpt_path=tmp_path / "one.ckpt")
    assert first.steps + rest.steps == whole.steps


def test_a_second_run_starts_anew_and_a_failed_one_leaves_no_hook():
    spy = Spy(every_n_batches=100)
    fit(Project(), spy, max_epochs=1)
    fit(Project(), spy, max_epochs=1)
    assert len(spy.steps) == 2

    class Failing(Project):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("boom")

    module = Failing()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, Spy())
    assert not module.layer.bank._active_observers()


@pytest.mark.parametrize("every", [0, -1])
def test_interval_must_be_positive(every):
    with pytest.raises(ValueError, match="every_n_batches must be at least 1"):
        Spy(every)


def test_banks_in_evaluation_mode_are_seen():
    class Frozen(Project):
        def on_train_start(self):
            self.layer.eval()

    spy = Spy()
    fit(Frozen(), spy, max_epochs=1)
    assert len(spy.steps) == 6
    assert torch.is_grad_enabled()


class Other(Head):
    """A head without prototypes."""

    def build(self, embed_dim):
        super().build(embed_dim)
        self.pooled_dim = embed_dim

    def forward(self, tokens, mask=None):
        return ReadoutOutput(tokens, tokens.mean(1))


def test_swapping_the_head_for_one_without_prototypes_needs_no_other_change(caplog):
    """The recipe's callbacks and the task's quantization weight stay as they are."""
    caplog.set_level("INFO")
    callbacks = [
        TemperatureAnnealing(),
        KMeansInitialization(),
        DecompositionCheck(every_n_batches=1),
        CollapseWarning(every_n_batches=1),
        RatioGuard(),
        PrototypeFigures(every_n_epochs=1),
    ]
    model = DDCLReadoutModule(LinearBackbone(), Other(), Classification(4, quantization_weight=0.1))
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 40}, callbacks=callbacks)
    trainer.fit(model, blob_batches(), blob_batches())
    assert float(trainer.callback_metrics["val/acc"]) == 1.0
    assert "KMeansInitialization stays idle: DDCLReadoutModule holds no PrototypeBank" in caplog.text
    assert "Other has no prototypes: quantization_weight is not used" in caplog.text
