"""Codebooks that a user names: an ``nn.Embedding``, or anything with a function that reads its calls."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import PARAMETERS
from ddcl_lightning.monitoring.sources.base import CodebookSource, tokens_of
from ddcl_lightning.monitoring.sources.observed_calls import Call

# (module, its inputs, its output) -> tokens, codebook and codes, as monitor.update takes them, or a whole record.
Reader = Callable[
    [nn.Module, tuple[Any, ...], Any], CodebookRecord | tuple[Tensor | None, Tensor | None, Tensor] | None
]


class EmbeddingCodebook(CodebookSource):
    """An ``nn.Embedding`` as the codebook of the module around it, as in VQGAN.

    Its codes are the indices with which it is called; the tokens are the input of the module around it, where that is
    made of as many vectors of its dimension. A call of the Embedding from elsewhere is recorded without tokens.

    Args:
        module: The Embedding.
        owner: The module whose ``forward`` calls it, or None.
    """

    advice = PARAMETERS

    def __init__(self, module: nn.Module, owner: nn.Module | None = None) -> None:
        super().__init__(module)
        self.owner = owner
        self._open: list[Call] = []  # calls of the owner that have not returned

    def observed(self) -> Iterable[tuple[nn.Module, str]]:
        """The Embedding, and the module around it."""
        return [(self.module, "forward"), *([] if self.owner is None else [(self.owner, "forward")])]

    def before(self, call: Call) -> None:
        """Remember a call of the owner."""
        if call.module is self.owner:
            self._open = [call]  # one that failed has not returned either

    def after(self, call: Call) -> CodebookRecord | None:
        """The record of the first indices of a call of the owner, at its end."""
        if call.module is self.owner:
            self._open = []
            return None if call.state is None else self.read(call)
        if not self._open:
            return self.read(Call(call.module, call.method, (), {}, state=call.argument(0, "input")))
        if self._open[0].state is None:
            self._open[0].state = call.argument(0, "input").detach().clone()
        return None

    def read(self, call: Call) -> CodebookRecord:
        """The record of the indices in ``call.state``."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        codes = call.state
        return CodebookRecord.of_codes(tokens_of(call.first, weight.shape[1], codes.numel()), weight, codes.flatten())


class ReadCodebook(CodebookSource):
    """Any module with a function that returns tokens, codebook and codes of one of its calls.

    Args:
        module: The module.
        reader: Called with the module, its inputs and its output, without gradients. It returns tokens
            ``(*, H * d)`` or None, codebook ``(K, d)`` or ``(H, K, d)``, and codes ``(*)`` or ``(*, H)``; or a
            :class:`~ddcl_lightning.CodebookRecord`; or None where there is nothing to record.
    """

    def __init__(self, module: nn.Module, reader: Reader) -> None:
        super().__init__(module)
        self.reader = reader

    def read(self, call: Call) -> CodebookRecord | None:
        """The record that the function returns, or that of the three values."""
        values = self.reader(call.module, (*call.args, *call.kwargs.values()), call.output)
        return CodebookRecord.of_codes(*values) if isinstance(values, tuple) else values
