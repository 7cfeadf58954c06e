"""Optimizers by name, as recipes give them."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ddcl_lightning._utils.old_names import renamed_argument
from ddcl_lightning.optim.token_normalized import TokenNormalized


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by its name, and its arguments.

    Attributes:
        name: A class of ``torch.optim``, ``"TokenNormalized"``, or a dotted path to an Optimizer.
        args: Arguments of the class other than ``params`` and ``lr``.
    """

    name: str = "Adam"
    args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: "str | OptimizerConfig") -> "OptimizerConfig":
        """The optimizer that an argument means: a word is a name without arguments."""
        return optimizer if isinstance(optimizer, OptimizerConfig) else cls(optimizer)


class OptimizerSpec:
    """The class of an optimizer whose rates are set by the module, with arguments that are known to fit.

    Args:
        argument: Name of the argument that it came from, for errors.
        config: Name and arguments.
        weight_decay: Default weight decay, for classes that have one; None keeps the class's own.

    Raises:
        ValueError: If the class is unknown, an argument is, or ``lr`` is among them.
    """

    def __init__(self, argument: str, config: OptimizerConfig, *, weight_decay: float | None = None) -> None:
        owner = _find(argument, config.name)
        self.argument = argument
        self.optimizer_class: Callable[..., Optimizer] = owner
        self.arguments = dict(config.args)
        if "lr" in self.arguments:
            raise ValueError(
                f"{argument}.args must not contain lr (got {self.arguments['lr']}): the rates follow from "
                "lr_prototypes, rho and lr_task. Set those instead."
            )
        known = set(inspect.signature(self.optimizer_class).parameters) - {"params", "lr"}
        for key in self.arguments:
            if key not in known:
                if renamed := renamed_argument(owner, [key], called=f"{argument}.args"):
                    raise ValueError(renamed)
                raise ValueError(f"{argument}.args has no argument {key!r}{_nearest(key, known)}")
        if weight_decay is not None and "weight_decay" in known:
            self.arguments.setdefault("weight_decay", weight_decay)

    def create(self, groups: list[dict[str, Any]]) -> Optimizer:
        """An optimizer over parameter groups that carry their own ``lr``."""
        largest = max(group["lr"] for group in groups)
        # Not every class has a default rate; the groups' own take precedence.
        try:
            return self.optimizer_class(groups, lr=largest, **self.arguments)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.argument}.args must be arguments that {self.optimizer_class.__name__} takes; got "
                f"{self.arguments} ({error}). Correct or leave out what it does not take."
            ) from error


def _find(argument: str, name: str) -> type[Optimizer]:
    if name == "TokenNormalized":
        return TokenNormalized
    optimizer: object = getattr(torch.optim, name, None)
    if optimizer is None and "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            optimizer = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            optimizer = None
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)) or optimizer is Optimizer:
        names = [key for key, value in vars(torch.optim).items() if isinstance(value, type)]
        raise ValueError(
            f"{argument} must name a class of torch.optim, 'TokenNormalized' or a dotted path to an Optimizer; "
            f"got {name!r}{_nearest(name, [*names, 'TokenNormalized'])}"
        )
    if issubclass(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{argument} must not be LBFGS: it evaluates the loss several times per step. Use Adam or SGD."
        )
    return optimizer


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else "."
