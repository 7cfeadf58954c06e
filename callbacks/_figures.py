"""Where the callbacks' figures go."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

MAX_POINTS = 2000  # of one curve; beyond, every second reading is dropped


def figure_folder(trainer: pl.Trainer) -> Path:
    """Folder of the figures of this run; every process has to ask, since the first one answers for all."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "figures"


def emit(trainer: pl.Trainer, figure: Figure, name: str, folder: Path) -> None:
    """Show a figure in TensorBoard; with another logger, or none, write it to ``folder`` as a PNG file."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    for logger in boards:
        logger.experiment.add_figure(name, figure, global_step=trainer.global_step)
    if not boards:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name.replace('/', '_')}-step={trainer.global_step:06d}.png", dpi=120)
