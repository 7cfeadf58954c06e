"""Quantisers of the vector-quantize-pytorch library as heads: baselines in the same module, with the same metrics."""

import difflib
from typing import Any

from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.heads.base import Head, ReadoutOutput, check_rebuild, check_tokens, fill_padding
from ddcl_lightning.heads.pooling import code_shares, mean_token

try:
    import vector_quantize_pytorch as library
except ImportError as error:
    raise ImportError(
        "LibraryVQ needs vector-quantize-pytorch: pip install 'ddcl-lightning[vector-quantize]'."
    ) from error

QUANTIZERS = ("VectorQuantize", "SimVQ", "FSQ", "LFQ")
MASKED = ("VectorQuantize", "LFQ")  # the others would let padding take part


class LibraryVQ(Head):
    """A quantiser of vector-quantize-pytorch between encoder and decoder: EMA codes, rotation trick, SimVQ, FSQ, LFQ.

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
        ValueError: If the quantiser is unknown or the weight not positive; in ``build``, if the library refuses the
            arguments; in ``forward``, if there is padding and the quantiser takes no mask.
    """

    quantizer_layer: nn.Module

    @typed
    def __init__(
        self,
        quantizer: str,
        quantizer_args: dict[str, Any] | None = None,
        weight: float = 1.0,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        if quantizer not in QUANTIZERS:
            close = difflib.get_close_matches(quantizer, QUANTIZERS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"quantizer must be one of {QUANTIZERS}; got {quantizer!r}.{hint}")
        if not weight > 0:
            raise ValueError(f"weight must be > 0; got {weight}.")
        self.quantizer, self.quantizer_args, self.weight = quantizer, dict(quantizer_args or {}), weight
        if embed_dim is not None:
            self.build(embed_dim)

    def build(self, embed_dim: int) -> None:
        """Create the library's quantiser for tokens of dimension ``embed_dim``."""
        if check_rebuild(self, embed_dim):
            return
        try:
            self.quantizer_layer = getattr(library, self.quantizer)(dim=embed_dim, **self.quantizer_args)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"quantizer_args do not fit {self.quantizer}: {error}.") from None
        self.quantizer_layer.train(self.training)  # parts of LFQ come in evaluation mode
        self.num_codes = int(self.quantizer_layer.codebook_size)  # type: ignore[arg-type]
        self.num_codebooks = int(self.quantizer_args.get("heads", self.quantizer_args.get("num_codebooks", 1)))
        self.pooled_dim = embed_dim
        super().build(embed_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Quantise ``(B, T, embed_dim)`` tokens; the share of each code is returned in evaluation mode."""
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        padded = mask is not None and not bool(mask.all())
        if padded and self.quantizer not in MASKED:
            raise ValueError(f"{self.quantizer} takes no mask; got padding. Use one of {MASKED}, or tokens without it.")
        output = self.quantizer_layer(tokens, **({"mask": mask} if padded else {}))
        quantized, indices = output[0], output[1].long()
        codes = indices.reshape(*tokens.shape[:2], self.num_codebooks)
        if mask is not None:
            codes = codes.masked_fill(~mask.unsqueeze(-1), -1)
        loss = self.weight * output[2].sum() if len(output) > 2 else None
        shares = None
        if not self.training and self.num_codes is not None:
            shares = code_shares(codes, self.num_codes, mask)
        return ReadoutOutput(
            quantized, mean_token(quantized, mask), assignments=shares, regularization=loss, codes=codes
        )
