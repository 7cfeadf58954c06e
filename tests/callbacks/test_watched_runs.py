"""A run is the same whether it is watched or not; a resumed one goes on; several processes find what one finds."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_collapse_warning import Change, Unsupervised, make_one, of_level, started_from, warned
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import QUIET, Project, blobs, fit, loader, read_layer

from ddcl_lightning.callbacks import (
    CollapseWarning,
    DecompositionCheck,
    ExactResume,
    KMeansInitialization,
    TemperatureAnnealing,
)
from tests.processes import results_of_processes
from tests.tiny import absolute


class Mixed(Unsupervised):
    """Dropout, noise, statistics of the batch and a codebook of moving averages that starts by k-means."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.3, **kwargs)
        library = pytest.importorskip("vector_quantize_pytorch")
        self.norm = nn.BatchNorm1d(4)
        self.codes = library.VectorQuantize(dim=4, codebook_size=6, decay=0.9, kmeans_init=True)

    def tokens(self, batch: Any) -> Tensor:
        values = self.norm(super().tokens(batch) + 0.1 * torch.randn(batch[0].shape))
        return values + 0.1 * self.codes(values.unsqueeze(0))[0].squeeze(0)


def probed(*args: Any, **kwargs: Any) -> CollapseWarning:
    """A CollapseWarning with the probe of the toys."""
    return CollapseWarning(*args, **{"probe": read_layer, **kwargs})


def equal(left: Any, right: Any) -> bool:
    """Bit for bit, tensors and NaN too."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, Tensor):
        return torch.equal(left.nan_to_num(7.7), right.nan_to_num(7.7))
    return left == right or (left != left and right != right)


# Without a trace ---------------------------------------------------------------------------------


def end_of_run(make: Any, *watches: pl.Callback) -> dict[str, Any]:
    torch.manual_seed(0)
    module = make()
    check = DecompositionCheck(every_n_batches=1)
    callbacks = [TemperatureAnnealing(interval="step"), KMeansInitialization(progress=False), *watches, check]
    trainer = fit(module, *callbacks, max_epochs=8)
    return {
        "state": copy.deepcopy(module.state_dict()),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        "random": torch.get_rng_state(),
        "checks": check.checks,
        "training": [child.training for child in module.modules()],
    }


class Counted(CollapseWarning):
    """Reads its probe at every reading."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(probe=read_layer, **kwargs)

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().read(trainer, pl_module)
        assert self.monitor.probe is not None
        self.monitor.read_probe()  # at every reading


@pytest.mark.filterwarnings("ignore:.*find_unused:UserWarning")
@pytest.mark.parametrize(
    "make", [lambda: Project(dropout=0.5), lambda: Project(num_heads=2), Mixed], ids=["dropout", "heads", "mixed"]
)
def test_a_watched_run_is_the_unwatched_one_bit_for_bit(make: Any) -> None:
    alone, watched = end_of_run(make), end_of_run(make, Counted(every_n_batches=1))
    for key in alone:
        assert equal(alone[key], watched[key]), key


def test_a_watch_removes_its_hooks_when_a_run_fails() -> None:
    class Failing(Unsupervised):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            if len(self.losses) > 20:
                raise RuntimeError("boom")
            super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, probed(every_n_batches=1), max_epochs=10)
    assert not module.layer.bank._active_observers()


# Resumed -----------------------------------------------------------------------------------------


def sick(epochs: int, watch: CollapseWarning, seed: int, shuffle: bool, ckpt_path: Any = None) -> pl.Trainer:
    torch.manual_seed(seed)
    data = loader(size=192, batch_size=96, shuffle=shuffle)
    module = started_from(blobs()[0][:4])
    callbacks = [ExactResume(), watch, Change(24, make_one)]
    return fit(module, *callbacks, data=data, max_epochs=epochs, ckpt_path=ckpt_path)


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("epochs", [5, 16])
def test_a_resumed_run_finds_and_keeps_what_the_whole_one_does(tmp_path: Path, epochs: int, shuffle: bool) -> None:
    whole, first, rest = (probed(every_n_batches=1) for _ in range(3))
    with warned("Harm"):
        sick(40, whole, 1, shuffle)
        sick(epochs, first, 1, shuffle).save_checkpoint(tmp_path / "first.ckpt")
        sick(40, rest, 2, shuffle, tmp_path / "first.ckpt")
    assert of_level(whole, "alarm")
    assert rest.findings == whole.findings
    assert equal(rest.readings, whole.readings)
    assert equal(rest.state_dict(), whole.state_dict())
    assert rest.report == whole.report or repr(rest.report) == repr(whole.report)


def healthy(epochs: int, watch: CollapseWarning, ckpt_path: Any = None) -> pl.Trainer:
    callbacks = [ExactResume(), KMeansInitialization(progress=False), TemperatureAnnealing(duration=3), watch]
    return fit(Mixed(lr=1e-2), *callbacks, max_epochs=epochs, ckpt_path=ckpt_path)


def test_a_resumed_run_with_noise_and_moving_averages_reads_what_the_whole_one_does(tmp_path: Path) -> None:
    whole, first, rest = (Counted(every_n_batches=2) for _ in range(3))
    healthy(6, whole)
    healthy(3, first).save_checkpoint(tmp_path / "three.ckpt")
    torch.manual_seed(123)
    healthy(6, rest, tmp_path / "three.ckpt")
    assert equal(rest.readings, whole.readings)
    assert equal(rest.state_dict(), whole.state_dict())
    saved = torch.load(tmp_path / "three.ckpt", weights_only=True)["callbacks"]["Counted"]
    assert set(saved["monitor"]["windows"]) == {"layer.bank", "codes"}


def test_the_state_of_a_watch_is_of_bounded_size() -> None:
    watch, sizes = probed(every_n_batches=1), []

    class Sizes(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            windows = watch.state_dict()["monitor"]["windows"]["layer.bank"]
            sizes.append(sum(rows.untyped_storage().nbytes() for rows in windows["sample"]))

    fit(Unsupervised(), watch, Sizes(), data=loader(size=4800, batch_size=480), max_epochs=3)
    assert max(sizes) == sizes[0] <= 3 * 2048 * 5 * 4


# Further runs ------------------------------------------------------------------------------------


def test_another_run_starts_without_memory() -> None:
    watch = probed(every_n_batches=1)
    wide = DataLoader(TensorDataset(100 * blobs()[0], blobs()[1]), batch_size=16)
    fit(Unsupervised(), KMeansInitialization(), watch, TemperatureAnnealing(), data=wide)
    fit(Unsupervised(), KMeansInitialization(), watch, TemperatureAnnealing())
    assert watch.findings == []  # no fall from the separation of the first run
    assert [reading["step"] for reading in watch.readings["layer.bank"]] == list(range(1, 13))


def test_a_run_that_goes_on_keeps_the_first_embeddings_of_its_probe() -> None:
    watch = probed(every_n_batches=1)
    module = started_from(blobs()[0][:4])
    trainer = pl.Trainer(callbacks=[watch], max_epochs=2, **QUIET)
    trainer.fit(module, loader())
    with torch.no_grad():
        make_one(module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert [reading["step"] for reading in watch.readings["layer.bank"]] == list(range(1, 25))
    watch.monitor.read_probe()
    assert watch.monitor._explained["layer.bank"] == [pytest.approx(0)]


# Several processes -------------------------------------------------------------------------------


def watched_here(devices: int) -> dict[str, Any]:
    """What a watch finds in one run of that many processes, on the same joint batches."""
    torch.manual_seed(0)
    watch = probed(every_n_batches=1)
    module = started_from(blobs()[0][:4])
    settings = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "use_distributed_sampler": False}
    trainer = pl.Trainer(callbacks=[watch, Change(12, make_one)], max_epochs=20, **{**QUIET, **settings})
    x, y = (values[trainer.global_rank :: devices] for values in blobs(192))
    data = DataLoader(TensorDataset(x, y), batch_size=96 // devices)
    with warned("Harm") if trainer.global_rank == 0 else nullcontext():
        trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("ddcl/")}
    findings = [[finding.level, finding.sign, finding.codebook, finding.step] for finding in watch.findings]
    return {"findings": findings, "logged": logged, "readings": watch.readings}


def two_processes(rank: int) -> dict[str, Any]:
    return watched_here(2)


@pytest.mark.slow
def test_two_processes_find_and_log_what_one_does(tmp_path: Path) -> None:
    first, second = results_of_processes(tmp_path, two_processes)
    alone = watched_here(1)
    assert first == second
    assert first["findings"] == alone["findings"]
    assert first["logged"].keys() == alone["logged"].keys()
    for name, value in alone["logged"].items():
        assert first["logged"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


class Sometimes(Unsupervised):
    """Only the first process calls the bank in the first batches, and only the second one in the last."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        # T is given, as the tokens of all processes would decide on it together.
        calls = batch_idx < 2 if self.global_rank == 0 else batch_idx >= 4
        loss = self.tokens(batch).sum() + self.layer.bank.prototypes.sum() * 0
        if calls:
            with torch.no_grad():
                self.layer(self.tokens(batch))
        if loss.requires_grad:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def one_after_the_other(rank: int) -> list[float]:
    watch = probed(every_n_batches=1, probe=False)
    trainer = pl.Trainer(callbacks=[watch], max_epochs=2, **{**QUIET, "devices": 2, "strategy": "ddp"})
    trainer.fit(Sometimes(lr=0.0, temperature=absolute()), loader(batch_size=8))
    return [reading["step"] for reading in watch.readings["layer.bank"]]


@pytest.mark.slow
def test_processes_that_do_not_all_call_a_codebook_do_not_wait_for_each_other(tmp_path: Path) -> None:
    first, second = results_of_processes(tmp_path, one_after_the_other)
    assert first == second == [5, 6, 7, 8, 11, 12]  # once both have called it
