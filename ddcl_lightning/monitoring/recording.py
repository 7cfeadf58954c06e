"""Finding prototype banks inside any module, and looking at what passes through them."""

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ddcl_lightning._utils.distributed import gather_objects, gather_rows, sum_over_processes, world_size
from ddcl_lightning.functional import BankOutput, Decomposition
from ddcl_lightning.nn.bank import PrototypeBank


@dataclass(frozen=True)
class Observation:
    """What one forward call of a bank saw and returned; tensors are detached, prototypes and T copied at the call.

    Attributes:
        tokens: ``(H, N, d)``.
        mask: ``(H, N)`` boolean or None.
        prototypes: ``(H, K, d)``.
        temperature: ``(H,)``.
        terms: The terms that the call returned, ``(H,)`` each.
    """

    tokens: Tensor
    mask: Tensor | None
    prototypes: Tensor
    temperature: Tensor
    terms: Decomposition

    def valid_tokens(self) -> Tensor:
        """Tokens without padding, ``(H, M, d)``."""
        return self.tokens if self.mask is None else self.tokens[:, self.mask[0]]


def over_processes(observations: Mapping[str, Observation]) -> dict[str, Observation]:
    """The observations of all processes as one per bank, the same everywhere: their valid tokens in rank order.

    Banks that some process has not called are left out. Terms are means over all tokens.
    """
    if world_size() == 1:
        return dict(observations)
    called = gather_objects(list(observations))
    return {name: _joint(observed) for name, observed in observations.items() if all(name in names for names in called)}


def _joint(observed: Observation) -> Observation:
    tokens = observed.valid_tokens()
    rows = gather_rows(tokens.transpose(0, 1).contiguous()).transpose(0, 1)
    share = tokens.shape[1] / max(rows.shape[1], 1)
    terms = Decomposition(*(sum_over_processes(term * share) for term in observed.terms))
    return Observation(rows, None, observed.prototypes, observed.temperature, terms)


Observer = Callable[[str, Observation], None]


class BankHook:
    """A forward hook of one bank: on copies of the bank, pickled or deep, it is idle, as it is when its owner is gone.

    Args:
        name: Name of the bank.
        bank: The bank.
        look: Method of the owner, called with the name and what a forward hook is called with.
        of_training: Show calls in training mode only, and those inside of a compiled module too, whose graph breaks
            there.
    """

    def __init__(
        self,
        name: str = "",
        bank: PrototypeBank | None = None,
        look: "weakref.WeakMethod[Any] | None" = None,
        of_training: bool = False,
    ) -> None:
        self._name, self._look, self._of_training = name, look, of_training
        self._bank = None if bank is None else weakref.ref(bank)

    def __call__(
        self, bank: PrototypeBank, args: tuple[Any, ...], kwargs: dict[str, Any], output: BankOutput
    ) -> BankOutput | None:
        """What the bank returns in place of its output, or None."""
        if self._of_training:
            return self._show_eagerly(bank, args, kwargs, output) if bank.training else None
        return None if torch.compiler.is_compiling() else self._show(bank, args, kwargs, output)

    def _show(
        self, bank: PrototypeBank, args: tuple[Any, ...], kwargs: dict[str, Any], output: BankOutput
    ) -> BankOutput | None:
        look = None if self._look is None or self._bank is None or self._bank() is not bank else self._look()
        shown: BankOutput | None = None if look is None else look(self._name, bank, args, kwargs, output)
        return shown

    _show_eagerly = torch.compiler.disable(_show)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[type["BankHook"], tuple[()]]:
        return BankHook, ()


class BankProbe:
    """Calls an observer on every forward of the given banks while armed; costs nothing otherwise.

    Args:
        banks: Banks by name.
        observer: Called with the name and the observation.
    """

    def __init__(self, banks: Mapping[str, PrototypeBank], observer: Observer) -> None:
        self.armed = False
        self._observer = observer
        look = weakref.WeakMethod(self._look)
        self._handles: list[RemovableHandle] = [
            bank.register_forward_hook(BankHook(name, bank, look), with_kwargs=True) for name, bank in banks.items()
        ]

    def _look(
        self, name: str, bank: PrototypeBank, args: tuple[Any, ...], kwargs: dict[str, Any], output: BankOutput
    ) -> None:
        if not self.armed:
            return
        tokens, mask = bank_inputs(bank, args, kwargs)
        heads, flat_mask = bank.split_heads(tokens.detach(), mask)
        terms = Decomposition(*((term.detach() / output.scale).to(term.dtype) for term in output.terms))
        prototypes, temperature = bank.prototypes.detach().clone(), bank.temperature.clone()
        self._observer(name, Observation(heads, flat_mask, prototypes, temperature, terms))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "BankProbe":
        self.armed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bank_inputs(bank: PrototypeBank, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Tokens and mask of a call of ``bank.forward``, however they were passed."""
    bound = inspect.signature(type(bank).forward).bind(bank, *args, **kwargs).arguments
    tokens: Tensor = bound["tokens"]
    mask: Tensor | None = bound.get("mask")
    return tokens, mask


def all_tokens(observation: Observation) -> Tensor:
    """Valid tokens ``(M, H, d)`` on the CPU in float32: one row per token, the heads side by side."""
    return observation.valid_tokens().transpose(0, 1).to("cpu", torch.float32)
