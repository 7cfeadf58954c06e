"""Where the callbacks' figures go, and when those of validation data are drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.distributed import gather_objects, report
from ddcl_lightning._utils.files import whole_file
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.callbacks._base import is_new_run

MAX_POINTS = 2000  # of one curve; beyond, every second reading is dropped


def figure_folder(trainer: pl.Trainer) -> Path:
    """Folder of the figures of this run; every process has to ask, since the first one answers for all."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "figures"


def show(trainer: pl.Trainer, draw: Callable[[], dict[str, Figure]], name: str) -> None:
    """Draw figures by name on the first process and show them; every process has to call this.

    Args:
        trainer: Whose loggers take the figures.
        draw: Makes them.
        name: Of the callback, for the warning where it fails.
    """
    folder = figure_folder(trainer)

    def draw_and_emit() -> None:
        for label, figure in draw().items():
            emit(trainer, figure, label, folder)

    report(draw_and_emit, name, "its figures")


def emit(trainer: pl.Trainer, figure: Figure, name: str, folder: Path) -> None:
    """Show a figure in TensorBoard; with another logger, or none, write it to ``folder`` as a PNG file."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    for logger in boards:
        logger.experiment.add_figure(name, figure, global_step=trainer.global_step)
    if not boards:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"{name.replace('/', '_')}-step={trainer.global_step:06d}.png") as draft:
            write_png(figure, draft)


def write_png(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure. ``savefig`` would draw it twice, the first time to see where everything goes."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    imsave(path, pixels, format="png", dpi=dpi)


class ValidationFigures(Callback):
    """Base of callbacks with figures of the first validation batch, every ``every_n_epochs`` and at the end.

    Every process evaluates, and the first one draws: variants write :meth:`evaluate` and :meth:`draw`, and
    :meth:`require` and :meth:`forget` where they need more or remember more than the batch.

    Args:
        every_n_epochs: Interval, at least 1.

    Raises:
        ValueError: If the interval is below 1.
    """

    @typed
    def __init__(self, every_n_epochs: int) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}. Pass 1 or more.")
        self.every_n_epochs = every_n_epochs
        self._batch: Batch = None
        self._drawn_at = -1

    def require(self, module: pl.LightningModule) -> None:
        """Raise a ValueError if a module has nothing to draw."""

    def forget(self) -> None:
        """Drop the state of an earlier run."""

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> Any:
        """Values to draw of a batch, on every process, with the module in evaluation mode and without gradients."""
        raise NotImplementedError

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule, evaluated: Any) -> dict[str, Figure]:
        """Figures by name, from what :meth:`evaluate` returned; on the first process alone."""
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module, and drop the state of an earlier run."""
        self.require(pl_module)
        if is_new_run(trainer, stage):
            self._batch, self._drawn_at = None, -1
            self.forget()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch of the validation data."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._batch = batch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the figures if this epoch is to be drawn."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the figures of the last epoch, however training ended."""
        if self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._drawn_at = trainer.global_step
        # A process may have no validation data: then none evaluates, since the forward pass may need all of them.
        if not all(gather_objects(self._batch is not None)):
            return
        with evaluating(module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            evaluated = self.evaluate(trainer, module, self._batch)
        show(trainer, lambda: self.draw(trainer, module, evaluated), type(self).__name__)
