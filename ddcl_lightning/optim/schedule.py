"""How learning rates go over a run."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LRSchedule:
    """One factor for the learning rates, from step to step.

    Attributes:
        shape: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay to zero after the warm-up.
        warmup_steps: Optimizer steps, at least 0, of linear increase at the start.

    Raises:
        ValueError: If the shape is unknown or the warm-up negative.
    """

    shape: Shape = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"lr_schedule must be one of {get_args(Shape)}; got {self.shape!r}. Choose one of them.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0; got {self.warmup_steps}. Pass 0 or more.")

    @classmethod
    def of(cls, schedule: "Shape | LRSchedule") -> "LRSchedule":
        """The schedule that an argument means: a word is a shape without a warm-up."""
        return schedule if isinstance(schedule, LRSchedule) else cls(schedule)

    def require_length(self, total_steps: float) -> None:
        """Raise a ValueError if the shape needs to know the length of a run that has none."""
        if self.shape != "constant" and not math.isfinite(total_steps):
            raise ValueError(
                f"lr_schedule={self.shape!r} needs a run of known length. Set max_epochs or max_steps, or use "
                "'constant'."
            )

    def factor(self, step: int, total_steps: float) -> float:
        """Factor in [0, 1] for an optimizer step.

        Args:
            step: Steps taken so far, from 0.
            total_steps: Steps of the whole run; infinite is fine for a constant schedule.

        Raises:
            ValueError: If the shape needs to know the length of a run that has none.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        self.require_length(total_steps)
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1.0, total_steps - self.warmup_steps))
        return 1.0 - progress if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
