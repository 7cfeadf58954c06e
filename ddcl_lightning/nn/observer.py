"""Observers of the calls of a bank."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddcl_lightning.functional import BankOutput

if TYPE_CHECKING:
    from ddcl_lightning.nn.bank import PrototypeBank


class BankObserver:
    """Is shown the calls of banks that it was added to; both methods do nothing here.

    Attributes:
        breaks_graphs: Whether it is shown calls from inside of compiled modules, whose graphs break there.
    """

    breaks_graphs: bool = False

    def before(self, bank: "PrototypeBank", tokens: Tensor, mask: Tensor | None) -> None:
        """See the tokens ``(*, H * d)`` and the mask ``(*)`` of a call that is about to be computed."""

    def after(self, bank: "PrototypeBank", tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        """See a call that was computed, and return what it returns."""
        return output


class ObservedModule(nn.Module):
    """A module that shows its calls to observers, which it does not keep alive; copies of it have none."""

    def __init__(self) -> None:
        super().__init__()
        self._observers: list[weakref.ref[BankObserver]] = []
        self._breaks_graphs = False

    def add_observer(self, observer: BankObserver) -> None:
        """Show every call to an observer for as long as somebody else holds it."""
        self._observers = [reference for reference in self._observers if reference() is not None]
        self._observers.append(weakref.ref(observer))
        self._breaks_graphs |= observer.breaks_graphs

    def remove_observer(self, observer: BankObserver) -> None:
        """Show it no further calls; nothing happens if it was not shown any."""
        self._observers = [reference for reference in self._observers if reference() not in (None, observer)]

    def _watching(self) -> list[BankObserver]:
        if torch.compiler.is_compiling():
            return self._living(breaks_graphs=True) if self._breaks_graphs else []
        return self._living() if self._observers else []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _living(self, breaks_graphs: bool = False) -> list[BankObserver]:
        observers = [reference() for reference in self._observers]
        return [
            observer for observer in observers if observer is not None and (observer.breaks_graphs or not breaks_graphs)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_observers": [], "_breaks_graphs": False}
