"""Codebooks without vectors to learn: FSQ and LFQ, of vector-quantize-pytorch and inside of transformers."""

from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import ENTROPY, FIXED
from ddcl_lightning.monitoring.sources.base import CodebookSource, integers_in
from ddcl_lightning.monitoring.sources.observed_calls import Call


class ImplicitCodebook(CodebookSource):
    """FSQ, LFQ or a FiniteScalarQuantization: only its codes are recorded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.advice = ENTROPY if type(module).__name__ == "LFQ" else FIXED

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if the class has one of these names and says how many codes there are."""
        name = type(module).__name__
        return (name in ("FSQ", "LFQ") or name.endswith("FiniteScalarQuantization")) and _size(module) > 0

    def read(self, call: Call) -> CodebookRecord | None:
        """The record of a call, whose codes are ``(*)``, or ``(*, H)`` for several codebooks."""
        codes = integers_in(call.output)
        if codes is None:
            return None  # FSQ need not return them
        heads = int(getattr(call.module, "num_codebooks", 1))
        mask = call.kwargs.get("mask")
        return CodebookRecord.of_codes(None, None, codes, mask, num_heads=heads, num_codes=_size(call.module))


def _size(module: nn.Module) -> int:
    """K, or 0 where the module does not say."""
    codebook = getattr(module, "codebook", None)
    return int(getattr(module, "codebook_size", len(codebook) if isinstance(codebook, Tensor) else 0))
