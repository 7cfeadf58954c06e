"""The mask of a model, handed to the prototypes inside of it."""

import inspect
from typing import Any

from torch import Tensor, nn

from ddcl_lightning.adapters.base import PrototypeAdapter


class MaskReader:
    """Forward pre-hook of a model that hands the model's mask to the adapters inside."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the mask from the arguments of a call."""
        mask = mask_of_call(model, self.argument, args, kwargs)
        for layer in model.modules():
            if isinstance(layer, PrototypeAdapter):
                layer.mask = mask


def mask_of_call(
    model: nn.Module, argument: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of a call of a model, boolean, by the name of its argument; None where it has none."""
    if argument is None:
        return None
    mask: Tensor | None = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get(argument)
    return None if mask is None else mask.bool()
