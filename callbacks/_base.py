"""What the callbacks share: finding the banks, and looking at them every so many batches."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks
from ddcl_lightning.monitoring.sources.finding import Recordable
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import require_banks


def log_name(bank_name: str, signal: str) -> str:
    """Name under which a bank's signal is logged: ``ddcl/<signal>`` and, below it, where the bank sits."""
    return f"ddcl/{signal}/{bank_name}" if bank_name else f"ddcl/{signal}"


def is_new_run(trainer: pl.Trainer, stage: str) -> bool:
    """True if ``setup`` is called for a run that continues no earlier run of this trainer.

    What a callback remembers of another run would mislead it. A checkpoint is restored after ``setup``.
    """
    return stage == "fit" and trainer.current_epoch == 0 and trainer.global_step == 0


class CodebookCallback(Callback):
    """Base of callbacks that read what passes through codebooks in one of ``every_n_batches`` training batches.

    Between these batches nothing is read, copied or synchronized. Variants write :meth:`find`, :meth:`receive` and
    :meth:`read`, and :meth:`forget` where they remember more than the count of batches.

    Args:
        every_n_batches: Interval, at least 1.

    Raises:
        ValueError: If the interval is below 1.
    """

    @typed
    def __init__(self, every_n_batches: int) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1; got {every_n_batches}. Pass 1 to read every batch.")
        self.every_n_batches = every_n_batches
        self._batches = 0
        self._due = self._reads = 0  # batches of this run
        self._codebooks: Mapping[str, Recordable] = {}
        self._recorder: record_codebooks | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop the state of an earlier run of the trainer, unless this one continues it."""
        if is_new_run(trainer, stage):
            self._batches = 0
            self.forget()

    def forget(self) -> None:
        """Drop the state of an earlier run."""

    def bank_resized(self, name: str) -> None:
        """Drop the state of single prototypes of a bank whose number of prototypes has changed."""

    def find(self, pl_module: pl.LightningModule) -> Mapping[str, Recordable]:
        """The codebooks to read, by name."""
        raise NotImplementedError

    def is_due(self) -> bool:
        """True if the next batch, of number ``_batches``, is to be read."""
        return self._batches % self.every_n_batches == 0

    def receive(self, name: str, record: Any) -> None:
        """Take the record of a call on this process."""
        raise NotImplementedError

    def has_read(self) -> bool:
        """True if there were calls on this process since the last reading."""
        raise NotImplementedError

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what was received in one batch.

        Called on all processes where one has anything. What is logged or decided has to be the same on all of them.
        """
        raise NotImplementedError

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the codebooks, which the module may have built in its own ``setup`` or ``configure_model``."""
        self._codebooks = self.find(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the recorder of the codebooks."""
        self._due = self._reads = 0
        self._recorder = record_codebooks(self._codebooks, self.receive)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch the recorder on if this batch is to be read."""
        assert self._recorder is not None
        self._recorder.armed = self.is_due()
        self._batches += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read what was recorded in the batch, and switch the recorder off before a validation."""
        assert self._recorder is not None
        due, self._recorder.armed = self._recorder.armed, False
        if not due:
            return
        self._due += 1
        # Readings are joint: where one process has something to read, all take part.
        if any(gather_objects(self.has_read())):
            self._reads += 1
            self.read(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the recorder, with a warning if no codebook was ever called."""
        self._close()
        if self._codebooks and self._due and not self._reads:
            rank_zero_warn(
                f"{type(self).__name__} saw no call of {', '.join(self._codebooks)} in {self._due} training batches, "
                "so it has looked at nothing. It sees no calls from inside of a compiled module: compile the backbone "
                "only."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the recorder."""
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def state_dict(self) -> dict[str, Any]:
        """Number of batches seen, so that a resumed run looks at the same ones."""
        return {"batches": self._batches}

    @restores(batches=int)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of batches."""
        self._batches = state_dict["batches"]


class BankCallback(CodebookCallback):
    """Base of callbacks that read every bank; where a batch calls one several times, the last call counts.

    Variants write :meth:`observe`.

    Args:
        every_n_batches: Interval, at least 1.

    Raises:
        ValueError: If the interval is below 1, or at the start of training if the module holds no bank.
    """

    def __init__(self, every_n_batches: int) -> None:
        super().__init__(every_n_batches)
        self._banks: dict[str, PrototypeBank] = {}
        self._records: dict[str, BankRecord] = {}

    def find(self, pl_module: pl.LightningModule) -> dict[str, PrototypeBank]:
        """Every bank."""
        self._banks = require_banks(pl_module, type(self).__name__)
        return self._banks

    def receive(self, name: str, record: BankRecord) -> None:
        """Keep the last record of every bank."""
        self._records[name] = record

    def has_read(self) -> bool:
        """True if there are records."""
        return bool(self._records)

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the records to :meth:`observe`."""
        records = dict(self._records)
        self._records.clear()
        self.observe(trainer, pl_module, records)

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, records: dict[str, BankRecord]) -> None:
        """Read the records of one batch on this process, by the name of the bank.

        Called on all processes where one has any. What is logged or decided has to be the same on all of them.
        """
        raise NotImplementedError

    def _close(self) -> None:
        super()._close()
        self._records.clear()
