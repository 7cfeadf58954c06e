"""Signed numbers that still add up when they are printed."""

import math
from collections.abc import Sequence

MINUS = "\u2212"
FOR, AGAINST = 255, 45  # CSS hues


def digits_for(values: Sequence[float]) -> int:
    """Decimal places, from 2 to 6, at which the largest of some values has three digits or more."""
    largest = max((abs(value) for value in values), default=0.0)
    if not largest:
        return 2
    return min(6, max(2, 2 - math.floor(math.log10(largest))))


def apportioned(values: Sequence[float], digits: int, total: float | None = None) -> list[float]:
    """Values rounded to decimal places that sum to a rounded total: each is off by about one last place at most.

    Those that rounding down cuts the most are rounded up (the method of the largest remainders); ties go to the first.

    Args:
        values: At least one.
        digits: Decimal places.
        total: What they sum to up to rounding; by default their sum.
    """
    scale = 10**digits
    floors = [math.floor(value * scale) for value in values]
    order = sorted(range(len(values)), key=lambda at: (floors[at] - values[at] * scale, at))
    missing = round((math.fsum(values) if total is None else total) * scale) - sum(floors)
    step = 1 if missing > 0 else -1
    for turn in range(abs(missing)):
        floors[order[turn % len(order)] if step > 0 else order[-1 - turn % len(order)]] += step
    return [floor / scale for floor in floors]


def signed(value: float, digits: int = 2) -> str:
    """Number with its sign: ``+0.31``, a true minus below zero, ``0.00`` without any."""
    text = f"{abs(value):,.{digits}f}"
    if not float(text.replace(",", "")):
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def sign_hue(value: float) -> int:
    """CSS hue of what speaks for a class, or against it."""
    return FOR if value >= 0 else AGAINST


def level(value: float, largest: float) -> float:
    """Strength of a tint in [0, 1], in steps of a quarter: 0 below an eighth of the largest value."""
    return min(4, round(4 * abs(value) / largest)) / 4 if largest > 0 else 0.0


def sign_bar(value: float, largest: float) -> str:
    """A bar from the middle to the right for a positive value, to the left for a negative one."""
    width = 50 * min(1.0, abs(value) / largest) if largest > 0 else 0.0
    side = "left:50%" if value >= 0 else "right:50%"
    fill = f'<span class="fill" style="--h:{sign_hue(value)};{side};width:{width:.1f}%"></span>'
    return f'<span class="axis">{fill}</span>'
