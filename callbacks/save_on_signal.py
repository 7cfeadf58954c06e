"""A run that is told to end keeps what it has trained."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.distributed import max_over_processes, report, require_places
from ddcl_lightning._utils.interruption import INTERRUPTION, Interrupted, signal_name

NAME = "interrupted.ckpt"


class SaveOnSignal(Callback):
    """Callback that writes a checkpoint at SIGTERM or Ctrl-C and ends the run, with exit code 143 or 130.

    Training ends after the current step, or inside a validation, which the resumed run repeats. The run ends at once
    where no training is in progress, and at a second signal. With several processes any of them may get the signal:
    they agree on the step after which all end, and a validation that has begun is finished first. The checkpoint goes
    into the folder of ``ModelCheckpoint``; with ``ExactResume``, which ``DDCLReadoutModule`` adds, the run resumed from
    it repeats the uninterrupted one. SIGUSR1 and Lightning's requeueing on SLURM stay as they are.

    The command line adds this callback; add it yourself to a trainer in Python.

    Args:
        enabled: False leaves SIGTERM to Lightning.
        dirpath: Folder for ``interrupted.ckpt``; by default that of ``ModelCheckpoint``, else ``checkpoints`` in the
            logger's folder.

    Raises:
        ValueError: In ``setup``, if files cannot be written into ``dirpath``.
    """

    def __init__(self, enabled: bool = True, dirpath: str | None = None) -> None:
        self.enabled, self.dirpath = enabled, dirpath
        self._owner = False
        self._forget()

    def _forget(self) -> None:
        self._step_before = -1
        self._stepped = False
        self._began = self._complete = False  # training; whether all that it holds belongs together

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the folder, and install the signal handlers before Lightning does."""
        self._forget()
        if not self.enabled:
            return
        if stage == "fit" and self.dirpath:
            require_places({f"dirpath of {type(self).__name__} (interruption.dirpath)": self.dirpath})
        self._owner = INTERRUPTION.begin() or self._owner
        compat.take_signals(trainer, lambda: self._agree(trainer))
        launcher = trainer.strategy.launcher
        if launcher is not None:
            INTERRUPTION.forward = launcher.kill

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember that training has begun, so that a signal writes a checkpoint."""
        self._step_before, self._stepped = trainer.global_step, False
        self._began, INTERRUPTION.deferred = True, self.enabled

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let Lightning end the run after this batch if a signal has come, and no gradients wait for more of them."""
        self._stepped = trainer.global_step > self._step_before
        if self._due() and trainer.world_size == 1:
            self._complete = True
            compat.request_stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End the run inside of a validation if a signal has come, since validations can be long."""
        if self._began and trainer.world_size == 1 and self._due():
            self._end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that training is over, so that a signal ends the process at once."""
        self._stepped = True
        self._agree(trainer)
        self._complete, INTERRUPTION.deferred = trainer.world_size == 1, False

    def _due(self) -> bool:
        return self.enabled and INTERRUPTION.received is not None and self._stepped

    def _agree(self, trainer: pl.Trainer) -> None:
        """End the run in all processes if one of them has got a signal; all have to come here."""
        due = torch.tensor(INTERRUPTION.received if self._due() else 0, device=trainer.strategy.root_device)
        number = int(max_over_processes(due))
        if number:
            INTERRUPTION.received = number
            self._end()

    def _end(self) -> None:
        self._complete = True
        assert INTERRUPTION.received is not None
        raise Interrupted(INTERRUPTION.received)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the checkpoint of an interrupted run, and print its path."""
        number = INTERRUPTION.received
        INTERRUPTION.deferred = False
        if self.enabled and number is not None and isinstance(exception, SIGTERMException):
            exception.code = 128 + number
            message = f"Ended by {signal_name(number)} at step {trainer.global_step}. {self._keep(trainer)}"
            report(lambda: print(message, file=sys.stderr, flush=True), type(self).__name__)
            if isinstance(exception, Interrupted):
                exception.reported = True
        if self._owner:
            compat.return_signals(trainer)
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers from before."""
        self._release()

    def _release(self) -> None:
        if self._owner:
            INTERRUPTION.end()
            self._owner = False

    def _keep(self, trainer: pl.Trainer) -> str:
        if not self._began:
            return "Nothing was trained, so nothing is lost."
        if self._complete:
            path = self._path(trainer)
            trainer.save_checkpoint(path, weights_only=False)  # not left to a default that Lightning reports
            return f"Go on with the checkpoint of that step: --ckpt_path {path}"
        latest = [
            path
            for callback in trainer.checkpoint_callbacks
            for path in (getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", ""))
            if path
        ]
        return f"The latest checkpoint is {latest[0]}." if latest else "There is no checkpoint of it."

    def _path(self, trainer: pl.Trainer) -> str:
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None)
        if not folder:
            folder = os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        return str(Path(folder) / NAME)
