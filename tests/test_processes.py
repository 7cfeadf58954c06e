"""What is promised of several processes: nothing hangs, and they see what one process sees."""

import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ddcl_lightning import ConvBackbone, ConvDecoder, DDCLReadoutModule, DigitsDataModule, Reconstruction
from ddcl_lightning._utils.distributed import (
    CollectiveError,
    from_first_process,
    is_first_process,
    on_every_process,
    report,
)
from ddcl_lightning.callbacks import FitSummary
from ddcl_lightning.cli.commands import main
from ddcl_lightning.heads import SoftVQ
from ddcl_lightning.recipes import recipe_paths
from tests.equal_runs import CODES, SGD, ends, relative_differences
from tests.processes import join_group, run_processes
from tests.recipe_words import has_prototypes, local_words, short_words
from tests.tiny import quiet_trainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def fit(folder: str, words: list[str], devices: int = 2) -> None:
    main(
        [
            "fit",
            *words,
            "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}",
            f"--trainer.default_root_dir={folder}",
        ]
    )


@pytest.mark.parametrize("name", sorted(recipe_paths()))
def test_recipe_in_two_processes_ends_with_its_table(name: str, tmp_path: Path) -> None:
    words = [f"--config={name}", *short_words(name, tmp_path), "--trainer.max_epochs=2", "--trainer.strategy=ddp"]
    first, second = run_processes(tmp_path, fit, str(tmp_path), words)
    assert (first.code, second.code) == (0, 0), first.output[-3000:] + second.output[-3000:]
    assert " skipped its " not in first.output
    assert "sync_dist" not in first.output + second.output
    table = re.search(r"^prototypes \(last step\)", first.output, re.MULTILINE)
    assert bool(table) == has_prototypes(name)
    assert "prototypes (last step)" not in second.output
    # Once for the run, not for each process.
    assert len(list(tmp_path.rglob("config.yaml"))) == len(list(tmp_path.rglob("events.out.tfevents*"))) == 1


def predict_on_uneven_loaders() -> None:
    """129 rows in batches of 64: one process has a batch more than the other."""
    rows = [{"x": torch.rand(1, 8, 8), "index": torch.tensor(row)} for row in range(129)]
    backbone, decoder = ConvBackbone(in_channels=1, embed_dim=4, widths=[4]), ConvDecoder(1, widths=[4])
    module = DDCLReadoutModule(backbone, SoftVQ(8), Reconstruction(decoder))
    trainer = quiet_trainer(devices=2, strategy="ddp")
    predictions = trainer.predict(module, DataLoader(rows, batch_size=64))
    assert sum(len(batch["index"]) for batch in predictions) == (65 if trainer.global_rank == 0 else 64)


def test_evaluation_waits_for_no_other_process(tmp_path: Path) -> None:
    outcomes = run_processes(tmp_path, predict_on_uneven_loaders)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes


# More prototypes than there are digits, of which some move elsewhere.
RELOCATED = [
    "--model.prototype_optimizer={name: TokenNormalized, args: {relocation_threshold: 0.5}}",
    "--model.lr_prototypes=0.1",
    "--model.head.init_args.num_prototypes=64",
    "--data.init_args.limit=400",
    "--model.rho=0",
]
# Losses over all tokens of texts of different lengths, which processes have different numbers of.
PADDED = [
    "--model.head.init_args.tokens=all",
    "--model.head.init_args.pooling=slots",
    "--model.task.init_args.quantization_weight=1.0",
    "--model.lr_prototypes=0.3",
    "--model.lr_task=0.01",
]


@pytest.mark.parametrize(
    ("name", "batch_size", "processes", "words"),
    [
        ("digits", 240, (2, 3), CODES),  # 1,797 rows: neither these processes nor their batches divide them
        ("digits_adaptive", 240, (2,), CODES),
        ("digits", 60, (2,), RELOCATED),
        ("digits_soft_vq", 240, (2,), []),
        ("digits_rho", 240, (2,), CODES),
        ("digits_vqvae", 240, (2,), CODES),
        ("cifar10_soft_vq", 24, (2,), []),
        ("fashion_mnist_soft_vq", 24, (2,), []),
        ("bert_sst2", 24, (2,), CODES),
        ("bert_sst2", 24, (2,), [*CODES, *PADDED]),
    ],
)
def test_several_processes_equal_one(
    name: str, batch_size: int, processes: tuple[int, ...], words: list[str], tmp_path: Path
) -> None:
    padded = words[-len(PADDED) :] == PADDED
    local = [word for word in local_words(name, tmp_path) if "batch_size" not in word]
    words = [f"--config={name}", *local, *words, *SGD]
    ((state, logged),) = ends(tmp_path, words, batch_size, 1)
    runs = [ends(tmp_path, words, batch_size, number) for number in processes]
    for first, (other_state, other_logged) in [(run[0], end) for run in runs for end in run]:
        assert state.keys() == other_state.keys()
        apart = relative_differences(state, other_state)
        assert max(apart.values()) < 1e-5, apart
        assert all(torch.equal(value, first.state[key]) for key, value in other_state.items())
        assert other_logged == first.logged  # every process has logged the same
        # A mean over a batch's tokens depends on what else is in the batch, and evaluation has smaller ones here; so
        # does the entropy of a batch's codes.
        exact = ("train/",) if padded else ("train/", "val/")
        of_codes = ("val/loss", "val/regularization") if name.endswith("soft_vq") else ()
        for key in (key for key in logged if key.startswith(exact) and key not in of_codes):
            assert other_logged[key] == pytest.approx(logged[key], rel=1e-4, abs=1e-5), key


def alone(case: str) -> None:
    """One process does what it must not do alone, or fails alone."""
    rank = join_group()

    def reduce() -> None:
        dist.all_reduce(torch.ones(1))

    def fail() -> int:
        if rank == 0:
            raise {"memory": MemoryError, "value": ValueError, "unicode": UnicodeError}[case]("there is none")
        return rank

    if case == "report":
        assert report(reduce, "Table") is None
    elif case == "everywhere":
        with pytest.raises(CollectiveError, match="allreduce"):
            on_every_process(reduce)
    else:
        kinds = (MemoryError, ValueError, UnicodeError)
        with pytest.raises(kinds, match="there is none"):
            from_first_process(fail, "it fails")
        with pytest.raises(kinds, match="there is none"):
            on_every_process(fail)
    assert on_every_process(lambda: rank) == rank
    assert from_first_process(lambda: rank, "") == 0
    assert report(lambda: "first", "") == ("first" if is_first_process() else None)


@pytest.mark.parametrize("case", ["report", "everywhere", "memory", "value", "unicode"])
def test_work_of_one_process_cannot_make_the_others_wait(case: str, tmp_path: Path) -> None:
    outcomes = run_processes(tmp_path, alone, case)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    if case == "report":
        assert re.search(r"Table skipped its output .*CollectiveError: c10d.allreduce", outcomes[0].output)


def fail_in_training(words: list[str], failing: int) -> None:
    """A fit in which one process refuses its second batch."""
    step = DDCLReadoutModule.training_step

    def training_step(module: DDCLReadoutModule, batch: Any, batch_idx: int) -> Any:
        if module.global_rank == failing and batch_idx == 1:
            raise ValueError("row 17 of the data is damaged. Remove it.")
        return step(module, batch, batch_idx)

    DDCLReadoutModule.training_step = training_step  # type: ignore[method-assign]
    main(["fit", *words])


def fail_at_the_end(words: list[str], failing: int) -> None:
    """A fit whose training ends well, after which one process fails before the summary."""
    report = FitSummary.on_fit_end

    def summarize(summary: FitSummary, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.global_rank == failing:
            raise ValueError("row 17 of the data is damaged. Remove it.")
        report(summary, trainer, pl_module)

    FitSummary.on_fit_end = summarize  # type: ignore[method-assign]
    main(["fit", *words])


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_after_training_ends_all(failing: int, tmp_path: Path) -> None:
    words = ["--config=digits", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    outcomes = run_processes(tmp_path, fail_at_the_end, [*words, "--trainer.max_epochs=1"], failing, limit=60.0)
    assert all(outcome.code not in (0, None) for outcome in outcomes)
    assert "skipped its table" not in outcomes[1 - failing].output


class FailsAlone(pl.Callback):
    """Fails in one hook of one process.

    Args:
        hook: Its name.
        failing: Rank of the process.
    """

    def __init__(self, hook: str, failing: int) -> None:
        super().__init__()
        self.hook, self.failing = hook, failing

    def __getattribute__(self, name: str) -> Any:
        if name in ("on_fit_end", "on_train_end", "on_validation_end", "on_exception", "teardown"):
            return partial(self._call, name)
        return super().__getattribute__(name)

    def _call(self, name: str, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if name == self.hook and trainer.global_rank == self.failing and not trainer.sanity_checking:
            raise ValueError("the last file cannot be closed. Make room.")


def fail_in_teardown(words: list[str], failing: int) -> None:
    """A fit after which the module of one process fails to clean up."""

    def teardown(module: DDCLReadoutModule, stage: str) -> None:
        if module.global_rank == failing:
            raise ValueError("the last file cannot be closed. Make room.")

    DDCLReadoutModule.teardown = teardown  # type: ignore[method-assign]
    main(["fit", *words])


TWO = ["--config=digits", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("hook", ["teardown", "on_fit_end", "on_train_end", "on_validation_end", "module"])
def test_an_error_of_one_process_in_any_hook_at_the_end_ends_all(hook: str, failing: int, tmp_path: Path) -> None:
    words = [*TWO, "--trainer.max_epochs=1", "--data.limit=400"]
    if hook == "module":
        outcomes = run_processes(tmp_path, fail_in_teardown, words, failing, limit=60.0)
    else:
        callback = f"{{class_path: {__name__}.FailsAlone, init_args: {{hook: {hook}, failing: {failing}}}}}"
        words += [f"--trainer.callbacks+={callback}"]
        outcomes = run_processes(tmp_path, main, ["fit", *words], limit=60.0)
    assert all(outcome.code not in (0, None) for outcome in outcomes), outcomes
    assert "the last file cannot be closed" in outcomes[failing].output
    assert "another process of this run has ended" in outcomes[1 - failing].output


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all(failing: int, tmp_path: Path) -> None:
    words = ["--config=digits", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    outcomes = run_processes(tmp_path, fail_in_training, words, failing, limit=60.0)
    assert all(outcome.code not in (0, None) for outcome in outcomes)
    assert "row 17 of the data is damaged" in outcomes[failing].output
    # The other one does not hide that behind a traceback of its own.
    healthy = outcomes[1 - failing].output
    assert "another process of this run has ended" in healthy
    assert "Traceback" not in healthy


def signalled_in_setup(words: list[str], place: str) -> None:
    """A fit of which the second process is told to end before training."""

    def setup(self: Any, *args: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args, **kwargs)

    owner = {"data": DigitsDataModule, "module": DDCLReadoutModule, "start": FitSummary}[place]
    hook = "on_fit_start" if place == "start" else "setup"
    original: Any = getattr(owner, hook)
    setattr(owner, hook, setup)
    main(["fit", *words])


@pytest.mark.parametrize("place", ["data", "module", "start"])
def test_a_signal_to_one_process_before_training_ends_all_alike(place: str, tmp_path: Path) -> None:
    first, second = run_processes(
        tmp_path, signalled_in_setup, [*TWO, "--trainer.max_epochs=1", "--data.limit=400"], place, limit=60.0
    )
    assert (first.code, second.code) == (143, 143), (first, second)
    assert "Ended by SIGTERM, which another process of this run got." in first.output
    assert "error" not in first.output
    assert "Traceback" not in first.output
