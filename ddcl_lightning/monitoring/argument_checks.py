"""Checks of what a plain loop passes to a monitor, so that a slip is one sentence; none waits for a device."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

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


def require_reaction(on_collapse: str) -> None:
    """Raise a ValueError unless a plain loop can react so to an alarm."""
    if on_collapse not in ("warn", "raise", "ignore"):
        raise ValueError(
            f"on_collapse must be 'warn', 'raise' or 'ignore'; got {on_collapse!r}. A loop of your own is ended by "
            "'raise', or by what check returns."
        )


def require_model(model: nn.Module | None, codebooks: Mapping[str, Any], probe: Any) -> None:
    """Raise a ValueError for a model without codebooks, and for a probe without a model."""
    if model is not None and not codebooks:
        raise ValueError(
            f"model must hold a codebook that is recognised; got none in {type(model).__name__}. Name its module "
            "(named=['quantizer.embedding']), with a function that reads its calls where it is neither nn.Linear "
            "nor nn.Embedding; or call update(tokens, codebook, indices) in the loop."
        )
    if probe is not None and model is None:
        raise ValueError("probe needs the model that it calls; got no model. Pass it as the first argument.")


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
    """Raise unless a step is an integer >= 0, and planned ends map names of banks to temperatures; either may be None.

    Raises:
        TypeError: If one is anything else.
        ValueError: If the step is below 0.
    """
    if step is not None and (isinstance(step, bool) or not hasattr(step, "__index__")):
        raise TypeError(f"step must be an integer or None; got {step!r:.80}. Pass the number of the step.")
    if step is not None and step < 0:
        raise ValueError(f"step must be at least 0; got {step}. Pass the number of the step, or leave it out.")
    if planned_end is None:
        return
    rule = "planned_end must map the names of banks to the temperatures that their schedules end at, or be None"
    remedy = "Pass {name: temperature} with the names of report()"
    if not isinstance(planned_end, Mapping):
        raise TypeError(f"{rule}; got {planned_end!r:.80}. {remedy}.")
    for name, end in planned_end.items():
        if not isinstance(name, str) or isinstance(end, bool) or not isinstance(end, (Real, Tensor)):
            raise TypeError(f"{rule}; got {name!r:.80}: {end!r:.80}. {remedy}.")
