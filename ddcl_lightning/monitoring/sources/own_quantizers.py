"""Our own quantizers that have no bank."""

from dataclasses import replace

from torch import Tensor, nn

from ddcl_lightning.functional._common import zero_padding
from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import GENERIC
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.observed_calls import Call
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.quantizer_base import Quantizer


class OwnQuantizer(CodebookSource):
    """A :class:`~ddcl_lightning.Quantizer` without a bank, with its vectors in ``codebook`` if it has any.

    Where it has a ``projection``, tokens are recorded behind it, in the space of the vectors.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        init = getattr(module, "init", None)
        if init is not None:
            self.advice = replace(
                GENERIC, start="" if init == "kmeans" else "start the codes from tokens (init='kmeans')"
            )

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if it is a Quantizer without a bank."""
        return isinstance(module, Quantizer) and not find_banks(module)

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``forward(tokens, mask)``."""
        module = call.module
        assert isinstance(module, Quantizer)
        mask: Tensor | None = call.argument(1, "mask")
        tokens: Tensor | None = zero_padding(call.argument(0, "tokens"), mask)
        projection = getattr(module, "projection", None)
        if isinstance(projection, nn.Module):
            tokens = projection(tokens)
        codebook = getattr(module, "codebook", None)
        if not isinstance(codebook, Tensor) or tokens is None or tokens.shape[-1] != _width(codebook):
            tokens = None
        return CodebookRecord.of_codes(
            tokens,
            codebook if isinstance(codebook, Tensor) else None,
            call.output.indices,
            mask,
            num_heads=module.num_codebooks,
            num_codes=module.num_codes,
        )


def _width(codebook: Tensor) -> int:
    return codebook.shape[-1] * (codebook.shape[0] if codebook.dim() == 3 else 1)
