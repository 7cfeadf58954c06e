"""What a command writes beside its results: config and hyperparameters, whole, and events of TensorBoard."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import csv_logs, tensorboard

from ddcl_lightning._utils.files import make_folder, whole_file

WRITERS = "tensorboard"
LOGGERS: tuple[Any, ...] = (csv_logs, tensorboard)  # those that write hyperparameters


class WholeConfig(SaveConfigCallback):
    """Callback that writes the config of a run into its folder, completely or not at all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["save_to_log_dir"] = False
        super().__init__(*args, **kwargs)
        self._folder = "."

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask for the folder, on every process, and write the config, on the first one."""
        if not self.already_saved:
            self._folder = str(trainer.log_dir or trainer.default_root_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the config."""
        form: dict[str, Any] = {"skip_none": False, "overwrite": self.overwrite, "multifile": self.multifile}
        if "://" in self._folder:
            self.parser.save(self.config, f"{self._folder}/{self.config_filename}", **form)
            return
        make_folder(self._folder, "trainer.default_root_dir")
        with whole_file(Path(self._folder) / self.config_filename) as draft:
            self.parser.save(self.config, str(draft), **{**form, "overwrite": True})


@contextmanager
def whole_hparams() -> Iterator[None]:
    """Context manager in which Lightning's loggers write hparams.yaml whole: one that is there is not written again."""
    before = [module.save_hparams_to_yaml for module in LOGGERS]

    def save(path: Any, hparams: Any, **options: Any) -> None:
        if "://" in str(path):
            save_hparams_to_yaml(path, hparams, **options)
            return
        with whole_file(path) as draft:
            save_hparams_to_yaml(draft, hparams, **options)

    try:
        for module in LOGGERS:
            vars(module)["save_hparams_to_yaml"] = save
        yield
    finally:
        for module, function in zip(LOGGERS, before, strict=True):
            vars(module)["save_hparams_to_yaml"] = function


@contextmanager
def silent_writers(failed: list[OSError]) -> Iterator[None]:
    """Context manager in which a thread that cannot write its files adds the error to a list and prints no traceback.

    The writer hands the same error to the next caller, which stops the run; only a last one would not be noticed.
    """
    before = threading.excepthook

    def hook(problem: Any) -> None:
        if isinstance(problem.exc_value, OSError) and type(problem.thread).__module__.startswith(WRITERS):
            failed.append(problem.exc_value)
        else:
            before(problem)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def events_unwritten(error: OSError) -> str:
    """Message for events of TensorBoard that could not be written."""
    return (
        f"the events of TensorBoard cannot be written ({error.strerror or error}). Make room, choose another place "
        "(--trainer.default_root_dir), or pass --trainer.logger false."
    )
