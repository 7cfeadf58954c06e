"""What the cache of frozen features saves: seconds per epoch without it, while it is filled, and from it.

A frozen text encoder, all tokens, a prototype readout and a classifier, three epochs of SST-2: without a cache, with an
empty one, and with one that an earlier run has filled. Then a fill is killed in the middle (SIGKILL) and started again,
and every sample's tokens are held against those of a run without interruption.

    python benchmarks/feature_cache.py --encoder FOLDER --texts FOLDER          # 5 minutes on one core
"""

import multiprocessing
import signal
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from _measure import quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.datamodules import SST2DataModule

EPOCHS, SENTENCES = 3, 3_000
NEEDS = ("encoder", "texts")
CASES = {
    "none": Case("no cache", {"cache": "none"}, NEEDS),
    "empty": Case("empty cache", {"cache": "empty"}, NEEDS),
    "full": Case("the same cache again", {"cache": "full"}, NEEDS),
    "killed": Case("a killed fill, started again", {"cache": "killed"}, NEEDS),
}


def backbone(options: Options, cache: Path | None) -> TransformersBackbone:
    return TransformersBackbone(str(options.encoder), max_length=64, cache_dir=None if cache is None else str(cache))


def data_module(options: Options) -> SST2DataModule:
    limit = 256 if options.quick else SENTENCES
    return SST2DataModule(path=str(options.texts / "sst2_glue.jsonl.gz"), limit=limit, batch_size=64, seed=0)


class Clock(pl.Callback):
    """Seconds of every epoch, and of what comes before the first."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.before, self.epochs = 0.0, []  # type: float, list[float]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the start."""
        self.last = time.perf_counter()
        if trainer.current_epoch == 0:
            self.before = self.last - self.start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the duration."""
        self.epochs.append(time.perf_counter() - self.last)


def run(config: Config, seed: int, options: Options) -> Run:
    """Train, and say how long it took; or kill a fill."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "features"
        if config["cache"] == "killed":
            return killed(options, cache, Path(folder) / "whole")
        if config["cache"] == "full":
            train(options, seed, cache)
        seconds = train(options, seed, None if config["cache"] == "none" else cache)
        size = sum(path.stat().st_size for path in cache.rglob("*.npy"))
    return {**seconds, "mib": round(size / 2**20, 1)}


def train(options: Options, seed: int, cache: Path | None) -> Run:
    pl.seed_everything(seed, verbose=False)
    torch.set_flush_denormal(True)
    module = DDCLReadoutModule(backbone(options, cache), DDCLReadout(16, prototype_dim=64), Classification(2))
    clock = Clock()
    trainer = quiet_trainer(EPOCHS, [clock], limit_val_batches=0)
    clock.start = time.perf_counter()
    trainer.fit(module, datamodule=data_module(options))
    return {"before_s": round(clock.before, 2), "epochs_s": [round(seconds, 2) for seconds in clock.epochs]}


def fill(options: Options, folder: Path) -> tuple[TransformersBackbone, int]:
    """Encode the training data into a cache; also the number of samples that were not there yet."""
    data = data_module(options)
    data.setup()
    filled = backbone(options, folder)
    return filled, filled.fill_cache(data.train_dataloader(), progress=False)


@torch.no_grad()
def killed(options: Options, folder: Path, whole: Path) -> Run:
    """Kill a fill once it has written something, start again, and compare with one that nobody killed."""
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(options, folder))
    process.start()
    assert process.pid is not None
    while process.is_alive() and not list(folder.glob("*/segment-*")):
        time.sleep(0.05)
    process.kill()
    process.join()
    resumed, encoded = fill(options, folder)
    expected, _ = fill(options, whole)
    data = data_module(options)
    data.setup()
    rows = wrong = 0
    for batch in data.train_dataloader():
        left, right = resumed(batch), expected(batch)
        # A sample's neighbours in its batch differ, and with them the last bits of its tokens.
        close = torch.isclose(left.values, right.values, atol=1e-2, rtol=1e-2).flatten(1).all(1)
        assert left.mask is not None
        assert right.mask is not None
        equal = close & (left.mask == right.mask).all(1)
        rows, wrong = rows + len(equal), wrong + int((~equal).sum())
    signalled = process.exitcode == -signal.SIGKILL
    return {"rows": rows, "encoded_after_the_kill": encoded, "wrong_rows": wrong, "signalled": signalled}


def epochs(results: Results) -> Table:
    columns = {
        "before the first epoch": lambda runs: f"{runs[0]['before_s']:.1f} s",
        "each epoch": lambda runs: ", ".join(f"{seconds:.2f}" for seconds in runs[0]["epochs_s"]) + " s",
        "on disk": lambda runs: f"{runs[0]['mib']:.0f} MiB" if runs[0].get("mib") else "-",
    }
    return results.table("run", ("none", "empty", "full"), columns)


def kill(results: Results) -> Table:
    columns = {
        "sentences": lambda runs: f"{runs[0]['rows']:,}",
        "encoded after the kill": lambda runs: f"{runs[0]['encoded_after_the_kill']:,}",
        "rows that differ from an uninterrupted fill": lambda runs: f"{runs[0]['wrong_rows']}",
    }
    return results.table("run", ["killed"], columns)


STUDY = Study(
    "feature_cache",
    CASES,
    run,
    {"epochs": epochs, "killed": kill},
    settings={"epochs": EPOCHS, "sentences": SENTENCES},
    packages=("transformers",),
    threads=2,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
