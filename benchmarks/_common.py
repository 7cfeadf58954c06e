"""What the benchmarks share: their options, and writing plain results that name no machine."""

import argparse
import json
import resource
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import sklearn
import torch

from ddcl_lightning._utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny version that only shows that the script runs")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the .json results"
    )
    parser.add_argument("--figures", type=Path, default=ROOT / "docs", help="folder of the pictures")
    return parser


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    return {"torch": torch.__version__, "lightning": lightning.__version__, "scikit-learn": sklearn.__version__}


def save(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Write ``folder/name.json`` at once, so that an interrupted run leaves the previous file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps({"versions": versions(), **result}, indent=1, allow_nan=False) + "\n")
    return path


def load(folder: Path, name: str) -> dict[str, Any]:
    """Read ``folder/name.json``; empty where there is none."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def quiet_trainer(max_epochs: int, callbacks: list[Any], **kwargs: Any) -> pl.Trainer:
    """A trainer on the CPU that prints and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def forget_peak() -> bool:
    """Start the peak of this process anew; False where the system cannot (it takes Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_since_mib() -> float:
    """Largest resident memory since :func:`forget_peak`, which must have worked."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def peak_mib() -> float:
    """Largest resident memory of this process so far; kibibytes on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of a single value is 0."""
    numbers = list(values)
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def plus_minus(values: Iterable[float], digits: int = 3) -> str:
    """``mean ± s.d.`` as text."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
