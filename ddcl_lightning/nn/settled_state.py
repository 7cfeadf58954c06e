"""State that changes when an optimizer steps and at no other time, so that all calls between two steps agree."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ddcl_lightning.nn.guarded_state import GuardedState

_LIVING: "weakref.WeakSet[SettledState]" = weakref.WeakSet()
_hooked = False


class SettledState(GuardedState):
    """A module that measures in its calls, and takes over what it has measured after the step of an optimizer.

    Calls between two steps read the same then, so that calling twice gives the same twice, batches whose gradients add
    up are treated alike, and a call that checkpointing runs again sees what it saw at first. The very first call,
    before which nothing is known, reads what it measures itself. The step of any optimizer of torch counts.
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
        """Take over what was measured since the last time; for loops in which no optimizer of torch steps."""
        if self._measured:
            self._measured = False
            self.take_over()

    def measured(self, first: Tensor) -> None:
        """Note that a call has measured, to be taken over at once where it is the ``first`` (booleans)."""
        self._measured = True
        self.take_over(first)

    def take_over(self, where: Tensor | bool = True) -> None:
        """Move what calls read to what was measured, ``where`` that is True."""
        raise NotImplementedError

    def begin_from_state(self) -> None:
        """Read from now on what was loaded."""
        raise NotImplementedError


def settle(module: nn.Module) -> None:
    """Let everything in a module take over what it has measured, as after a step."""
    for child in module.modules():
        if isinstance(child, SettledState):
            child.settle()


def _watch(module: SettledState) -> None:
    global _hooked
    _LIVING.add(module)
    if not _hooked:
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for module in list(_LIVING):
        module.settle()


def _after_loading(module: SettledState, incompatible: Any) -> None:
    module.begin_from_state()
