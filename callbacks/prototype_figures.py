"""Pictures of a bank's life, for TensorBoard or as files."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from ddcl_lightning.callbacks._base import BankCallback
from ddcl_lightning.figures import draw_bank, draw_history, draw_usage
from ddcl_lightning.probe import Observation
from ddcl_lightning.signals import HeadSignals, read_signals


class PrototypeFigures(BankCallback):
    """Draws every ``every_n_epochs``: signals over time, the bank over the embeddings, and the use of prototypes.

    Figures go to TensorBoard; with another logger, or none, they are written as PNG files below the run's folder.

    Args:
        every_n_epochs: Interval between figures; the last epoch is drawn too.
        every_n_batches: Interval between the readings that the curves consist of.

    Raises:
        ValueError: If an interval is below 1.
    """

    def __init__(self, every_n_epochs: int = 10, every_n_batches: int = 10) -> None:
        super().__init__(every_n_batches)
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}.")
        self.every_n_epochs = every_n_epochs
        self._history: dict[str, list[dict[str, float]]] = {}
        self._latest: dict[str, tuple[Observation, list[HeadSignals]]] = {}

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: dict[str, Observation]) -> None:
        """Remember one point of the curves."""
        for name, observed in seen.items():
            signals = read_signals(observed, self._banks[name].detach_assignments)
            self._latest[name] = (observed, signals)
            for head, values in enumerate(signals):
                point = {"step": float(trainer.global_step), **values.scalars()}
                self._history.setdefault(_label(name, head, len(signals)), []).append(point)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, if this epoch is due."""
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if last or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer) -> None:
        for name, (observed, signals) in self._latest.items():
            tokens = observed.valid_tokens()
            for head, values in enumerate(signals):
                label = _label(name, head, len(signals))
                curves = self._history[label]
                self._emit(trainer, f"signals/{label}", draw_history(curves, label))
                bank = draw_bank(tokens[head].float().cpu(), observed.prototypes[head].float().cpu(), label)
                self._emit(trainer, f"bank/{label}", bank)
                self._emit(trainer, f"usage/{label}", draw_usage(values.counts, values.mass, label))

    def _emit(self, trainer: pl.Trainer, name: str, figure: Figure) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for logger in boards:
            logger.experiment.add_figure(name, figure, global_step=trainer.global_step)
        if not boards:
            folder = Path(trainer.log_dir or trainer.default_root_dir) / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            stem = f"{name.replace('/', '_')}-epoch={trainer.current_epoch:04d}.png"
            figure.savefig(folder / stem, dpi=120)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {**super().state_dict(), "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves."""
        super().load_state_dict(state_dict)
        self._history = {label: list(points) for label, points in state_dict["history"].items()}


def _label(name: str, head: int, heads: int) -> str:
    return f"{name}/head{head}" if heads > 1 else name
