"""Quantizers of feature maps around an ``nn.Embedding``, as in VQGAN: Chameleon, Emu3, Janus, GLM-Image, Apertus."""

import re

from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import PARAMETERS
from ddcl_lightning.monitoring.sources.base import CodebookSource, integers_in, tokens_of
from ddcl_lightning.monitoring.sources.observed_calls import Call

NAMES = re.compile(r"Vector(Quantizer|Quantization|Quantize)\d?$")


class ImageQuantizer(CodebookSource):
    """A ``...VectorQuantizer`` with vectors in ``embedding``, whose ``forward`` returns codes among other values.

    Those with a Linear ``embedding`` compare inner products, and those of GLM-Image, or with ``l2_norm`` set,
    directions: their geometry is the cosine.
    """

    advice = PARAMETERS

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if the class has such a name and these vectors."""
        embedding = getattr(module, "embedding", None)
        return bool(NAMES.search(type(module).__name__)) and isinstance(embedding, (nn.Embedding, nn.Linear))

    def read(self, call: Call) -> CodebookRecord | None:
        """The record of ``forward(hidden_state)``; None if no codes are returned."""
        codes = integers_in(call.output)
        if codes is None:
            return None
        embedding = call.module.embedding
        codebook: Tensor = embedding.weight  # type: ignore[union-attr, assignment]
        directions = (
            isinstance(embedding, nn.Linear)
            or type(call.module).__name__.startswith("GlmImage")
            or bool(getattr(call.module, "l2_norm", False))
        )
        return CodebookRecord.of_codes(
            tokens_of(call.first, codebook.shape[1], codes.numel()),
            codebook,
            codes.flatten(),
            geometry="cosine" if directions else "euclidean",
        )
