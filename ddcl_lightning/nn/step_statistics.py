"""Statistics of the tokens that belong to an optimizer step: those of calls that a backward pass went through."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ddcl_lightning._utils.compat import recomputing
from ddcl_lightning._utils.distributed import joint_order
from ddcl_lightning.functional import BankOutput, TokenStatistics, cells_of, moments_of, nearest_prototype, token_means
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.gradient_watch import GradientWatch
from ddcl_lightning.nn.observer import BankObserver
from ddcl_lightning.nn.straight_through import anchor_of


class StepCalls(NamedTuple):
    """Calls of a bank together.

    Attributes:
        numbers: Of the calls, ascending, see :attr:`StepStatistics.next_number`.
        statistics: Of their tokens on this process.
    """

    numbers: tuple[int, ...]
    statistics: TokenStatistics


class StepStatistics(BankObserver):
    """Statistics of the tokens of banks between two steps, for an optimizer that moves prototypes by them.

    Calls count as gradients do. A call counts when a backward pass goes through its output or through its tokens: once,
    even if several backward passes do, or activation checkpointing runs the call again. Calls add up until a step takes
    them or they are dropped. Setting gradients to None (``module.zero_grad()``) drops the calls of these gradients too.
    In a loop without any backward pass, all calls since the last step count instead. Calls in evaluation mode, without
    gradients (``torch.no_grad``), of a frozen bank or of a copy of it never count. A call whose loss is not finite (a
    NaN or an overflow in a valid token, or no valid token) adds nothing; this check does not wait for the device.

    Args:
        banks: The banks by name.
        need_cells: Called at every call: whether statistics of the cells are needed.
        need_moments: Called at every call: whether moments of the tokens are needed.
        watch: Tells of gradients that were set to None elsewhere.
    """

    breaks_graphs = True

    def __init__(
        self,
        banks: Mapping[str, PrototypeBank],
        need_cells: Callable[[], bool],
        need_moments: Callable[[], bool] = lambda: False,
        watch: GradientWatch | None = None,
    ) -> None:
        self._watch = watch
        self._need_cells, self._need_moments = need_cells, need_moments
        self._forwarded: dict[Tensor, StepCalls] = {}  # in case that no backward pass comes
        self._backpropagated: dict[Tensor, StepCalls] = {}
        self._numbers: dict[Tensor, set[int]] = {}  # of the calls that passed
        self._graded: set[Tensor] = set()  # prototypes that got a gradient since
        self._dropped: set[Tensor] = set()
        self._resets: Counter[Tensor] = Counter()
        self._resets_elsewhere: Counter[Tensor] = Counter()
        self._hooked: list[weakref.ref[Tensor]] = []  # tokens whose gradients count their calls
        self.next_number = 0  # of the next call with gradients in training mode
        self._banks = list(banks.values())
        for bank in self._banks:
            bank.add_observer(self)
        self._gradient_hooks: dict[Tensor, RemovableHandle] = {}
        self._close = weakref.finalize(self, _remove, self._gradient_hooks)
        self._close.atexit = False

    def take(self, prototypes: Tensor) -> TokenStatistics | None:
        """Statistics for the step of these prototypes, which are then reset; None where they were dropped on purpose.

        Raises:
            RuntimeError: If the bank was not called at all.
        """
        if self.is_dropped(prototypes):
            self.drop(prototypes)
            return None
        calls = self.take_if_any(prototypes)
        if calls is None:
            raise RuntimeError(
                "TokenNormalized needs a forward pass in training mode before each step, with gradients enabled. Check "
                "that the training step uses the bank, that the module is in training mode, and that zero_grad "
                "is not called between the backward pass and the step."
            )
        return calls.statistics

    def take_if_any(self, marker: Tensor, *, need_backward: bool = False) -> StepCalls | None:
        """Calls since the last step, which are then reset; None where there are none.

        Args:
            marker: That of the bank.
            need_backward: Leave calls that no backward pass went through, also where there are no others.
        """
        if self.is_dropped(marker):
            self.drop(marker)
            return None
        calls = self._backpropagated.get(marker) or (None if need_backward else self._forwarded.get(marker))
        if calls is not None:
            self.drop(marker)
        return calls

    def is_dropped(self, marker: Tensor) -> bool:
        """True if what was seen was dropped, by its gradients or on purpose, or the bank is frozen."""
        return marker in self._dropped or self._new_resets(marker) > 0 or not marker.requires_grad

    def drop(self, prototypes: Tensor, *, on_purpose: bool = False) -> None:
        """Drop the calls of a bank; with ``on_purpose`` a step without new ones is no error."""
        self._resets[prototypes] += self._new_resets(prototypes)
        for kept in (self._forwarded, self._backpropagated, self._numbers):
            kept.pop(prototypes, None)
        self._graded.discard(prototypes)
        if self._watch is not None:
            self._resets_elsewhere[prototypes] = self._watch.resets()
            self._watch.forget()
        (self._dropped.add if on_purpose else self._dropped.discard)(prototypes)

    def resets(self, marker: Tensor) -> int:
        """Number of times that the gradients of counted calls of a bank were set to None."""
        return self._resets[marker] + self._new_resets(marker)

    def close(self) -> None:
        """Follow no further calls; an object that no longer exists follows none either."""
        for bank in self._banks:
            bank.remove_observer(self)
        self._close()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        """Read a call in training mode, and count it when a backward pass goes through it."""
        marker = bank.marker
        if not (bank.training and torch.is_grad_enabled() and marker.requires_grad):
            return output
        if recomputing() and any(known() is tokens for known in self._hooked):
            return output  # the call itself hangs on these tokens
        number, self.next_number = self.next_number, self.next_number + 1
        call = StepCalls((number,), self._read(bank, tokens, mask, output, number))
        _add(self._forwarded, marker, call)
        self._dropped.discard(marker)
        if marker not in self._gradient_hooks:
            graded = weakref.WeakMethod(self._note_gradient)
            self._gradient_hooks[marker] = marker.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_call, graded)
            )
        passes = partial(self._pass, bank, call)
        if output.codes is not None:
            # A gradient that is passed around the bank, straight through, hangs on to this.
            output = output.replaced(anchor=anchor_of(marker))
        for value in (output.centroids, *output.terms, output.weights, output.entropy, output.anchor):
            if value is not None and value.requires_grad:
                value.register_hook(passes)  # type: ignore[no-untyped-call]
        if tokens.grad_fn is not None:  # a hook on a leaf would outlive its graph
            tokens.register_hook(passes)  # type: ignore[no-untyped-call]
            self._hooked = [known for known in self._hooked if known() is not None] + [weakref.ref(tokens)]
        return output

    @torch.no_grad()
    def _read(
        self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput, number: int
    ) -> TokenStatistics:
        heads, flat_mask = bank.split_heads(tokens.detach(), mask)
        prototypes, statistics = bank.prototypes.detach(), output.statistics
        if statistics is None:
            statistics = token_means(heads, prototypes, bank.temperature, flat_mask)
        if self._need_cells():
            codes = (
                nearest_prototype(heads, prototypes)
                if output.codes is None
                else output.codes.reshape(-1, bank.num_heads).T
            )
            # One vector per sample, or (B, ..., D).
            samples, per_sample = (tokens.shape[0], tokens[0, ..., 0].numel()) if tokens.dim() > 2 else (len(tokens), 1)
            order = joint_order(samples, per_sample, number, heads.device)
            statistics = statistics._replace(cells=cells_of(heads, prototypes, codes, flat_mask, order))
        if self._need_moments():
            statistics = statistics._replace(moments=moments_of(heads, flat_mask))
        return statistics.finite(output.terms.loss)

    @torch.no_grad()
    def _pass(self, bank: PrototypeBank, call: StepCalls, gradient: Tensor) -> None:
        """Count a call that a gradient passes through."""
        marker = bank.marker
        if self._new_resets(marker):
            self.drop(marker)
        numbers = self._numbers.setdefault(marker, set())
        # The prototypes may have changed their number since the call.
        if call.numbers[0] not in numbers and call.statistics.mean.shape == bank.prototypes.shape:
            numbers.update(call.numbers)
            _add(self._backpropagated, marker, call)

    def _note_gradient(self, marker: Tensor) -> None:
        if marker in self._numbers and marker.grad is not None:
            self._graded.add(marker)

    def _new_resets(self, marker: Tensor) -> int:
        """Number of times that gradients of the counted calls were set to None since the calls before were dropped."""
        own = marker in self._graded and marker.grad is None
        elsewhere = 0 if self._watch is None else self._watch.resets() - self._resets_elsewhere[marker]
        return int(own) + elsewhere


def _add(kept: dict[Tensor, StepCalls], marker: Tensor, call: StepCalls) -> None:
    before = kept.get(marker)
    if before is not None and before.statistics.mean.shape == call.statistics.mean.shape:
        # Backward passes come in any order.
        first, last = sorted((before, call), key=lambda calls: calls.numbers[-1])
        call = StepCalls(tuple(sorted(before.numbers + call.numbers)), first.statistics.merge(last.statistics))
    kept[marker] = call


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()


def _call(method: "weakref.WeakMethod[Any]", marker: Tensor) -> None:
    bound = method()
    if bound is not None:
        bound(marker)
