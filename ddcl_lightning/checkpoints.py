"""Checkpoint files: written whole, and refused in a sentence where they cannot be read."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ddcl_lightning.files import whole_file

_KEYWORDS = ("best", "last", "hpc", "registry")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and puts the result in its place.

    Lightning writes into the folder for temporary files; where that is another file system than the checkpoint's, the
    move is a copy, and a run killed in it leaves a torn file where the last good one was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; what is not a local file goes Lightning's way."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with whole_file(Path(path)) as draft:
            torch.save(checkpoint, draft)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint that ``fit`` wrote.

    Raises:
        ValueError: If there is none, or it cannot be read as one; with the way out.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"ckpt_path must be a checkpoint file; there is none at {str(path)!r}.{_others(file)}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"ckpt_path must be a checkpoint of `ddcl fit`; {str(path)!r} cannot be read as one (torn, or of another "
            f"kind).{_others(file)}"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise ValueError(
            f"ckpt_path must be a checkpoint of `ddcl fit`; {str(path)!r} holds no 'state_dict'.{_others(file)}"
        )
    return state


def _others(file: Path) -> str:
    """The newest checkpoint beside a file that is none."""
    beside = [other for other in file.parent.glob("*.ckpt") if other != file and other.is_file()]
    if not beside:
        return " Take one that `ddcl fit` wrote, below lightning_logs/ by default."
    newest = max(beside, key=lambda other: other.stat().st_mtime)
    return f" Beside it lies {str(newest)!r}."
