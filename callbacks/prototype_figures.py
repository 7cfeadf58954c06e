"""Pictures of a bank's life, for TensorBoard or as files."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from matplotlib.figure import Figure

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import callbacks_of
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._base import BankCallback
from ddcl_lightning.callbacks._figures import MAX_POINTS, show
from ddcl_lightning.callbacks.collapse_warning import CollapseWarning
from ddcl_lightning.monitoring.plots import draw_bank, draw_history, draw_usage
from ddcl_lightning.monitoring.recording import BankRecord, over_processes
from ddcl_lightning.monitoring.records import head_name
from ddcl_lightning.monitoring.signals import HeadSignals, read_signals


class PrototypeFigures(BankCallback):
    """Figures every ``every_n_epochs``: signals over time, the bank over the embeddings, the use of prototypes.

    Figures go to TensorBoard; with another logger, or none, they are written as PNG files to the folder ``figures``
    in that of the run.

    Args:
        every_n_epochs: Interval between figures; the end of training is drawn too.
        every_n_batches: Interval between the readings that the curves consist of.

    Raises:
        ValueError: If an interval is below 1.
    """

    @typed
    def __init__(self, every_n_epochs: int = 10, every_n_batches: int = 10) -> None:
        super().__init__(every_n_batches)
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}. Pass 1 or more.")
        self.every_n_epochs = every_n_epochs
        self._history: dict[str, list[dict[str, float]]] = {}
        self._latest: dict[str, tuple[BankRecord, list[HeadSignals]]] = {}
        self._drawn_at = -1
        self._courses: dict[str, Figure] = {}

    def forget(self) -> None:
        """Drop the curves of an earlier run."""
        self._history, self._latest, self._drawn_at = {}, {}, -1

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, records: dict[str, BankRecord]) -> None:
        """Add one point to the curves."""
        for name, observed in over_processes(records).items():
            signals = read_signals(observed)
            self._latest[name] = (observed, signals)
            for head, values in enumerate(signals):
                point = {"step": float(trainer.global_step), **values.scalars()}
                curve = self._history.setdefault(head_name(name, head, len(signals)), [])
                curve.append(point)
                if len(curve) > MAX_POINTS:
                    del curve[1::2]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the figures if this epoch is to be drawn."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the figures of the last epoch, however training ended."""
        super().on_train_end(trainer, pl_module)
        if self._drawn_at != trainer.global_step:
            self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        self._drawn_at = trainer.global_step
        watches = [callback for callback in callbacks_of(trainer) if isinstance(callback, CollapseWarning)]
        self._courses = {f"health/{name}": course for watch in watches for name, course in watch.courses().items()}
        show(trainer, self._figures, type(self).__name__)

    def _figures(self) -> dict[str, Figure]:
        figures = dict(self._courses)
        for name, (observed, signals) in self._latest.items():
            tokens = observed.valid_tokens()
            for head, values in enumerate(signals):
                label = head_name(name, head, len(signals))
                prototypes = observed.codebook[head].float().cpu()
                figures[f"signals/{label}"] = draw_history(self._history[label], label)
                figures[f"bank/{label}"] = draw_bank(tokens[head].float().cpu(), prototypes, label)
                figures[f"usage/{label}"] = draw_usage(values.counts, values.mass, label)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {**super().state_dict(), "history": self._history}

    @restores(batches=int, history=Mapping)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves."""
        super().load_state_dict(state_dict)
        self._history = {label: list(points) for label, points in state_dict["history"].items()}
