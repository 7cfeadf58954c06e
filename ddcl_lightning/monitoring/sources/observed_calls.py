"""Observing the calls of methods of modules that are not ours, without a trace on the modules."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn


@dataclass
class Call:
    """One call of a method of a module.

    Attributes:
        module: Whose method was called.
        method: Its name.
        args: Positional arguments.
        kwargs: Arguments by name.
        output: The returned value, once there is one.
        state: What an observer keeps between the two ends of the call.
        due: Whether this call is to be recorded.
    """

    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    state: Any = None
    due: bool = True

    def argument(self, position: int, name: str) -> Any:
        """An argument by its position or its name; None where it was not given."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    @property
    def first(self) -> Any:
        """The first argument, whatever its name; None without any."""
        return next(iter((*self.args, *self.kwargs.values())), None)


class CallObserver(Protocol):
    """Protocol of what is shown both ends of a call."""

    def before(self, call: Call) -> None:
        """Read a call before it is computed."""

    def after(self, call: Call) -> None:
        """Read a call with its output."""


@dataclass
class _ObservedMethod:
    """A method of a class that shows the calls of some of its modules to observers."""

    own: bool  # whether the class itself defines it
    original: Callable[..., Any]
    observers: dict[int, list[CallObserver]] = field(default_factory=dict)  # by the id of the module


_METHODS: dict[tuple[type, str], _ObservedMethod] = {}


def observe_calls(module: nn.Module, method: str, observer: CallObserver) -> Callable[[], None]:
    """Show the calls of a method of one module to an observer, until the returned function is called.

    The method is replaced on the class of the module, so that the module, its copies and its pickles stay as they are.
    Calls inside of compiled modules are not shown, nor those of a method that was replaced on the module itself.
    """
    kind = type(module)
    entry = _METHODS.get((kind, method)) or _replace(kind, method)
    observers = entry.observers.setdefault(id(module), [])
    observers.append(observer)

    def end() -> None:
        if observer in observers:
            observers.remove(observer)
        if not observers:
            entry.observers.pop(id(module), None)
        if not entry.observers and _METHODS.get((kind, method)) is entry:
            _put_back(kind, method)

    return end


def _replace(kind: type, method: str) -> _ObservedMethod:
    entry = _ObservedMethod(method in vars(kind), getattr(kind, method))
    original = entry.original

    @functools.wraps(original)
    def observed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        observers = () if torch.compiler.is_compiling() else tuple(entry.observers.get(id(self), ()))
        if not observers:
            return original(self, *args, **kwargs)
        calls = [Call(self, method, args, kwargs) for _ in observers]
        with torch.no_grad():
            for observer, call in zip(observers, calls, strict=True):
                observer.before(call)
        output = original(self, *args, **kwargs)
        with torch.no_grad():
            for observer, call in zip(observers, calls, strict=True):
                call.output = output
                observer.after(call)
        return output

    setattr(kind, method, observed)
    _METHODS[kind, method] = entry
    return entry


def _put_back(kind: type, method: str) -> None:
    entry = _METHODS.pop((kind, method))
    if entry.own:
        setattr(kind, method, entry.original)
    else:
        delattr(kind, method)
