"""The mask of a model, handed to the prototypes inside of it."""

import inspect
from typing import Any

from torch import nn

from ddcl_lightning.adapters.base import PrototypeAdapter


class MaskReader:
    """The forward pre-hook of a model: hands its mask to what is placed inside."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the mask from the arguments of a call."""
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get(self.argument)
        for layer in model.modules():
            if isinstance(layer, PrototypeAdapter):
                layer.mask = None if given is None else given.bool()
