"""One way to record what passes through codebooks, ours or anybody's."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, overload

from torch import Tensor, nn

from ddcl_lightning._utils.distributed import gather_objects, gather_rows, sum_over_processes, world_size
from ddcl_lightning.functional import BankOutput, Decomposition
from ddcl_lightning.monitoring.records import BankRecord, CodebookRecord
from ddcl_lightning.monitoring.remedies import GENERIC
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.finding import Recordable, find_codebooks
from ddcl_lightning.monitoring.sources.observed_calls import Call, observe_calls
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.observer import BankObserver

__all__ = ["BankRecord", "CodebookRecord", "is_due", "over_processes", "record_codebooks"]

GOLDEN = (math.sqrt(5) - 1) / 2


class record_codebooks(BankObserver):
    """Context manager that hands a record of every call of some codebooks to a receiver.

    While it is not armed it costs nothing. Calls inside of compiled modules leave no record, nor do copies of a
    module. Recording ends when this object is deleted.

    Args:
        codebooks: Banks, or what :func:`~ddcl_lightning.find_codebooks` returns, by name; or a module, for all that
            are recognised inside.
        receive: Called with the name of the codebook and the record.
        armed: Record from the start; the context manager does.
        every_n_calls: Record one call of each codebook in so many, the first among them, at places that follow no
            period (:func:`is_due`).

    Attributes:
        calls: Number of calls of each codebook so far; a recorder with the numbers of another goes on like it.

    Raises:
        ValueError: If the interval is below 1.
    """

    _only: ClassVar["record_codebooks | None"] = None  # the one that records alone for a while

    @overload
    def __init__(
        self,
        codebooks: Mapping[str, PrototypeBank],
        receive: Callable[[str, BankRecord], Any],
        armed: bool = False,
        every_n_calls: int = 1,
    ) -> None: ...

    @overload
    def __init__(
        self,
        codebooks: Mapping[str, Recordable] | nn.Module,
        receive: Callable[[str, CodebookRecord], Any],
        armed: bool = False,
        every_n_calls: int = 1,
    ) -> None: ...

    def __init__(
        self,
        codebooks: Mapping[str, Any] | nn.Module,
        receive: Callable[[str, Any], Any],
        armed: bool = False,
        every_n_calls: int = 1,
    ) -> None:
        if every_n_calls < 1:
            raise ValueError(f"every_n_calls must be at least 1; got {every_n_calls}. Pass 1 to record every call.")
        self._receive, self._interval, self._armed = receive, every_n_calls, False
        self.calls: dict[str, int] = {}
        self._names: dict[PrototypeBank, str] = {}
        self._listeners: list[_Listener] = []
        self._ends: list[Callable[[], None]] = []  # what stops the listeners while they are shown calls
        weakref.finalize(self, _call_all, self._ends)
        codebooks = find_codebooks(codebooks) if isinstance(codebooks, nn.Module) else codebooks
        for name, codebook in codebooks.items():
            if isinstance(codebook, PrototypeBank):
                self._names[codebook] = name
                codebook.add_observer(self)
            else:
                self._listeners.append(_Listener(weakref.ref(self), name, codebook))
        self.armed = armed

    @property
    def armed(self) -> bool:
        """True if calls are recorded."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        if armed == self._armed:
            return
        self._armed = armed
        _call_all(self._ends)
        if armed:
            for listener in self._listeners:
                self._ends += [observe_calls(*method, listener) for method in listener.source.observed()]

    def after(self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        """Record a call of a bank."""
        if self._armed and not self._is_muted and self._is_due(self._names[bank]):
            self._receive(self._names[bank], BankRecord.of_call(bank, tokens, mask, output))
        return output

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager in which this recorder records, and no other one: for calls that are no part of a run."""
        before, record_codebooks._only = record_codebooks._only, self
        try:
            with self:
                yield
        finally:
            record_codebooks._only = before

    @property
    def _is_muted(self) -> bool:
        return record_codebooks._only not in (None, self)

    def _is_due(self, name: str) -> bool:
        calls = self.calls.get(name, 0)
        self.calls[name] = calls + 1
        return is_due(calls, self._interval)

    def close(self) -> None:
        """Record no further calls."""
        self.armed = False
        for bank in self._names:
            bank.remove_observer(self)
        self._names.clear()
        self._listeners.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, and what a pickle gives back, records nothing."""
        return record_codebooks, ({}, _ignore)

    def __enter__(self) -> "record_codebooks":
        self.armed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_due(number: int, interval: int) -> bool:
    """True for one number in each ``interval`` successive ones, the first of all among them.

    Its place among them follows the fractional parts of multiples of the golden ratio, so that over time it takes every
    place evenly, and every remainder by any period: neither levels that share a codebook nor sources of data that take
    turns hide behind it.
    """
    return number % interval == int(number // interval * GOLDEN % 1 * interval)


def _ignore(name: str, record: CodebookRecord) -> None:
    """Receiver of a recorder without codebooks."""


class _Listener:
    """Observer of the calls of one source; it does not keep its recorder alive."""

    def __init__(self, recorder: "weakref.ref[record_codebooks]", name: str, source: CodebookSource) -> None:
        self.recorder, self.name, self.source = recorder, name, source

    def before(self, call: Call) -> None:
        recorder = self.recorder()
        if recorder is None or recorder._is_muted:
            call.due = False
        elif call.module is self.source.module:
            call.due = recorder._is_due(self.name)
        if call.due:
            self.source.before(call)

    def after(self, call: Call) -> None:
        recorder = self.recorder()
        record = self.source.after(call) if call.due else None
        if record is not None and recorder is not None:
            advice = self.source.advice if record.advice is GENERIC else record.advice
            recorder._receive(self.name, replace(record, advice=advice))


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
    functions.clear()


def over_processes(records: Mapping[str, BankRecord]) -> dict[str, BankRecord]:
    """The records of all processes as one per bank, the same everywhere: their valid tokens in rank order.

    A bank that was not called on every process is left out. Terms are means over all tokens.
    """
    if world_size() == 1:
        return dict(records)
    called = gather_objects(list(records))
    return {name: _joint(record) for name, record in records.items() if all(name in names for names in called)}


def _joint(record: BankRecord) -> BankRecord:
    tokens = record.valid_tokens()
    rows = gather_rows(tokens.transpose(0, 1).contiguous()).transpose(0, 1)
    weight = tokens.shape[1] / max(rows.shape[1], 1)
    terms = Decomposition(*(sum_over_processes(term * weight) for term in record.terms))
    return BankRecord(
        rows, None, record.codebook, record.temperature, terms, detach_assignments=record.detach_assignments
    )
