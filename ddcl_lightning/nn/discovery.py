"""Finding prototype banks inside any module."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ddcl_lightning._utils.distributed import inform
from ddcl_lightning.nn.bank import PrototypeBank


def find_banks(module: nn.Module) -> dict[str, PrototypeBank]:
    """All prototype banks inside ``module`` by their qualified names, each once, in order of registration."""
    return {name: bank for name, bank in module.named_modules() if isinstance(bank, PrototypeBank)}


def prototypes_of(banks: Iterable[PrototypeBank]) -> list[nn.Parameter]:
    """Prototypes of banks, for an optimizer: those that the bank does not move itself."""
    return [bank.prototypes for bank in banks if isinstance(bank.prototypes, nn.Parameter)]


def require_banks(module: nn.Module, caller: str, pattern: str = "*") -> dict[str, PrototypeBank]:
    """Banks whose name matches the caller's ``banks`` pattern; an error names the caller where there is none.

    A module whose ``banks_optional`` is True may have none: its heads can be swapped, and a callback that has nothing
    to look at then says so and stays idle.
    """
    banks = find_banks(module)
    if not banks and getattr(module, "banks_optional", False):
        inform(f"{caller} stays idle: {type(module).__name__} holds no PrototypeBank.")
    elif not banks:
        raise ValueError(
            f"{caller} found no PrototypeBank in {type(module).__name__}. Give the module a DDCLAttention layer (or "
            "any module that holds a PrototypeBank) as an attribute, or remove the callback."
        )
    chosen = {name: bank for name, bank in banks.items() if fnmatchcase(name, pattern)}
    if banks and not chosen:
        raise ValueError(
            f"banks must match the name of a bank; got {pattern!r} where there are {', '.join(banks)}. Name one of "
            "these, or leave it out for all."
        )
    return chosen
