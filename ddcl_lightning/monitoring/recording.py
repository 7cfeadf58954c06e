"""One record of what passes through a codebook in a call, and one way to make such records."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.distributed import gather_objects, gather_rows, sum_over_processes, world_size
from ddcl_lightning.functional import BankOutput, Decomposition
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.observer import BankObserver


@dataclass(frozen=True)
class CodebookRecord:
    """Input and output of a codebook in one call; tensors are detached, codebook and T copied at the call.

    Attributes:
        tokens: ``(H, N, d)``.
        mask: ``(H, N)`` boolean, True for valid tokens, or None.
        codebook: ``(H, K, d)``.
        temperature: ``(H,)``, T in units of squared distance.
        terms: The loss terms that the call returned, ``(H,)`` each.
        codes: Hard codes ``(H, N)`` int64, or None where the call made none.
    """

    tokens: Tensor
    mask: Tensor | None
    codebook: Tensor
    temperature: Tensor
    terms: Decomposition
    codes: Tensor | None = None

    @classmethod
    def of_call(cls, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> "CodebookRecord":
        """The record of a call of a bank with tokens ``(*, H * d)``."""
        heads, flat_mask = bank.split_heads(tokens.detach(), mask)
        terms = Decomposition(*((term.detach() / output.scale).to(term.dtype) for term in output.terms))
        codes = None if output.codes is None else output.codes.reshape(-1, bank.num_heads).T
        return cls(heads, flat_mask, bank.prototypes.detach().clone(), bank.temperature.clone(), terms, codes)

    def valid_tokens(self) -> Tensor:
        """Tokens without padding, ``(H, M, d)``."""
        return self.tokens if self.mask is None else self.tokens[:, self.mask[0]]

    def rows(self) -> Tensor:
        """Valid tokens ``(M, H, d)`` on the CPU in float32: one row per token, the heads side by side."""
        return self.valid_tokens().transpose(0, 1).to("cpu", torch.float32)


Receiver = Callable[[str, CodebookRecord], None]


class record_codebooks(BankObserver):
    """Context manager that hands a record of every call of some banks to a receiver.

    While it is not armed it costs nothing. Calls inside of compiled modules leave no record, nor do copies of a bank.
    Recording ends when this object is deleted.

    Args:
        banks: Banks by name, or a module that holds them.
        receive: Called with the name of the bank and the record.
        armed: Record from the start; the context manager does.

    Attributes:
        armed: Whether calls are recorded.
    """

    def __init__(self, banks: Mapping[str, PrototypeBank] | nn.Module, receive: Receiver, armed: bool = False) -> None:
        self.armed = armed
        self._receive = receive
        self._names: dict[PrototypeBank, str] = {}
        for name, bank in (find_banks(banks) if isinstance(banks, nn.Module) else banks).items():
            self._names[bank] = name
            bank.add_observer(self)

    def after(self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        """Record a call."""
        if self.armed:
            self._receive(self._names[bank], CodebookRecord.of_call(bank, tokens, mask, output))
        return output

    def close(self) -> None:
        """Record no further calls."""
        for bank in self._names:
            bank.remove_observer(self)
        self._names.clear()

    def __enter__(self) -> "record_codebooks":
        self.armed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def over_processes(records: Mapping[str, CodebookRecord]) -> dict[str, CodebookRecord]:
    """The records of all processes as one per bank, the same everywhere: their valid tokens in rank order.

    A bank that was not called on every process is left out. Terms are means over all tokens.
    """
    if world_size() == 1:
        return dict(records)
    called = gather_objects(list(records))
    return {name: _joint(record) for name, record in records.items() if all(name in names for names in called)}


def _joint(record: CodebookRecord) -> CodebookRecord:
    tokens = record.valid_tokens()
    rows = gather_rows(tokens.transpose(0, 1).contiguous()).transpose(0, 1)
    weight = tokens.shape[1] / max(rows.shape[1], 1)
    terms = Decomposition(*(sum_over_processes(term * weight) for term in record.terms))
    return CodebookRecord(rows, None, record.codebook, record.temperature, terms)
