"""Codebooks of audio codecs: Encodec, Mimi, X-Codec, WavTokenizer and Higgs; DAC and its like."""

from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import PARAMETERS
from ddcl_lightning.monitoring.sources.base import CodebookSource, tokens_of
from ddcl_lightning.monitoring.sources.observed_calls import Call


class EuclideanCodebook(CodebookSource):
    """A ``...EuclideanCodebook`` as in Encodec: vectors ``embed`` ``(K, d)`` and ``quantize`` of ``(N, d)`` tokens."""

    method = "quantize"

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if the class has that name, that method and these vectors."""
        name = type(module).__name__
        return name.endswith("EuclideanCodebook") and callable(getattr(module, "quantize", None)) and _has_embed(module)

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``quantize(tokens)``, which returns codes."""
        codebook: Tensor = call.module.embed  # type: ignore[assignment]
        return CodebookRecord.of_codes(call.args[0], codebook, call.output)


class DirectionCodebook(CodebookSource):
    """A quantizer as in DAC: an Embedding ``codebook``, compared in ``decode_latents`` by direction."""

    method = "decode_latents"
    advice = PARAMETERS

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if it has that method and that Embedding."""
        has_method = callable(getattr(module, "decode_latents", None))
        return has_method and isinstance(getattr(module, "codebook", None), nn.Embedding)

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``decode_latents(latents (B, d, T))``, which returns codes ``(B, T)`` second."""
        codebook: Tensor = call.module.codebook.weight  # type: ignore[union-attr, assignment]
        codes: Tensor = call.output[1]
        tokens = call.args[0].movedim(1, -1)
        rows = tokens_of(tokens, codebook.shape[1], codes.numel())
        return CodebookRecord.of_codes(rows, codebook, codes.flatten(), geometry="cosine")


def _has_embed(module: nn.Module) -> bool:
    return "embed" in module._buffers or "embed" in module._parameters or hasattr(type(module), "embed")
