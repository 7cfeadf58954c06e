"""What is checked before a module is made from a checkpoint."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError

from ddcl_lightning._utils.arguments import conform, nearest
from ddcl_lightning.checkpoints.reading import other_model
from ddcl_lightning.checkpoints.trust import check_hyper_parameters, stored_hyper_parameters
from ddcl_lightning.nn.guarded_state import DAMAGED
from ddcl_lightning.optim.schedule import LRSchedule


def check_loading(
    module: type[pl.LightningModule],
    checkpoint: Any,
    arguments: Mapping[str, Any],
    *,
    hparams_file: Any = None,
    weights_only: bool | None = True,
) -> None:
    """Raise unless a class can be made from a checkpoint and arguments, without anything foreign being imported.

    Args:
        module: The class.
        checkpoint: Path, address or open file.
        arguments: What the user gives in place of what the file holds.
        hparams_file: Another file of hyperparameters, if there is one.
        weights_only: False where the user trusts the file; it is not looked into then.

    Raises:
        ValueError: If an argument is unknown, missing or of another type, the file is no checkpoint, or its
            hyperparameters name what :mod:`~ddcl_lightning.checkpoints.trust` does not allow.
    """
    parameters = inspect.signature(module).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    unknown = [name for name in arguments if name not in known and len(known) == len(parameters)]
    if unknown:
        raise ValueError(f"{module.__name__} has no argument {unknown[0]!r}{nearest(unknown[0], known)}")
    if not (isinstance(checkpoint, (str, os.PathLike)) or hasattr(checkpoint, "read")):
        raise ValueError(
            f"checkpoint_path must be a path, an address or an open file; got {checkpoint!r:.80}. Pass the path of a "
            "file that `ddcl fit` or a trainer wrote."
        )
    if hparams_file is not None and not Path(hparams_file).is_file():
        raise ValueError(
            f"hparams_file must be an existing file; got {str(hparams_file)!r}. Correct it or leave it out."
        )
    _check_arguments(module, arguments)
    if not weights_only:
        return
    stored = stored_hyper_parameters(checkpoint)
    held = {name: stored[name] for name in ("_class_path", *known) if name in stored and name not in arguments}
    check_hyper_parameters(module, held, str(checkpoint))
    required = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in required if name not in stored and name not in arguments]
    if missing and hparams_file is None and "_class_path" not in stored:
        raise ValueError(
            f"{', '.join(missing)} must be passed: {str(checkpoint)!r} holds the weights of a module that was built "
            f"from objects, not how to build these. Build them as for training: "
            f"{module.__name__}.load_from_checkpoint(path, {', '.join(f'{name}=...' for name in missing)})."
        )


def _check_arguments(module: type[pl.LightningModule], arguments: Mapping[str, Any]) -> None:
    """Raise for arguments that are not of the type that a class asks for; a mapping with a class_path passes."""
    hints = get_type_hints(module.__init__)
    for name, value in arguments.items():
        kind = hints.get(name)
        if kind is None or (isinstance(value, Mapping) and "class_path" in value):
            continue
        if not (inspect.isclass(kind) and issubclass(kind, torch.nn.Module)):
            conform(name, value, kind)
            if name == "lr_schedule" and isinstance(value, str):
                LRSchedule(value)  # type: ignore[arg-type]  # refused by itself where it is no shape
        elif not isinstance(value, kind):
            raise ValueError(
                f"{name} must be a {kind.__name__}; got {value!r:.80}. Make it as for training, {name}="
                f"{value if isinstance(value, str) and value.isidentifier() else kind.__name__}(...), or leave it out "
                "where the checkpoint says how."
            )


@contextmanager
def loading(module: type[pl.LightningModule], checkpoint: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Context manager in which arguments that do not fit to a checkpoint, or to a class, are one sentence.

    Args:
        module: The class.
        checkpoint: Path, address or open file.
        arguments: What the user gives in place of what the file holds.
    """
    given = " and ".join(arguments) or "arguments"
    try:
        yield
    except ArgumentError as error:
        reasons = " ".join(str(error).split())
        raise ValueError(
            f"{given} must be what {module.__name__} takes; got others ({reasons}). Correct them."
        ) from None
    except RuntimeError as error:
        sentence = other_model(str(error), checkpoint)
        plugins = [name for name in arguments if isinstance(arguments[name], (torch.nn.Module, Mapping))]
        if sentence is None:
            raise
        if plugins and DAMAGED not in str(error):
            reason = sentence.partition("is of another one (")[2].partition("). Use the config")[0]
            raise ValueError(
                f"{' and '.join(plugins)} must be of the model that {str(checkpoint)!r} was trained with; got another "
                f"({reason}). Make it with the same arguments, or leave it out where the checkpoint says how."
            ) from error
        raise ValueError(sentence.replace("ckpt_path", "checkpoint_path", 1)) from error
