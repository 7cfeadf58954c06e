"""Pretrained models from a folder, the local cache or the Hugging Face hub, each failing in one sentence and soon."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

TIMEOUT_SECONDS = 5.0  # for one answer of the hub; its own client retries for 23 s a file before it gives up


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        ImportError: If it is missing, naming the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this backbone needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'ddcl-lightning[{extra}]'."
        ) from None


def hub_unavailable() -> str | None:
    """Reason why the Hugging Face hub cannot be reached now, in a few words; None where it can."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # the exceptions are those of whichever HTTP library the hub's client uses
        return f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
    return None


def from_cache_or_hub(load: Callable[[bool], T], model: str, remedy: str) -> T:
    """Result of ``load(local_files_only)``, from the local cache if it is there, else from the hub.

    The cache goes first, so that a model which was downloaded once needs no network and does not change.

    Raises:
        OSError: If neither has it, with ``remedy`` at the end.
    """
    try:
        return load(True)
    except OSError:
        why = hub_unavailable()
    if why is None:
        try:
            return load(False)
        except OSError as error:
            why = f"the hub does not offer it ({first_line(error)})"
    raise OSError(f"model {model!r} is neither a local folder nor in the local cache, and {why}. {remedy}") from None


def local_folder(model: str) -> Path | None:
    """The folder that ``model`` names, or None for a name on the hub.

    Raises:
        FileNotFoundError: If it looks like a path but is no folder, or the folder holds no config.json.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"model {model!r} is a folder without a config.json; pass the folder that save_pretrained wrote, or "
                "the one inside it that holds config.json."
            )
        return folder
    # Names on the hub are "name" or "owner/name".
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1 or folder.is_file():
        raise FileNotFoundError(f"model {model!r} looks like a path but is no folder; check where it lies.")
    return None


def text_instead(file: Path) -> str | None:
    """Text in a file that should hold weights, such as a web page or a Git LFS pointer; None for other files."""
    with file.open("rb") as opened:
        start = opened.read(60)
    if not start:
        return f"{file.name} is empty"
    try:
        line = start.decode("ascii").lstrip().partition("\n")[0].rstrip()
    except UnicodeDecodeError:
        return None
    return f"{file.name} is no file of weights but text: {line!r}" if line.isprintable() else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
