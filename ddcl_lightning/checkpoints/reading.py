"""Checkpoint files: written whole, and refused in a sentence where they cannot be read."""

import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ddcl_lightning._utils.files import whole_file
from ddcl_lightning.nn.guarded_state import DAMAGED

NUM_OPTIMIZER_TENSORS = "ddcl_optimizer_tensors"  # key in a checkpoint
HYPER_PARAMETERS = ("hparams", "module_arguments", "hyper_parameters")  # the first two: Lightning's of old
MOST_TRIED = 5  # checkpoints beside a damaged one that are looked into
_KEYWORDS = ("best", "last", "hpc", "registry")


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint writer that writes to a temporary file and renames it.

    Lightning writes into the folder for temporary files; where that is another file system than the checkpoint's, the
    move is a copy, and a run killed in it leaves a torn file where the last good one was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; what is not a local file goes Lightning's way."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with whole_file(Path(path), suffix=".part") as draft, draft.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # that of torch's writer hides the one of the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def is_keyword(path: str | Path) -> bool:
    """True if a ``ckpt_path`` is no file: a word that Lightning resolves, or an address."""
    return str(path) in _KEYWORDS or str(path).startswith("registry:") or "://" in str(path)


def read_checkpoint(path: str | Path, to_resume: bool = False) -> dict[str, Any]:
    """Content of a checkpoint of ``fit``, its tensors without their values; no code in it is run.

    A file is read once, however many ask for it, until it changes.

    Args:
        path: The file.
        to_resume: Whether training is to go on from it, which takes more than weights.

    Raises:
        ValueError: If there is none, or it cannot be read as one; with the way out.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"ckpt_path must be a checkpoint file; there is none at {str(path)!r}.{_others(file)}")
    status = file.stat()
    try:
        state: dict[str, Any] = _read(file, status.st_ino, status.st_size, status.st_mtime_ns)
    except ValueError as error:
        raise ValueError(f"{error}{_others(file, to_resume)}") from error.__cause__
    missing = _missing(state, to_resume)
    if missing:
        raise ValueError(
            f"ckpt_path must be a checkpoint of `ddcl fit`; {str(path)!r} holds no {missing[0]!r}, or not in the form "
            f"that it has there.{_others(file, to_resume)}"
        )
    if damage := _damage(state, to_resume):
        raise ValueError(_damaged(repr(str(path)), damage) + _others(file, to_resume))
    return state


@lru_cache(maxsize=1)
def _read(file: Path, *version: int) -> Any:
    """The file as it is in this version; its archive knows a checksum of each entry, which torch passes over."""
    broken = _broken_entry(file)
    if broken is not None:
        raise ValueError(_damaged(repr(str(file)), f"the checksum of its entry {broken!r} is another one"))
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(file):
            raise ValueError(
                f"ckpt_path must be a checkpoint of `ddcl fit`; {str(file)!r} holds Python objects, which run code "
                "when they are loaded. None was loaded."
            ) from error
        raise ValueError(
            f"ckpt_path must be a checkpoint of `ddcl fit`; {str(file)!r} cannot be read as one: it is torn, or of "
            "another kind."
        ) from error


def _broken_entry(file: Path) -> str | None:
    """Name of an entry of an archive that is not what was written; None where all are, or the file is no archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
        return None  # torch says what it is


def _damaged(which: str, damage: str) -> str:
    return f"ckpt_path must be an undamaged checkpoint; {which} is damaged: {damage}. Take another."


def _damage(state: Mapping[str, Any], to_resume: bool) -> str | None:
    """Reason why no run can have left a checkpoint like this, in words; None where there is none."""
    for name in ("epoch", "global_step"):
        value = state.get(name)
        if not (_is_count(value) or (value is None and not to_resume)):
            return f"{name} must be an integer of at least 0; got {value!r:.40}"
    if not to_resume:
        return None
    if (progress := _broken_progress(state["loops"].get("fit_loop"), "fit_loop")) is not None:
        return progress
    noted = state.get(NUM_OPTIMIZER_TENSORS)
    held = num_optimizer_tensors(state)
    if noted is not None and noted != held:
        return f"its optimizers must hold {noted} tensors, as were written; got {held}"
    return None


def _broken_progress(value: Any, name: str) -> str | None:
    """Reason why a value is no progress of a loop: counts, flags and mappings of them."""
    if isinstance(value, Mapping):
        # What is of others' (the places of loaders) they check themselves.
        inner = ((key, entry) for key, entry in value.items() if not str(key).endswith("state_dict"))
        return next((reason for key, entry in inner if (reason := _broken_progress(entry, str(key)))), None)
    if "." not in name and name != "fit_loop" and (value is None or isinstance(value, bool) or _is_count(value)):
        return None
    return f"{name!r} in its 'loops' must be progress as a run leaves it; got {value!r:.40}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def num_optimizer_tensors(checkpoint: Mapping[str, Any]) -> list[int]:
    """Number of tensors in the state of each optimizer of a checkpoint; one that loses some would begin anew."""
    counts = []
    for optimizer in checkpoint.get("optimizer_states") or ():
        states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
        entries = [entry for entry in states.values() if isinstance(entry, Mapping)] if states else []
        counts.append(sum(isinstance(value, torch.Tensor) for entry in entries for value in entry.values()))
    return counts


def _missing(state: Any, to_resume: bool) -> list[str]:
    """Entries that a checkpoint lacks, or has in another form."""
    forms: dict[str, type] = {"state_dict": dict, "pytorch-lightning_version": str}
    if to_resume:
        forms |= {"loops": dict, "optimizer_states": list, "lr_schedulers": list}
    entries = state if isinstance(state, dict) else {}
    missing = [name for name, form in forms.items() if not isinstance(entries.get(name), form)]
    # Every run of `ddcl fit` has an optimizer: without its state training would go on from another point.
    return missing or ["optimizer_states"] * (to_resume and not entries["optimizer_states"])


def begins_anew(state: Mapping[str, Any]) -> list[str]:
    """Sentences about what a checkpoint lacks, which a run that goes on from it begins anew or cannot compare."""
    sentences = []
    if not any(state.get(key) for key in HYPER_PARAMETERS):
        sentences.append(
            "It holds no 'hyper_parameters': the model is built as the config says, whatever it was trained with."
        )
    if not state.get("callbacks"):
        sentences.append(
            "It holds no 'callbacks': the order of the data, best checkpoints, early stopping, schedules of the "
            "temperature and readings of monitors begin anew."
        )
    return sentences


def _others(file: Path, to_resume: bool = False) -> str:
    """The newest checkpoint beside a file that is none, of those that are whole."""
    beside = [other for other in file.parent.glob("*.ckpt") if other != file and other.is_file()]
    beside.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for other in beside[:MOST_TRIED]:
        if _is_whole(other, to_resume):
            return f" Beside it lies {str(other)!r}."
    return " Take one that `ddcl fit` wrote, below lightning_logs/ by default."


def _is_whole(file: Path, to_resume: bool) -> bool:
    """True if a file can be read, and no number in its weights is NaN or infinite."""
    if _broken_entry(file) is not None:
        return False
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return False
    if _missing(state, to_resume) or _damage(state, to_resume) is not None:
        return False
    tensors = [value for value in state["state_dict"].values() if isinstance(value, torch.Tensor)]
    return all(bool(torch.isfinite(value).all()) for value in tensors)


def cannot_be_restored(error: BaseException, path: Any) -> str:
    """Message for an error, of whatever kind, at which Lightning stopped while it restored a run from a file."""
    return _damaged(repr(str(path)), f"a run cannot go on from it ({type(error).__name__}: {error})")


def other_model(complaint: str, path: Any = None) -> str | None:
    """Message for an error of torch that means a checkpoint of another model or optimizer, or a damaged one, else None.

    Args:
        complaint: The text of the error.
        path: Of the checkpoint, if it is known.
    """
    if not complaint.startswith(("Error(s) in loading state_dict", "loaded state dict")):
        return None
    detail = complaint.partition("\n")[2].partition("\n")[0] or complaint
    first = " ".join(detail.split()).rstrip(". ")
    which = "it" if path is None else repr(str(path))
    broken = next((line.partition(DAMAGED)[0] for line in complaint.splitlines() if DAMAGED in line), None)
    if broken is not None:
        return _damaged(which, broken.strip())
    return (
        f"ckpt_path must be a checkpoint of this model; {which} is of another one ({first}). Use the config that it "
        "was trained with."
    )
