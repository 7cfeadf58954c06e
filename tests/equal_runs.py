"""Runs of one recipe in different numbers of processes on the same joint batches, and how far apart they end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddcl_lightning import DDCLReadoutModule
from ddcl_lightning.callbacks import _figures
from ddcl_lightning.cli import main
from tests.processes import run_processes

# Adam would blow the rounding of gradients that are zero up to whole steps.
SGD = ["--model.encoder_optimizer=SGD", "--trainer.max_epochs=2"]
CODES = ["--model.prototype_optimizer=SGD"]


class End(NamedTuple):
    """What a process ends with.

    Attributes:
        state: Weights and buffers.
        logged: The last value of everything logged.
    """

    state: dict[str, Tensor]
    logged: dict[str, float]


def ends(folder: Path, words: list[str], batch_size: int, processes: int) -> list[End]:
    """Fit in that many processes, which share ``batch_size`` rows of a joint batch, and return the end of each.

    Raises:
        RuntimeError: If a process fails, with what it printed.
    """
    parallel = [] if processes == 1 else ["--trainer.strategy=ddp"]
    words = [*words, *parallel, f"--data.init_args.batch_size={batch_size // processes}"]
    stem = str(folder / f"end-{processes}")
    for outcome in run_processes(folder, _fit_and_save, words, processes, stem, processes=processes):
        if outcome.code != 0:
            raise RuntimeError(f"a process ends with {outcome.code}: {outcome.output[-3000:]}")
    return [End(*torch.load(f"{stem}-{rank}.pt", weights_only=True)) for rank in range(processes)]


def relative_differences(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every tensor of a state: the largest difference over the largest value, 0 where nothing differs.

    The power method's direction is left out: where eigenvalues coincide, as those of whitened tokens do, it is any of
    many. The eigenvalue and the temperature that come of it are compared.
    """
    differences = {}
    for key, value in state.items():
        if key.endswith(".covariance.direction"):
            continue
        difference = float((other[key].double() - value.double()).abs().max()) if value.numel() else 0.0
        differences[key] = difference and difference / float(value.double().abs().max())
    return differences


def _fit_and_save(words: list[str], devices: int, stem: str) -> None:
    """Fit, and save what is compared; without the table, and figures are made but not rendered: that takes longest."""
    _figures.write_png = lambda figure, path: None
    end = DDCLReadoutModule.on_fit_end

    def save(module: DDCLReadoutModule) -> None:
        end(module)
        logged: dict[str, Any] = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
        torch.save((module.state_dict(), logged), f"{stem}-{module.trainer.global_rank}.pt")

    DDCLReadoutModule.on_fit_end = save  # type: ignore[method-assign]
    options = [f"--trainer.devices={devices}", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.enable_model_summary=false", "--summary.enabled=false"]
    main(["fit", *words, "--trainer.accelerator=cpu", *options])
