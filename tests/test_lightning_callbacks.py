"""Lightning's own callbacks beside the module: every one works as it promises, or is refused with a sentence.

The rows of the table in ``docs/lightning-callbacks.md``.
"""

import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.callbacks as builtin
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from ddcl_lightning import (
    Classification,
    Clustering,
    DDCLReadout,
    DDCLReadoutModule,
    LRSchedule,
    OptimizerConfig,
    PCABackbone,
)
from ddcl_lightning.callbacks import AdaptiveBankSize, KMeansInitialization, TemperatureAnnealing
from tests.processes import succeed_in_processes
from tests.tiny import Blobs, absolute, clustering_module, quiet_trainer

DOCS = Path(__file__).parents[1] / "docs" / "lightning-callbacks.md"
ROWS: dict[str, list[Callable[..., None]]] = {}
BASES = {"Callback", "Checkpoint", "ProgressBar"}  # nothing of their own to test


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Blobs(), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def row(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test as the row of callbacks."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            ROWS.setdefault(name, []).append(test)
        return test

    return mark


def fit(
    *callbacks: pl.Callback, module: DDCLReadoutModule | None = None, ckpt_path: Path | None = None, **kwargs: Any
) -> pl.Trainer:
    """Three epochs of four steps."""
    torch.manual_seed(0)
    checkpointing = any(isinstance(callback, builtin.Checkpoint) for callback in callbacks)
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": checkpointing}
    trainer = quiet_trainer(callbacks=list(callbacks), **{**settings, **kwargs})
    trainer.fit(clustering_module() if module is None else module, datamodule=Data(), ckpt_path=ckpt_path)
    return trainer


def classifier(**kwargs: Any) -> DDCLReadoutModule:
    return clustering_module(Classification(4), **kwargs)


class AtStep(pl.Callback):
    """Does something to the batch before a step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.act(batch)


class States(pl.Callback):
    """Keeps the state after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        self.states.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})


def test_every_builtin_callback_has_a_row_here_and_in_the_docs() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == set(builtin.__all__)
    assert set(ROWS) == set(builtin.__all__) - BASES


# Checkpoints ------------------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(re.findall(r"step=(\d+)", path.name)[0]) for path in folder.glob("*.ckpt"))


@row("ModelCheckpoint")
@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({}, [4, 8, 12]),
        ({"every_n_epochs": 2}, [8]),
        ({"every_n_train_steps": 3}, [3, 6, 9, 12]),
        ({"train_time_interval": timedelta(0)}, list(range(1, 13))),
        ({"train_time_interval": timedelta(hours=1)}, []),
        ({"train_time_interval": timedelta(0), "monitor": "train/loss"}, list(range(1, 13))),
        ({"monitor": "val/loss"}, [4, 8, 12]),
        ({"monitor": "train/loss", "every_n_train_steps": 2}, [2, 4, 6, 8, 10, 12]),
    ],
    ids=str,
)
def test_model_checkpoint_saves_at_its_interval(when: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    fit(builtin.ModelCheckpoint(tmp_path, save_top_k=-1, **when), log_every_n_steps=1)
    assert saved_steps(tmp_path) == steps


@row("ModelCheckpoint")
def test_model_checkpoint_by_the_clock_counts_optimizer_steps(tmp_path: Path) -> None:
    states = States()
    module = clustering_module(accumulate_grad_batches=2)
    fit(states, builtin.ModelCheckpoint(tmp_path, save_top_k=-1, train_time_interval=timedelta(0)), module=module)
    assert saved_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    saved = torch.load(tmp_path / "epoch=1-step=3.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, states.states[5][name]) for name, value in saved.items())


@row("OnExceptionCheckpoint")
@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # it makes Lightning look for a run to go on with
def test_on_exception_checkpoint_keeps_what_was_trained(tmp_path: Path) -> None:
    def fail(batch: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(builtin.OnExceptionCheckpoint(tmp_path), AtStep(5, fail))
    assert torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["global_step"] == 5


# Averages ---------------------------------------------------------------------------------------------------


class AtValidation(pl.Callback):
    """Notes the prototypes and the temperature with which validation runs."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        self.states.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})


DECAY = 0.7
PROTOTYPES, TEMPERATURE = (f"head.attention.bank.{name}" for name in ("prototypes", "temperature_state.current"))


@row("WeightAveraging", "EMAWeightAveraging")
@pytest.mark.parametrize(
    "average",
    [
        builtin.WeightAveraging,
        lambda: builtin.EMAWeightAveraging(decay=DECAY),
    ],
)
def test_weight_averages_are_averages_and_validate(average: Callable[[], pl.Callback], tmp_path: Path) -> None:
    states, validated, module = States(), AtValidation(), clustering_module(temperature=absolute(2.0))
    callback = average()
    annealing = TemperatureAnnealing(absolute(2.0), absolute(0.1))
    trainer = fit(annealing, KMeansInitialization(progress=False), callback, states, validated, module=module)
    expected = states.states[0][PROTOTYPES]
    for number, state in enumerate(states.states[1:], 1):
        weight = 1 / (number + 1) if type(callback) is builtin.WeightAveraging else 1 - DECAY
        expected = expected + weight * (state[PROTOTYPES] - expected)
    end = module.state_dict()
    torch.testing.assert_close(end[PROTOTYPES], expected)
    torch.testing.assert_close(validated.states[-1][PROTOTYPES], expected)
    assert not torch.allclose(expected, states.states[-1][PROTOTYPES])
    assert bool(end["head.attention.bank.initialized"])
    # Not an average over the schedule.
    for state in (end, validated.states[-1]):
        torch.testing.assert_close(state[TEMPERATURE], states.states[-1][TEMPERATURE])
    assert trainer.global_step == 12


@row("WeightAveraging")
def test_weight_averages_go_on_after_a_resume(tmp_path: Path) -> None:
    def average() -> pl.Callback:
        return builtin.EMAWeightAveraging(decay=DECAY)

    whole, copy = clustering_module(), clustering_module()
    copy.load_state_dict(whole.state_dict())
    fit(average(), module=whole)
    fit(average(), builtin.ModelCheckpoint(tmp_path / "c", filename="c"), module=copy, max_epochs=2)
    resumed = clustering_module()
    fit(average(), builtin.ModelCheckpoint(tmp_path / "d"), module=resumed, ckpt_path=tmp_path / "c" / "c.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


# Rates and groups -------------------------------------------------------------------------------------------


@row("LearningRateMonitor")
def test_learning_rate_monitor_logs_both_time_scales(tmp_path: Path) -> None:
    monitor = builtin.LearningRateMonitor()
    module = classifier(lr_schedule="linear")
    fit(monitor, module=module, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    rates = {name.rpartition("/")[2]: values for name, values in monitor.lrs.items()}
    assert set(rates) == {"prototypes", "encoder", "task"}
    assert rates["encoder"] == pytest.approx([module.rho * rate for rate in rates["prototypes"]])
    assert rates["prototypes"][-1] < 0.2 * rates["prototypes"][0]


@row("BackboneFinetuning")
def test_backbone_finetuning_trains_the_encoder_from_its_epoch_on() -> None:
    states = States()
    trainer = fit(builtin.BackboneFinetuning(1, lambda epoch: 2.0), states, builtin.LambdaCallback())
    weights = [state["backbone.linear.weight"] for state in states.states]
    assert torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[3], weights[4])
    groups = trainer.optimizers[0].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("prototypes", 0.01), ("encoder", 0.002)]
    assert float(trainer.callback_metrics["rho"]) == pytest.approx(0.2)


class Unfreezing(builtin.BaseFinetuning):
    """Trains the encoder from the second epoch on, with the optimizers given."""

    def __init__(self, *optimizers: int, lr: float = 5e-4) -> None:
        super().__init__()
        self.optimizers, self.lr = optimizers, lr

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1 and any(optimizer is pl_module.trainer.optimizers[number] for number in self.optimizers):
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, self.lr)


@row("BaseFinetuning")
def test_added_groups_follow_the_schedule(tmp_path: Path) -> None:
    monitor = builtin.LearningRateMonitor()
    fit(
        Unfreezing(-1),
        monitor,
        module=classifier(lr_schedule="linear"),
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    rates = next(values for name, values in monitor.lrs.items() if name.endswith("/encoder"))
    task = next(values for name, values in monitor.lrs.items() if name.endswith("/task"))
    ratio = [encoder / rate for encoder, rate in zip(rates, task[-len(rates) :], strict=True)]
    assert ratio == pytest.approx([5e-4 / (0.01 * 2 / 3)] * len(ratio), rel=1e-6)


@row("BaseFinetuning")
def test_added_groups_survive_a_resume(tmp_path: Path) -> None:
    whole = classifier(lr_schedule="cosine")
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    keep = builtin.ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1)
    fit(Unfreezing(-1), keep, module=whole)
    resumed = classifier(lr_schedule="cosine")
    resumed.load_state_dict(start)
    again = builtin.ModelCheckpoint(tmp_path / "d")
    fit(Unfreezing(-1), again, module=resumed, ckpt_path=tmp_path / "c" / "step=8.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@row("BaseFinetuning")
def test_a_parameter_in_two_optimizers_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'backbone\.linear\.\w+' was added to a second one"):
        fit(Unfreezing(0, 1), module=classifier())


@row("BaseFinetuning")
def test_a_group_that_is_faster_than_the_prototypes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must stay below 1"):
        fit(Unfreezing(-1, lr=0.1), module=classifier())


# Stopping, watching, showing --------------------------------------------------------------------------------


@row("EarlyStopping")
def test_early_stopping_stops() -> None:
    trainer = fit(builtin.EarlyStopping("val/loss", min_delta=1e9, patience=1), max_epochs=20)
    assert trainer.current_epoch == 2


@row("Timer")
def test_timer_stops_and_counts() -> None:
    timer = builtin.Timer(timedelta(0))
    assert fit(timer).global_step == 0
    timer = builtin.Timer()
    assert fit(timer).global_step == 12
    assert timer.time_elapsed() > 0


@row("SpikeDetection")
def test_spike_detection_sees_a_spike_and_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="spike detected in batch 2"):
        fit(
            builtin.SpikeDetection(exclude_batches_path=tmp_path),
            AtStep(6, lambda batch: batch["x"].mul_(1e4)),
            module=DDCLReadoutModule(
                clustering_module().backbone,
                DDCLReadout(4, temperature=absolute(2.0), embedding_scale="none"),
                Clustering(4),
            ),
        )
    assert (tmp_path / "skip_batches.json").is_file()
    fit(builtin.SpikeDetection(), builtin.ModelCheckpoint(tmp_path / "c", filename="c"))
    again = builtin.ModelCheckpoint(tmp_path / "d")
    trainer = fit(builtin.SpikeDetection(), again, ckpt_path=tmp_path / "c" / "c.ckpt", max_epochs=4)
    assert trainer.global_step == 16


@row("ThroughputMonitor", "LambdaCallback")
def test_throughput_monitor_and_lambda_callback(tmp_path: Path) -> None:
    steps: list[int] = []
    counting = builtin.LambdaCallback(on_train_batch_end=lambda trainer, *_: steps.append(trainer.global_step))
    monitor = builtin.ThroughputMonitor(batch_size_fn=lambda batch: len(batch["x"]), window_size=2)
    module = clustering_module()
    module.flops_per_batch = 1.0
    fit(monitor, counting, module=module, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    assert "train/device/samples_per_sec" in (tmp_path / "metrics.csv").read_text()
    assert steps == list(range(1, 13))


@row("DeviceStatsMonitor")
def test_device_stats_monitor_logs(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    fit(builtin.DeviceStatsMonitor(), logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    assert "DeviceStatsMonitor.on_train_batch_end" in (tmp_path / "metrics.csv").read_text()


@row("RichModelSummary", "RichProgressBar")
def test_rich_summary_and_bar_show_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    fit(builtin.RichModelSummary(), builtin.RichProgressBar(), enable_progress_bar=True)
    assert "DDCLReadout" in capsys.readouterr().out


@row("ModelSummary", "TQDMProgressBar")
def test_summary_and_bar_show_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    summary = builtin.ModelSummary()
    fit(summary, builtin.TQDMProgressBar(), enable_progress_bar=True)
    assert summary._summary(quiet_trainer(), clustering_module()).total_parameters == 27
    assert "Epoch 2" in capsys.readouterr().out


@row("BasePredictionWriter")
def test_prediction_writers_get_dicts() -> None:
    class Writer(builtin.BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
            self.columns = set(prediction)

        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, *_: Any) -> None:
            self.batches = len(predictions)

    writer = Writer("batch_and_epoch")
    quiet_trainer(callbacks=[writer]).predict(clustering_module(), datamodule=Data())
    assert writer.columns == {"index", "assignments"}
    assert writer.batches == 4


# Search and surgery -----------------------------------------------------------------------------------------


@row("BatchSizeFinder")
@pytest.mark.parametrize(
    "build",
    [
        clustering_module,
        lambda: classifier(lr_schedule=LRSchedule("cosine", warmup_steps=2)),
        lambda: clustering_module(
            prototype_optimizer=OptimizerConfig("TokenNormalized", {"relocation_threshold": 0.5}),
            lr_prototypes=0.05,
        ),
    ],
    ids=["clustering", "schedule", "token_normalized"],
)
def test_batch_size_finder_leaves_no_trace(build: Callable[[], DDCLReadoutModule]) -> None:
    ends = []
    for finder in ([], [builtin.BatchSizeFinder(init_val=16, max_trials=1)]):
        torch.manual_seed(0)
        module = build()
        fit(*finder, KMeansInitialization(progress=False), TemperatureAnnealing(), module=module)
        ends.append(module.state_dict())
    assert [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])] == []


@row("BatchSizeFinder")
def test_the_tuner_scales_the_batch_size() -> None:
    data = Data(8)
    tuner = Tuner(quiet_trainer(max_epochs=1))
    tuner.scale_batch_size(clustering_module(), datamodule=data, init_val=8, max_trials=3)
    assert data.batch_size == 32


@row("ModelPruning")
def test_pruning_prunes_the_encoder_and_no_prototype() -> None:
    module = classifier()
    fit(builtin.ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False), module=module)
    pruned = torch.cat([p.flatten() for name, p in module.named_parameters() if name != PROTOTYPES])
    assert 0.8 < float((pruned == 0).float().mean()) < 1
    assert bool((dict(module.named_parameters())[PROTOTYPES] != 0).all())


# Refused ----------------------------------------------------------------------------------------------------


def unfitted() -> DDCLReadoutModule:
    return DDCLReadoutModule(PCABackbone(4, 3), DDCLReadout(4, temperature=absolute(2.0)), Clustering(4))


def cached() -> DDCLReadoutModule:
    module = clustering_module()
    module.backbone.cache_dir = "somewhere"
    return module


def prune_prototypes() -> Iterator[Any]:
    module = clustering_module()
    yield builtin.ModelPruning("l1_unstructured", [(module.head.attention.bank, "prototypes")])
    yield module


REFUSALS = {
    "GradientAccumulationScheduler": (
        lambda: builtin.GradientAccumulationScheduler({0: 2}),
        None,
        "set its",
    ),
    "LearningRateFinder": (builtin.LearningRateFinder, None, "compare a few values of lr_prototypes"),
    "StochasticWeightAveraging": (lambda: builtin.StochasticWeightAveraging(1e-3), None, "use WeightAveraging"),
    "BatchSizeFinder": (builtin.BatchSizeFinder, unfitted, "call backbone.fit"),
    "EMAWeightAveraging": (lambda: builtin.EMAWeightAveraging(update_starting_at_step=50), None, "start earlier"),
    "BaseFinetuning": (lambda: Unfreezing(-1), cached, "leave out the backbone's cache_dir"),
    "BackboneFinetuning with a task": (lambda: builtin.BackboneFinetuning(1), classifier, "Write a BaseFinetuning"),
    "BackboneFinetuning too fast": (lambda: builtin.BackboneFinetuning(0, lambda e: 9.0), None, "grows less"),
    "BackboneFinetuning of none": (builtin.BackboneFinetuning, lambda: clustering_module(rho=0.0), "rho a value > 0"),
    "BackboneFinetuning schedule": (
        builtin.BackboneFinetuning,
        lambda: clustering_module(lr_schedule="cosine"),
        "lr_schedule='constant'",
    ),
    "BackboneFinetuning tokens": (
        builtin.BackboneFinetuning,
        lambda: clustering_module(prototype_optimizer="TokenNormalized"),
        "such as 'Adam'",
    ),
}


@row(*(name.partition(" ")[0] for name in REFUSALS))
@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_the_first_step_with_the_remedy(case: str) -> None:
    callback, module, remedy = REFUSALS[case]
    states = States()
    with pytest.raises(ValueError, match=remedy) as refusal:
        fit(callback(), states, module=None if module is None else module())
    assert str(refusal.value).startswith(case.partition(" ")[0].replace("BaseFinetuning", "Unfreezing"))
    assert states.states == []


@row("WeightAveraging")
def test_averages_of_a_bank_that_changes_its_size_are_refused() -> None:
    with pytest.raises(ValueError, match="use one of the two"):
        fit(builtin.WeightAveraging(), AdaptiveBankSize())


@row("ModelPruning")
def test_pruning_prototypes_is_refused() -> None:
    pruning, module = prune_prototypes()
    with pytest.raises(ValueError, match="Name other modules in parameters_to_prune"):
        fit(pruning, module=module)


@row("LearningRateFinder")
def test_lr_find_is_refused() -> None:
    with pytest.raises(ValueError, match="compare a few values of lr_prototypes"):
        Tuner(quiet_trainer(max_epochs=1)).lr_find(clustering_module(), datamodule=Data())


# Several processes ------------------------------------------------------------------------------------------


class KeepEncoder(pl.Callback):
    """Writes the encoder of each process where the test can find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(pl_module.backbone.linear.weight.detach(), self.folder / f"{trainer.global_rank}.pt")


def unfreeze(folder: Path) -> None:
    torch.manual_seed(0)
    fit(Unfreezing(-1), KeepEncoder(folder), module=classifier(), strategy="ddp", devices=2, limit_val_batches=0)


@row("BaseFinetuning")
@pytest.mark.slow
def test_an_encoder_unfrozen_under_ddp_stays_the_same_on_all_processes(tmp_path: Path) -> None:
    succeed_in_processes(tmp_path, unfreeze, tmp_path)
    torch.manual_seed(0)
    start = classifier().backbone.linear.weight.detach()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, start)
