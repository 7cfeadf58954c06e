"""Heads of comparable size: the widest one that a parameter budget allows."""

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import nn

WIDEST = 1 << 20  # no head is wider than this, whatever max_parameters


def widest(count: Callable[[int], int], max_parameters: int, step: int = 1) -> int:
    """The largest multiple of ``step`` whose head has at most ``max_parameters`` parameters.

    Args:
        count: Parameters of a head of a given width; must grow with the width.
        max_parameters: Parameters that the head may have, the task's classifier not included.
        step: What the width must be a multiple of (the number of heads), at least 1.

    Raises:
        ValueError: If not even the narrowest head fits.
    """
    fitting = bisect_right(range(step, min(max_parameters, WIDEST) + step, step), max_parameters, key=count)
    if fitting == 0:
        raise ValueError(
            f"max_parameters must be at least {count(step)}, the parameters of the smallest such head (width {step}); "
            f"got {max_parameters}. Raise it, or ask for fewer queries, codes or blocks."
        )
    return fitting * step


def count_parameters(create: Callable[[], nn.Module]) -> int:
    """Parameters of the module that ``create`` makes; nothing is allocated and no random number drawn."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create().parameters())


def check_width(name: str, width: int | None, max_parameters: int | None) -> None:
    """Raise unless at most one of width and ``max_parameters`` is given, and it is at least 1.

    Args:
        name: Name of the width's argument, for the message.
        width: The width, or None.
        max_parameters: Parameters that the head may have, or None.
    """
    if width is not None and max_parameters is not None:
        raise ValueError(
            f"max_parameters chooses {name}, so give one of them; got {name} = {width} and max_parameters = "
            f"{max_parameters}. Leave the other out."
        )
    for argument, value in ((name, width), ("max_parameters", max_parameters)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, or None; got {value}. Pass 1 or more.")
