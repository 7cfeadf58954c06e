"""Observers of the calls of a bank."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.compat import exporting
from ddcl_lightning.functional import BankOutput

if TYPE_CHECKING:
    from ddcl_lightning.nn.bank import PrototypeBank


class BankObserver:
    """Base of observers of the calls of banks; both methods do nothing here.

    Attributes:
        breaks_graphs: Whether it is shown calls in training mode from inside of compiled modules, whose graphs break
            there. Exported ones show none.
    """

    breaks_graphs: bool = False

    def before(self, bank: "PrototypeBank", tokens: Tensor, mask: Tensor | None) -> None:
        """Read the tokens ``(*, H * d)`` and the mask ``(*)`` of a call before it is computed."""

    def after(self, bank: "PrototypeBank", tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        """Read a call after it was computed, and return its output, changed or not."""
        return output


class ObservedModule(nn.Module):
    """A module that shows its calls to observers. It holds weak references to them; copies of it have none."""

    def __init__(self) -> None:
        super().__init__()
        self._observers: list[weakref.ref[BankObserver]] = []
        self._breaks_graphs = False

    def add_observer(self, observer: BankObserver) -> None:
        """Show every call to an observer, as long as a reference to it exists elsewhere."""
        self._observers = [reference for reference in self._observers if reference() is not None]
        self._observers.append(weakref.ref(observer))
        self._breaks_graphs |= observer.breaks_graphs

    def remove_observer(self, observer: BankObserver) -> None:
        """Show no further calls to an observer; no effect if it was not added."""
        self._observers = [reference for reference in self._observers if reference() not in (None, observer)]

    def _active_observers(self) -> list[BankObserver]:
        if torch.compiler.is_compiling():
            breaks_graphs = self._breaks_graphs and self.training and not exporting()
            return self._existing(breaks_graphs=True) if breaks_graphs else []
        return self._existing() if self._observers else []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _existing(self, breaks_graphs: bool = False) -> list[BankObserver]:
        observers = [reference() for reference in self._observers]
        return [
            observer for observer in observers if observer is not None and (observer.breaks_graphs or not breaks_graphs)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_observers": [], "_breaks_graphs": False}
