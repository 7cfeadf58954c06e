"""Checks at the step of an optimizer: prototypes that are in two of them, and state of another size."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_FOLLOWED: "weakref.WeakKeyDictionary[Optimizer, dict[int, str]]" = weakref.WeakKeyDictionary()
_PROTOTYPES: "weakref.WeakValueDictionary[int, Tensor]" = weakref.WeakValueDictionary()
_hooked = False


def follow_alone(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Make steps of other optimizers with these parameters an error, as long as this one follows them.

    An optimizer that followed one of them before no longer does.
    """
    _hook()
    names = {id(parameter): name for name, parameter in parameters.items()}
    for followed in _FOLLOWED.values():
        for shared in names.keys() & followed.keys():
            del followed[shared]
    _FOLLOWED[optimizer] = names


def release(optimizer: Optimizer) -> None:
    """Allow other optimizers the parameters that an optimizer followed."""
    _FOLLOWED.pop(optimizer, None)


def note_prototypes(parameter: Tensor) -> None:
    """Have every optimizer check at its step that its state of these prototypes has their number of rows."""
    if id(parameter) not in _PROTOTYPES:
        _hook()
        _PROTOTYPES[id(parameter)] = parameter


def check_state(optimizer: Optimizer, prototypes: Tensor) -> None:
    """Check the number of rows in an optimizer's state of prototypes.

    Raises:
        RuntimeError: If it is not the number of prototypes.
    """
    held: Mapping[str, Any] = optimizer.state.get(prototypes, {})
    for name, value in held.items():
        # Other states are single numbers, or of a shape that their class chooses.
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] != prototypes.shape[:2]:
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps {name!r} of {value.shape[1]} prototypes per head, of which there "
                f"are {prototypes.shape[1]} now: a state with another number of them was loaded into the one and not "
                "into the other. Create the optimizer after loading the module, or load the state of both."
            )


def _hook() -> None:
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    followed = [(other, names) for other, names in _FOLLOWED.items() if other is not optimizer]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            key = id(parameter)
            if key in _PROTOTYPES:
                check_state(optimizer, parameter)
            for other, names in followed:
                if key in names:
                    raise RuntimeError(
                        f"parameter {names[key]!r} is in two optimizers, {type(other).__name__} and "
                        f"{type(optimizer).__name__}, which would both move it. Leave it out of one of them; a "
                        f"{type(other).__name__} that is not in use any more lets go of it by close()."
                    )
