"""Gumbel quantizers of wav2vec 2.0 and its like, whose codes are drawn."""

from torch import Tensor, nn

from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import SAMPLED
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.observed_calls import Call


class GumbelQuantizer(CodebookSource):
    """A ``...GumbelVectorQuantizer`` of transformers: its groups are heads.

    The call returns vectors and no codes, so the codes are those of the vectors. There are no tokens to compare with
    them: logits come from a linear layer.
    """

    advice = SAMPLED

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if the class has that name and these vectors."""
        return type(module).__name__.endswith("GumbelVectorQuantizer") and isinstance(
            getattr(module, "codevectors", None), Tensor
        )

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``forward(hidden_states)``, which returns ``(B, T, G * d)`` vectors first."""
        vectors = call.output[0].detach().float()
        groups = int(call.module.num_groups)  # type: ignore[arg-type]
        weights: Tensor = call.module.codevectors  # type: ignore[assignment]
        codebook = weights.detach().float().reshape(groups, -1, weights.shape[-1])
        rows = vectors.reshape(-1, groups, codebook.shape[2]).transpose(0, 1)
        return CodebookRecord.of_codes(None, codebook, nearest_prototype(rows, codebook).T)
