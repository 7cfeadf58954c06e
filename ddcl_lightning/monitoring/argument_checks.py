"""Checks of what a plain loop passes to a monitor, so that a slip is one sentence; none waits for a device."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ddcl_lightning._utils.arguments import described

# Entries of the state of a monitor, and their types.
STATE: dict[str, type] = {
    "windows": Mapping,
    "judge": Mapping,
    "counts": Sequence,
    "probe": Mapping,
    "explained": Mapping,
    "losses": Sequence,
}


def require_tensors(required: Sequence[str], **values: Any) -> None:
    """Raise unless arguments are tensors, or None where they are not required.

    Raises:
        TypeError: If one is neither.
    """
    for name, value in values.items():
        if isinstance(value, Tensor) or (value is None and name not in required):
            continue
        rule = "a tensor" if name in required else "a tensor or None"
        remedy = "Convert it with torch.as_tensor" if hasattr(value, "__len__") else "Pass a tensor"
        raise TypeError(f"{name} must be {rule}; got {described(value)}. {remedy}.")


def require_loss(loss: Any) -> None:
    """Raise unless a loss is a number or a tensor of one number; NaN is one here.

    Raises:
        TypeError: If it is anything else.
        ValueError: If it is a tensor of several numbers, or of none.
    """
    rule = "loss must be a number or a tensor of one"
    if not isinstance(loss, Tensor):
        if isinstance(loss, bool) or not isinstance(loss, Real):
            raise TypeError(f"{rule}; got {loss!r:.80}. Pass what the step was trained on, or leave it out.")
    elif loss.is_complex() or (loss.dtype.itemsize == 1 and not loss.is_floating_point()):
        raise TypeError(f"{rule}; got {described(loss)}. Pass what the step was trained on, or leave it out.")
    elif loss.numel() != 1:
        raise ValueError(f"{rule}; got {described(loss)}. Reduce it with .mean().")


def require_check(step: Any, planned_end: Any) -> None:
    """Raise unless a step is an integer, and planned ends map names of banks to temperatures; either may be None.

    Raises:
        TypeError: If one is anything else.
    """
    if step is not None and (isinstance(step, bool) or not hasattr(step, "__index__")):
        raise TypeError(f"step must be an integer or None; got {step!r:.80}. Pass the number of the step.")
    if planned_end is None:
        return
    rule = "planned_end must map the names of banks to the temperatures that their schedules end at, or be None"
    remedy = "Pass {name: temperature} with the names of report()"
    if not isinstance(planned_end, Mapping):
        raise TypeError(f"{rule}; got {planned_end!r:.80}. {remedy}.")
    for name, end in planned_end.items():
        if not isinstance(name, str) or isinstance(end, bool) or not isinstance(end, (Real, Tensor)):
            raise TypeError(f"{rule}; got {name!r:.80}: {end!r:.80}. {remedy}.")
