"""Resumed runs that repeat the uninterrupted one bit for bit."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.random_state import random_states, set_random_states
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.checkpoints.reading import WholeCheckpointIO


class ExactResume(Callback):
    """Callback that completes Lightning's checkpoints, so that a resumed run equals the uninterrupted one.

    - The states of the random generators (torch on the CPU and the devices, numpy, Python; of every process its own)
      are saved and restored: dropout continues where it was. With another number of processes they are left alone.
    - A checkpoint written at a batch's end knows whether a validation or the end of the epoch was still to come, and
      the resumed run does it, once, with what the epoch had logged.
    - Files are written whole: a run that is killed while it saves leaves the checkpoint before.

    ``DDCLReadoutModule`` brings it along; add it to the trainer of a module of your own. What it cannot know is the
    place in the data: in the middle of an epoch the loader must have ``state_dict`` and ``load_state_dict``, as those
    of the shipped data modules, or the epoch's data start anew.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None
        self._logged: dict[str, torch.Tensor] = {}
        self._before_validation: dict[str, Any] | None = None
        self._device = torch.device("cpu")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Store the device, and have checkpoints written to a temporary file first."""
        self._states, self._logged, self._before_validation = None, {}, None
        self._device = trainer.strategy.root_device
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the progress in the checkpoint to what is left of the epoch, and add what the epoch has logged."""
        compat.settle_progress(trainer, checkpoint)
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own is not None:
            own["logged"] = compat.epoch_metrics(trainer)

    def state_dict(self) -> dict[str, Any]:
        """States of the generators of all processes, in rank order; inside a validation those before it."""
        return {"random": gather_objects(self._before_validation or random_states(self._device))}

    @restores(random=Sequence)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the states of the generators until the run goes on."""
        self._states, self._logged = state_dict["random"], state_dict.get("logged", {})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the generators before the loaders draw the order of a new epoch."""
        self._restore(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the generators inside of an epoch, whose order was drawn before the checkpoint."""
        if compat.resumes_inside_epoch(trainer):
            self._restore(trainer)
            if compat.end_finished_epoch(trainer):
                compat.restore_metrics(trainer, self._logged)
            else:
                self._logged = {}
        self._states = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the generators before a validation: a run that is interrupted in it repeats it from its start."""
        self._before_validation = random_states(self._device) if compat.validation_is_due(trainer) else None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the states from before the validation; checkpoints written from here on follow it."""
        self._before_validation = None
        compat.restore_metrics(trainer, self._logged)  # the validation has cleared them

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the resumed epoch as finished."""
        self._logged = {}
        trainer.fit_loop.epoch_loop.on_iteration_done()

    def _restore(self, trainer: pl.Trainer) -> None:
        if self._states is None:
            return
        if len(self._states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint holds the random states of {len(self._states)} processes and this run has "
                f"{trainer.world_size}, so what it draws differs from the run before."
            )
            self._states = None
            return
        set_random_states(self._states[trainer.global_rank], self._device)
