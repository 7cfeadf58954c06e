"""The quantizer protocol."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import described
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.functional._common import check_code_range, check_mask, require_valid_token
from ddcl_lightning.nn.discovery import find_banks, prototypes_of


class QuantizerTerms(NamedTuple):
    """Loss and signals of a quantizer beside the codes.

    ``loss + terms``, ``weight * terms`` and ``terms / number`` read it as its loss, so that a line which added the
    commitment loss of another quantizer stays as it is.

    Attributes:
        loss: What to add to the loss of the reconstruction, a scalar, or None.
        signals: What to log while training, by name: scalars, or one value per codebook, ``(H,)``.
        decomposition: ``L_q``, ``L_OLS`` and ``V`` per head, ``(H,)`` each, in units of squared distance (eq. 3), of a
            quantizer with prototypes; None for others.
    """

    loss: Tensor | None = None
    signals: Mapping[str, Tensor] = MappingProxyType({})
    decomposition: Decomposition | None = None

    def __add__(self, other: Any) -> Any:
        return other if self.loss is None else self.loss + other

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __mul__(self, other: Any) -> Any:
        return 0.0 if self.loss is None else self.loss * other

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def __truediv__(self, other: Any) -> Any:
        return self * (1 / other)


class QuantizerOutput(NamedTuple):
    """Codes and vectors of tokens in a quantizer: ``quantized, indices, terms = quantizer(tokens)``.

    Attributes:
        quantized: Codes in place of the tokens, in their shape (with ``output_dim`` channels), zero at padding.
        indices: Hard code of each token, int64 in [0, ``num_codes``), -1 at padding: the shape of the tokens without
            their channels, with a last dimension of codebooks if there are several.
        terms: The loss, and what to log, see :class:`QuantizerTerms`.
    """

    quantized: Tensor
    indices: Tensor
    terms: QuantizerTerms = QuantizerTerms()


def as_indices(indices: Tensor, shape: str) -> Tensor:
    """Indices of any integer type as int64.

    Raises:
        TypeError: If they are no tensor; ``shape`` says what they should be.
        ValueError: If they are no integers.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"indices must be a tensor of integers; got {described(indices)}. Use torch.as_tensor(indices)."
        )
    if indices.dtype == torch.bool or indices.is_floating_point():
        raise ValueError(
            f"indices must be integers of shape {shape}; got {indices.dtype} of shape {tuple(indices.shape)}. Pass "
            "what encode returns."
        )
    return indices.long()


def check_indices(indices: Tensor, fits: bool, num_codes: int, shape: str) -> None:
    """Raise a ValueError unless indices have a fitting shape, and are in [0, ``num_codes``) or -1."""
    if not fits:
        raise ValueError(f"indices must have shape {shape}; got {tuple(indices.shape)}. Pass what encode returns.")
    check_code_range("indices", indices, f"num_codes = {num_codes}", num_codes)


def require_started(quantizer: Any, argument: str) -> None:
    """Raise a ValueError if the codes of a quantizer have not started; one that does not say is trusted."""
    if getattr(quantizer, "waits_for_tokens", False):
        raise ValueError(
            f"{argument} must be a quantizer whose codes have started; those of this {type(quantizer).__name__} are "
            "random: it has seen no tokens in training mode, or fewer than four per code. Train it, load its weights, "
            "or freeze it with requires_grad_(False) where random codes are meant."
        )


class Quantizer(nn.Module, ABC):
    """Replaces tokens by codes. Subclass it, set ``dim`` and ``num_codes``, and write ``forward``.

    :class:`~ddcl_lightning.QuantizerReadout` puts it between an encoder and a decoder.

    Attributes:
        dim: D, dimension of the tokens that it takes.
        num_codes: K, codes of each codebook.
        num_codebooks: H, codebooks.
    """

    dim: int
    num_codes: int
    num_codebooks: int = 1

    @property
    def output_dim(self) -> int:
        """Dimension of the quantized tokens: D unless a quantizer overrides it."""
        return self.dim

    @property
    def waits_for_tokens(self) -> bool:
        """True while codes that start on tokens of a training run have none yet; such codes mean nothing."""
        return False

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``(B, T, D)`` tokens with mask ``(B, T)``, True for valid ones; padding may hold anything."""

    @staticmethod
    def check_mask(tokens: Tensor, mask: Tensor | None) -> None:
        """Refuse a mask that cannot be meant; ``forward`` calls it first.

        Args:
            tokens: ``(B, T, D)``.
            mask: ``(B, T)`` boolean, True for valid tokens, or None.

        Raises:
            TypeError: If the mask is not boolean.
            ValueError: If its shape is another, or (looked at on the CPU only) no token is valid.
        """
        check_mask(tokens, mask)
        require_valid_token(tokens, mask)

    def prototype_parameters(self) -> list[nn.Parameter]:
        """Codes that step at ``lr_prototypes``: those of every bank inside, unless it moves them itself."""
        return prototypes_of(find_banks(self).values())

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Parameters that move the tokens which a bank sees, see :meth:`ddcl_lightning.Head.embedding_parameters`."""
        return []
