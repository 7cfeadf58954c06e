"""State that changes when an optimizer steps and at no other time, so that all calls between two steps agree."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ddcl_lightning.nn.guarded_state import GuardedState

# By the order in which they were made: settling takes collectives, in the same order on every process.
_LIVING: "weakref.WeakValueDictionary[int, SettledState]" = weakref.WeakValueDictionary()
_numbers = itertools.count()
_hooked = False


class SettledState(GuardedState):
    """A module that measures in its calls, and uses what it has measured from the next optimizer step on.

    All calls between two steps read the same state: calling twice gives the same output twice, batches of accumulated
    gradients are treated alike, and a call that activation checkpointing repeats reads what it read at first. The very
    first call reads what it measures itself. The step of any optimizer of torch counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._measured = False
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _watch(self)  # copies, and what was pickled

    @torch.no_grad()
    def settle(self) -> None:
        """Apply what was measured since the last time; for loops in which no optimizer of torch steps."""
        if self._measured:
            self._measured = False
            self.take_over()

    def settle_after_step(self) -> None:
        """Apply it at the step of an optimizer: :meth:`settle` unless a subclass differs."""
        self.settle()

    def measured(self, first: Tensor) -> None:
        """Mark that a call has measured; where it is the ``first`` (booleans), apply it at once."""
        self._measured = True
        self.take_over(first)

    def take_over(self, where: Tensor | bool = True) -> None:
        """Set what calls read to what was measured, ``where`` that is True."""
        raise NotImplementedError

    def begin_from_state(self) -> None:
        """Set what calls read to what was loaded."""
        raise NotImplementedError


def settle(module: nn.Module) -> None:
    """Apply the measurements of every :class:`SettledState` in a module, as an optimizer step does."""
    for child in module.modules():
        if isinstance(child, SettledState):
            child.settle()


def _watch(module: SettledState) -> None:
    global _hooked
    _LIVING[next(_numbers)] = module
    if not _hooked:
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, module in sorted(_LIVING.items()):
        module.settle_after_step()


def _after_loading(module: SettledState, incompatible: Any) -> None:
    module.begin_from_state()
