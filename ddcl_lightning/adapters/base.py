"""The protocol of prototypes inside existing networks."""

from typing import Any

from torch import Tensor, nn

from ddcl_lightning.functional import Decomposition


class PrototypeAdapter(nn.Module):
    """A bank inside a network: tokens in, tokens out, the loss terms kept for :func:`quantization_loss`.

    Attributes:
        terms: Loss terms ``(H,)`` of the last call, or None; they carry gradients and are neither copied nor saved.
        mask: ``(B, T)`` boolean for calls that bring no mask of their own, or None; :func:`insert_prototypes` sets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: Decomposition | None = None
        self.mask: Tensor | None = None

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, T, D)`` tokens with mask ``(B, T)``, True for valid tokens, to ``(B, T, D)``."""
        raise NotImplementedError

    def merge(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Output of a block with this adapter, from the block's input and output tokens ``(B, T, D)``."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "terms": None, "mask": None}
