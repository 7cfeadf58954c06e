"""The run of a checkpoint: settings from which `ddcl explain` rebuilds its model and its data."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from ddcl_lightning.checkpoints.reading import is_keyword, read_checkpoint
from ddcl_lightning.checkpoints.trust import check_hyper_parameters, check_object, stored_hyper_parameters
from ddcl_lightning.cli.config_files import CONFIG_OPTIONS, check_config, options
from ddcl_lightning.cli.output_files import WholeConfig
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks import SemanticIDs

KEY = "ddcl_run"  # of a checkpoint
KEPT = ("seed_everything", "data")
_SILENT = ("--help", "-h", "--print_config")


class SaveRunConfig(WholeConfig):
    """Config of a run in its log folder, whole or not at all; and what rebuilds its data, in its checkpoints."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add seed and data as plain settings."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        checkpoint[KEY] = {name: settings[name] for name in KEPT if settings.get(name) is not None}


def add_run_config(words: Sequence[str]) -> list[str]:
    """Words of a command; those of ``explain`` without a config begin with that of the run which wrote its checkpoint.

    Nothing that it names is run or imported, unless a checkpoint may name it
    (:mod:`~ddcl_lightning.checkpoints.trust`).

    Args:
        words: After ``ddcl``.

    Raises:
        ValueError: If the checkpoint is none, names what it may not, or does not say what model or data it is of.
    """
    names = [word.partition("=")[0] for word in words]
    given = any(name in (*CONFIG_OPTIONS, *_SILENT) or name.split(".")[0] == "--model" for name in names)
    path = dict(options(words)).get("--ckpt_path")  # the last of several
    if words[:1] != ["explain"] or given or (path is not None and is_keyword(path)):
        return list(words)
    if path is None:
        raise ValueError(
            "ckpt_path is needed: without a checkpoint the prototypes are random. Pass --ckpt_path FILE.ckpt, which "
            "`ddcl fit` prints at its end."
        )
    settings = {"model": _model(path)}
    own_data = any(name in ("--data", "--data.class_path") for name in names)
    run = _run(path)
    if not own_data and "data" not in run:
        raise ValueError(
            f"the data of the run that wrote {path!r} cannot be rebuilt: neither the checkpoint nor a config.yaml "
            "beside it says what they were, as after a run in Python. Pass --data NAME and its arguments, or --config "
            "FILE; in Python, call ddcl_lightning.explain.collect(module, datamodule)."
        )
    if own_data:
        run.pop("data", None)
    else:
        check_object(pl.LightningDataModule, run["data"], path, "data")
    text = yaml.safe_dump({**settings, **run}, sort_keys=False)
    return ["explain", f"--config={text}", *words[1:]]


def next_command(trainer: pl.Trainer, model: pl.LightningModule) -> list[str]:
    """Lines at the end of ``fit``: the checkpoint and what to type next; none where no checkpoint was written."""
    paths = [
        path
        for callback in trainer.checkpoint_callbacks
        for path in (getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", ""))
        if path and Path(path).is_file()
    ]
    if not paths:
        return []
    path = _short(paths[0])
    lines = [f"Checkpoint: {path}"]
    if isinstance(model, DDCLReadoutModule) and (find_banks(model.head) or isinstance(model.task, SemanticIDs)):
        lines.append(f"Next: ddcl explain --ckpt_path {shlex.quote(path)}")
    return lines


def _model(path: str) -> dict[str, Any]:
    """Settings of the model in a checkpoint, checked."""
    stored = stored_hyper_parameters(path)
    if not all(isinstance(stored.get(name), Mapping) for name in ("backbone", "head", "task")):
        raise ValueError(
            f"the model in {path!r} cannot be rebuilt: it holds no settings of backbone, head and task, as after a run "
            "in Python. Pass the --config of the model; in Python, call ddcl_lightning.explain.collect(module, "
            "datamodule)."
        )
    check_hyper_parameters(DDCLReadoutModule, stored, path)
    model: dict[str, Any] = _plain({name: value for name, value in stored.items() if not name.startswith("_")})
    return model


def _run(path: str) -> dict[str, Any]:
    """Seed and data of the run, from the checkpoint, else from the config beside it or above its folder."""
    stored = read_checkpoint(path).get(KEY)
    if not isinstance(stored, Mapping):
        folder = Path(path).resolve().parent
        files = [folder / "config.yaml", folder.parent / "config.yaml"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return {}
        check_config(file, "the config beside ckpt_path,")
        stored = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    run: dict[str, Any] = _plain({name: stored[name] for name in KEPT if stored.get(name) is not None})
    return run


def _plain(value: Any) -> Any:
    """Settings in the types that YAML writes."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _short(path: str) -> str:
    """The path from the working folder, where it lies in it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
