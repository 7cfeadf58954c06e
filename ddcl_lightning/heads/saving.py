"""Heads as files: plain data in config.json, weights in model.safetensors, and the Hugging Face hub.

huggingface_hub's mixin is not the base class of heads: it would have to be imported with the package, it makes a head
without its ``build`` and then loads with ``strict=False``, so that every weight is dropped in silence, it loads the
files of one class into another, and it records the first arguments, not what ``bound_scale`` made of them.
"""

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ddcl_lightning._utils.arguments import as_plain
from ddcl_lightning._utils.files import make_folder, whole_file, write_text
from ddcl_lightning.heads.base import AnyHead, Head

if TYPE_CHECKING:
    from types import ModuleType

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def stored_arguments(head: Head) -> dict[str, Any]:
    """The arguments of a head's ``__init__``, read from its attributes; ``embed_dim`` may be missing (see ``build``).

    Raises:
        TypeError: If an argument is kept nowhere.
    """
    name = type(head).__name__
    arguments: dict[str, Any] = {}
    for argument in list(inspect.signature(type(head).__init__).parameters.values())[1:]:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD) or not hasattr(head, argument.name):
            if argument.name == "embed_dim":
                continue
            raise TypeError(
                f"{name} keeps its argument {argument.name!r} nowhere, so it could not be made again. Store it as "
                f"self.{argument.name}, or override init_args()."
            )
        arguments[argument.name] = getattr(head, argument.name)
    return arguments


def describe(head: Head) -> dict[str, Any]:
    """Plain data for :func:`create`: class, ``embed_dim`` and arguments.

    Raises:
        TypeError: If an argument is kept nowhere or is not plain data.
        ValueError: If the head made from it would not have the same weights.
    """
    arguments = {name: as_plain(value) for name, value in head.init_args().items()}
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"argument {name!r} of {type(head).__name__} must be plain data (numbers, strings, lists) to be saved; "
                f"got {type(value).__name__}. Override init_args()."
            ) from None
    config = {"class": _path(type(head)), "embed_dim": head.input_dim, "init_args": arguments}
    # A head that loads into something else, or not at all, is found out by its owner: now.
    if _shapes(create(config)) != _shapes(head):
        raise ValueError(
            f"{type(head).__name__} made again from its arguments, with embed_dim = {head.input_dim}, has other "
            "weights. Call super().build(embed_dim) in its build(), and keep its arguments as they were given."
        )
    return config


def create(config: dict[str, Any]) -> Head:
    """A new head from :func:`describe`'s data, built; the random state stays as it was.

    Raises:
        ValueError: If the data describe no head, or one whose class is not imported.
    """
    if not isinstance(config.get("class"), str) or not isinstance(config.get("init_args"), dict):
        raise ValueError(
            f"{CONFIG} must name the 'class' and 'init_args' of a head; got keys {sorted(config)}. Was it saved by "
            "save_pretrained of a head?"
        )
    path = config["class"]
    known = [kind for kind in _subclasses(Head) if _path(kind) == path]
    if not known:
        raise ValueError(f"the files hold a {path}, a class that is not imported. Import it first.")
    try:
        with torch.random.fork_rng(devices=[]):
            head: Head = known[-1](**config["init_args"])  # the last: a notebook defines a class again and again
            if config.get("embed_dim") is not None:
                head.build(config["embed_dim"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be made from its saved arguments {config['init_args']}: {error}") from error
    return head


def save(head: Head, folder: str | Path) -> None:
    """Write config and weights; see :meth:`Head.save_pretrained`."""
    safetensors = _safetensors()
    config = describe(head)
    folder = Path(folder)
    make_folder(folder, "folder")
    with whole_file(folder / WEIGHTS) as draft:
        try:
            safetensors.save_model(head, str(draft))
        except Exception as error:
            # A class of its own hides the error: "I/O error: ... (os error 28)", in 0.4.3 "IoError(Os { code: 28, ...".
            reason = str(error)
            if "I/O error" not in reason and "IoError" not in reason:
                raise
            number = re.search(r"(?:os error|code:) (\d+)", reason)
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(reason) from error
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load(kind: type[AnyHead], name_or_folder: str | Path, **download: Any) -> AnyHead:
    """Read config and weights; see :meth:`Head.from_pretrained`."""
    safetensors = _safetensors()
    config, weights = (_file(name_or_folder, name, download) for name in (CONFIG, WEIGHTS))
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}. Save the head again.") from None
    head = create(described if isinstance(described, dict) else {})
    if not isinstance(head, kind):
        name = type(head).__name__
        raise ValueError(
            f"{config} describes a {name}, not a {kind.__name__}. Load it with {name}.from_pretrained, or "
            "Head.from_pretrained."
        )
    try:
        for key, value in safetensors.load_file(str(weights)).items():
            if value.is_complex() or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key} must hold finite real numbers")
        safetensors.load_model(head, str(weights), strict=True)
    except Exception as error:  # safetensors' own error is a bare Exception
        raise ValueError(
            f"{weights} does not hold the weights that {CONFIG} beside it describes: {str(error).rstrip('.')}. Save "
            "the head again."
        ) from error
    return head.eval()


def push(head: Head, repo_id: str, *, private: bool | None, token: str | bool | None, commit_message: str) -> str:
    """Upload config and weights; see :meth:`Head.push_to_hub`."""
    api = _hub().HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(head, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url)


def _file(name_or_folder: str | Path, name: str, download: dict[str, Any]) -> Path:
    """A file of the folder, or of the repository after a download."""
    if Path(name_or_folder).is_dir():
        path = Path(name_or_folder) / name
        if not path.is_file():
            raise FileNotFoundError(
                f"the folder {str(name_or_folder)!r} has no {name}; save_pretrained writes {CONFIG} and {WEIGHTS}."
            )
        return path
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(str(name_or_folder), name, **download))
    except (OSError, ValueError, hub.errors.HfHubHTTPError, hub.errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{str(name_or_folder)!r} is not a folder, and no repository of the hub gave {name}: "
            f"{str(error).splitlines()[0].rstrip('.')}. Check the name, and the connection."
        ) from error


def _shapes(head: Head) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in head.state_dict().items()}


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _safetensors() -> "ModuleType":
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading heads needs safetensors: pip install 'ddcl-lightning[hub]'.") from error
    return safetensors.torch


def _hub() -> "ModuleType":
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face hub needs huggingface_hub: pip install 'ddcl-lightning[hub]'. Folders work without it."
        ) from error
    return huggingface_hub
