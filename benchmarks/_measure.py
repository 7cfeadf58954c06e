"""What studies share and torch is needed for: trainers without output, samples, the memory of a process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


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


def reset_peak() -> bool:
    """Start the peak of this process anew; False where the system cannot (it takes Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Largest resident memory since :func:`reset_peak`, which must have worked."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def in_fresh_process(script: str, function: str, *arguments: Any) -> float:
    """The number that a function of a script returns there; the memory of a process depends on what it did before."""
    code = f"import {Path(script).stem} as study; print(study.{function}(*{arguments!r}))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(script).parent)
    return float(run.stdout)


def all_samples(data: pl.LightningDataModule) -> tuple[Tensor, Tensor]:
    """Features and labels of everything that a data module predicts on."""
    data.setup()
    batches = list(data.predict_dataloader())
    return torch.cat([batch["x"] for batch in batches]), torch.cat([batch["y"] for batch in batches])
