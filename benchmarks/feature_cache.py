"""What the cache of frozen features saves: seconds per epoch without it, while it is filled, and from it.

A frozen text encoder, all tokens, a prototype readout and a classifier, three epochs of SST-2. One run after the
other in one process: no cache; an empty cache; the same folder in a second run. Then a fill is killed in the middle
(SIGKILL) and started again, and every sample's tokens are held against those of a run without interruption.

    python benchmarks/feature_cache.py --encoder FOLDER          # 5 minutes on one core
    python benchmarks/feature_cache.py --encoder FOLDER --quick

FOLDER is a Hugging Face encoder; the texts are read from ``--data`` (sst2_glue.jsonl.gz). Writes
``feature_cache.json``.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import ROOT, options, quiet_trainer, save

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.datamodules import SST2DataModule

EPOCHS = 3
FILL = "--fill-only"


def backbone(args: argparse.Namespace, cache: Path | None) -> TransformersBackbone:
    return TransformersBackbone(str(args.encoder), max_length=64, cache_dir=None if cache is None else str(cache))


def data_module(args: argparse.Namespace) -> SST2DataModule:
    limit = 256 if args.quick else args.sentences
    return SST2DataModule(path=str(args.data / "sst2_glue.jsonl.gz"), limit=limit, batch_size=64, seed=0)


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


def run(args: argparse.Namespace, cache: Path | None) -> dict[str, Any]:
    """Train, and say how long it took."""
    pl.seed_everything(0, verbose=False)
    module = DDCLReadoutModule(backbone(args, cache), DDCLReadout(16, prototype_dim=64), Classification(2))
    clock = Clock()
    trainer = quiet_trainer(EPOCHS, [clock], limit_val_batches=0)
    clock.start = time.perf_counter()
    trainer.fit(module, datamodule=data_module(args))
    return {"before_s": round(clock.before, 2), "epochs_s": [round(seconds, 2) for seconds in clock.epochs]}


def fill(args: argparse.Namespace, folder: Path) -> tuple[TransformersBackbone, int]:
    """Encode the training data into a cache; also the number of samples that were not there yet."""
    data = data_module(args)
    data.setup()
    made = backbone(args, folder)
    return made, made.fill_cache(data.train_dataloader(), progress=False)


@torch.no_grad()
def killed(args: argparse.Namespace, folder: Path, whole: Path) -> dict[str, int]:
    """Kill a fill once it has written something, start again, and compare with the whole cache."""
    command = [sys.executable, __file__, FILL, str(folder), "--encoder", str(args.encoder), "--data", str(args.data)]
    command += ["--sentences", str(args.sentences), *(["--quick"] if args.quick else [])]
    process = subprocess.Popen(command)
    while process.poll() is None and not list(folder.glob("*/segment-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed, encoded = fill(args, folder)
    expected, missing = fill(args, whole)
    data = data_module(args)
    data.setup()
    rows = wrong = 0
    for batch in data.train_dataloader():
        left, right = resumed(batch), expected(batch)
        # A sample's neighbours in its batch differ, and with them the last bits of its tokens.
        close = torch.isclose(left.values, right.values, atol=1e-2, rtol=1e-2).flatten(1).all(1)
        assert left.mask is not None
        assert right.mask is not None
        same = close & (left.mask == right.mask).all(1)
        rows, wrong = rows + len(same), wrong + int((~same).sum())
    return {"rows": rows, "encoded_after_the_kill": encoded, "missing_from_the_whole": missing, "wrong_rows": wrong}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a Hugging Face encoder")
    shared = Path(os.environ.get("DDCL_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder of the text files")
    parser.add_argument("--sentences", type=int, default=6_000)
    parser.add_argument(FILL, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_flush_denormal(True)
    if args.fill_only:
        fill(args, args.fill_only)
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "features"
        result: dict[str, Any] = {"without": run(args, None), "first": run(args, cache), "second": run(args, cache)}
        result["mib"] = round(sum(path.stat().st_size for path in cache.rglob("*.npy")) / 2**20, 1)
        result["killed"] = killed(args, Path(folder) / "killed", cache)
    save(args.output, "feature_cache", result)
    print("| run | before the first epoch | epochs |\n|---|---|---|")
    for name in ("without", "first", "second"):
        seconds = ", ".join(f"{epoch:.1f}" for epoch in result[name]["epochs_s"])
        print(f"| {name} | {result[name]['before_s']:.1f} s | {seconds} s |")
    print(result["killed"], f"{result['mib']} MiB")


if __name__ == "__main__":
    main()
