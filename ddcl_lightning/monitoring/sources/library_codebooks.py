"""Codebooks of vector-quantize-pytorch: VectorQuantize, ResidualVQ and whatever is built on them, and SimVQ."""

from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import MAPPED, Advice
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.observed_calls import Call

LIBRARY = "vector_quantize_pytorch"
CODEBOOKS = ("Codebook", "EuclideanCodebook", "CosineSimCodebook")  # one class by now, two in earlier versions


def _is_of_library(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == LIBRARY


class LibraryCodebook(CodebookSource):
    """The codebook inside of a VectorQuantize, which is given tokens as it compares them.

    Separate codebooks of heads are heads of the record. Of a beam search the nearest code of each beam counts. A
    codebook that a network makes for each token (``implicit_neural_codebook``) is recorded without vectors.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.advice = _advice_on(module)

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if it is one of the library's codebooks."""
        return _is_of_library(module) and type(module).__name__ in CODEBOOKS

    def before(self, call: Call) -> None:
        """Keep the vectors, which the call moves while training; those of a k-means start come from the call."""
        if bool(call.module.initted):
            call.state = self._embed().clone()

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``forward(x, ..., mask=None)``, which returns codes second."""
        module = call.module
        tokens, codes, mask = call.argument(0, "x"), call.output[1], call.kwargs.get("mask")
        if call.kwargs.get("topk") is not None:
            codes = codes[..., 0]
        books = self._embed() if call.state is None else call.state
        cosine = bool(getattr(module, "use_cosine_sim", type(module).__name__ == "CosineSimCodebook"))
        heads, dim = books.shape[0], books.shape[-1]
        rows = tokens.detach().reshape(heads, -1, dim).transpose(0, 1).flatten(1)
        columns = codes.reshape(heads, -1).T
        if mask is not None:  # a mask of samples, where heads share one codebook beside each other
            repeats = len(columns) // mask.numel()
            mask = mask.unsqueeze(1).expand(-1, repeats, -1).flatten()
        implicit = call.kwargs.get("codebook_transform_fn") is not None
        return CodebookRecord.of_codes(
            rows,
            None if implicit else self._affine(books),
            columns,
            mask,
            num_heads=heads,
            num_codes=books.shape[1],
            geometry="cosine" if cosine else "euclidean",
        )

    def _embed(self) -> Tensor:
        embed: Tensor = self.module.embed.detach()  # type: ignore[operator]
        bridge = getattr(self.module, "vq_bridge", None)
        return embed if bridge is None else bridge(embed)

    def _affine(self, books: Tensor) -> Tensor:
        module = self.module
        if not getattr(module, "affine_param", False):
            return books
        deviation: list[Tensor] = [
            getattr(module, f"{of}_variance").clamp(min=1e-5).sqrt() for of in ("batch", "codebook")
        ]
        means: list[Tensor] = [getattr(module, f"{of}_mean") for of in ("batch", "codebook")]
        return (books - means[1]) * (deviation[0] / deviation[1]) + means[0]


def _advice_on(codebook: nn.Module) -> Advice:
    """Arguments of VectorQuantize that are not set yet; of a trained codebook it is not known how it was started."""
    by_kmeans = not bool(getattr(codebook, "initted", True))
    moves = bool(getattr(codebook, "ema_update", True))
    return Advice(
        start="" if by_kmeans else "start the codes from tokens (kmeans_init=True, unless it is set)",
        revive=""
        if float(getattr(codebook, "threshold_ema_dead_code", 0)) > 0
        else "put tokens in the place of dead codes (threshold_ema_dead_code=2)",
        step="raise the decay of the codes" if moves else "lower the learning rate of the codes",
        fewer="use a smaller codebook_size",
    )


class LibrarySimVQ(CodebookSource):
    """SimVQ, whose codes are a learned map of frozen vectors."""

    advice = MAPPED

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if it is the library's SimVQ."""
        return _is_of_library(module) and type(module).__name__ == "SimVQ"

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``forward(x)``, which returns codes second."""
        tokens = call.argument(0, "x")
        if call.module.channel_first:
            tokens = tokens.movedim(1, -1)
        codebook: Tensor = call.module.codebook  # type: ignore[assignment]
        return CodebookRecord.of_codes(tokens, codebook, call.output[1])
