"""Heads of comparable size: the widest one that a parameter budget allows."""

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import nn

WIDEST = 1 << 20  # no head is wider than this, whatever the budget


def widest(count: Callable[[int], int], budget: int, step: int = 1) -> int:
    """The largest multiple of ``step`` whose head has at most ``budget`` parameters.

    Args:
        count: Parameters of a head of a given width; must grow with the width.
        budget: Parameters that the head may have, the task's classifier not included.
        step: What the width must be a multiple of (the number of heads), at least 1.

    Raises:
        ValueError: If not even the narrowest head fits.
    """
    fitting = bisect_right(range(step, min(budget, WIDEST) + step, step), budget, key=count)
    if fitting == 0:
        raise ValueError(
            f"budget must be at least {count(step)}, the parameters of the smallest such head (width {step}); got "
            f"{budget}. Raise it, or ask for fewer queries, codes or blocks."
        )
    return fitting * step


def count_parameters(create: Callable[[], nn.Module]) -> int:
    """Parameters of the module that ``create`` makes; nothing is allocated and no random number drawn."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create().parameters())


def check_width(name: str, width: int | None, budget: int | None) -> None:
    """Raise unless at most one of width and budget is given, and it is at least 1.

    Args:
        name: Name of the width's argument, for the message.
        width: The width, or None.
        budget: The parameter budget, or None.
    """
    if width is not None and budget is not None:
        raise ValueError(f"budget chooses {name}, so give one of them; got {name} = {width} and budget = {budget}.")
    for argument, value in ((name, width), ("budget", budget)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, or None; got {value}.")
