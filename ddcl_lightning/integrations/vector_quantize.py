"""Quantizers of the vector-quantize-pytorch library as heads: baselines in the same module, with the same metrics."""

import difflib
from typing import Any

from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.functional._common import check_mask, mark_padding, require_valid_token, zero_padding
from ddcl_lightning.heads.quantizer_readout import CodebookHead
from ddcl_lightning.nn.quantizer_base import Quantizer, QuantizerOutput, QuantizerTerms

try:
    import vector_quantize_pytorch as library
except ImportError as error:
    raise ImportError(
        "LibraryVQ needs vector-quantize-pytorch: pip install 'ddcl-lightning[vector-quantize]'."
    ) from error

QUANTIZERS = ("VectorQuantize", "SimVQ", "FSQ", "LFQ")
MASKED = ("VectorQuantize", "LFQ")  # the others would let padding take part


class LibraryQuantizer(Quantizer):
    """A quantizer of vector-quantize-pytorch with the interface of ours.

    Args:
        dim: D, dimension of the tokens.
        quantizer: ``"VectorQuantize"``, ``"SimVQ"``, ``"FSQ"`` or ``"LFQ"``.
        quantizer_args: Arguments of that class other than ``dim``.

    Attributes:
        layer: The library's module.

    Raises:
        ValueError: If the quantizer is unknown or refuses the arguments; in ``forward``, if there is padding and it
            takes no mask.
    """

    @typed
    def __init__(self, dim: int, quantizer: str, quantizer_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        _require_known(quantizer)
        args = dict(quantizer_args or {})
        try:
            self.layer: nn.Module = getattr(library, quantizer)(dim=dim, **args)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"quantizer_args do not fit {quantizer}: {error}.") from None
        self.layer.train(self.training)  # parts of LFQ come in evaluation mode
        self.dim, self.quantizer = dim, quantizer
        self.num_codes = int(self.layer.codebook_size)
        self.num_codebooks = int(args.get("heads", args.get("num_codebooks", 1)))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``(B, T, D)`` tokens with mask ``(B, T)``, True for valid ones."""
        check_mask(tokens, mask)
        require_valid_token(tokens, mask)
        padded = mask is not None and not bool(mask.all())
        if padded and self.quantizer not in MASKED:
            raise ValueError(f"{self.quantizer} takes no mask; got padding. Use one of {MASKED}, or tokens without it.")
        output = self.layer(zero_padding(tokens, mask), **({"mask": mask} if padded else {}))
        codes = output[1].long().reshape(*tokens.shape[:2], self.num_codebooks)
        codes = mark_padding(codes.squeeze(-1) if self.num_codebooks == 1 else codes, mask)
        loss = output[2].sum() if len(output) > 2 else None
        return QuantizerOutput(zero_padding(output[0], mask), codes, QuantizerTerms(loss))


class LibraryVQ(CodebookHead):
    """A quantizer of vector-quantize-pytorch between encoder and decoder: EMA codes, rotation trick, SimVQ, FSQ, LFQ.

    The library's auxiliary losses are the readout's ``regularization``. Its codes move by themselves
    (``VectorQuantize``) or as parameters of the task, so the module has no prototypes to step: its encoder's rate is
    still ``rho * lr_prototypes``.

    Args:
        quantizer: ``"VectorQuantize"``, ``"SimVQ"``, ``"FSQ"`` or ``"LFQ"``.
        quantizer_args: Arguments of that class other than ``dim``, which the backbone gives.
        weight: Weight > 0 of the library's losses in that of the task.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Attributes:
        num_codes: Size of a codebook (for FSQ the product of its levels), once built.

    Raises:
        ImportError: Where the module is imported without the library.
        ValueError: If the quantizer is unknown or the weight not positive; in ``build``, if the library refuses the
            arguments; in ``forward``, if there is padding and the quantizer takes no mask.
    """

    @typed
    def __init__(
        self,
        quantizer: str,
        quantizer_args: dict[str, Any] | None = None,
        weight: float = 1.0,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        _require_known(quantizer)
        if not weight > 0:
            raise ValueError(f"weight must be > 0; got {weight}. Leave it out for the default.")
        self._name, self.quantizer_args, self.weight = quantizer, dict(quantizer_args or {}), weight
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int) -> LibraryQuantizer:
        """The library's quantizer for tokens of dimension ``embed_dim``."""
        return LibraryQuantizer(embed_dim, self._name, self.quantizer_args)

    def init_args(self) -> dict[str, Any]:
        """The arguments; ``quantizer`` is the module by now, which has its name from them."""
        return {"quantizer": self._name, "quantizer_args": self.quantizer_args, "weight": self.weight}


def _require_known(quantizer: str) -> None:
    if quantizer not in QUANTIZERS:
        close = difflib.get_close_matches(quantizer, QUANTIZERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"quantizer must be one of {QUANTIZERS}; got {quantizer!r}.{hint}")
