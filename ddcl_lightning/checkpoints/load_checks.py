"""What is checked before a module is made from a checkpoint."""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from ddcl_lightning._utils.arguments import nearest
from ddcl_lightning.checkpoints.trust import check_hyper_parameters, stored_hyper_parameters


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
        ValueError: If an argument is unknown or missing, the file is no checkpoint, or its hyperparameters name
            what :mod:`~ddcl_lightning.checkpoints.trust` does not allow.
    """
    parameters = inspect.signature(module).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    unknown = [name for name in arguments if name not in known and len(known) == len(parameters)]
    if unknown:
        raise ValueError(f"{module.__name__} has no argument {unknown[0]!r}{nearest(unknown[0], known)}")
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
