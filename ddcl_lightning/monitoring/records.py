"""One record of what passed through a codebook in a call, whoever's codebook it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddcl_lightning.functional import BankOutput, Decomposition, nearest_prototype
from ddcl_lightning.monitoring.remedies import BANK, GENERIC, Advice
from ddcl_lightning.nn.bank import PrototypeBank

Geometry = Literal["euclidean", "cosine"]


@dataclass(frozen=True)
class CodebookRecord:
    """Input and output of a codebook in one call; tensors are detached, codebook and T copied at the call.

    :meth:`of_codes` makes one of the shapes that modules have.

    Attributes:
        tokens: ``(H, N, d)`` as the codebook compares them, or None where they are not known.
        mask: ``(H, N)`` boolean, True for valid tokens, or None.
        codebook: ``(H, K, d)``, or None of an implicit one, which has no vectors.
        temperature: ``(H,)``, T in units of squared distance, or None without soft assignments.
        terms: The loss terms that the call returned, ``(H,)`` each, or None.
        codes: Hard codes ``(H, N)`` int64, -1 at padding, or None where the call made none.
        num_codes: K; by default that of ``codebook``.
        geometry: ``"euclidean"``, or ``"cosine"`` where only directions are compared.
        advice: What can be done about codes of this kind.

    Raises:
        ValueError: If there is neither a codebook nor ``num_codes``, or the geometry is unknown.
    """

    tokens: Tensor | None
    mask: Tensor | None
    codebook: Tensor | None
    temperature: Tensor | None = None
    terms: Decomposition | None = None
    codes: Tensor | None = None
    num_codes: int = 0
    geometry: Geometry = "euclidean"
    advice: Advice = GENERIC

    def __post_init__(self) -> None:
        if self.geometry not in get_args(Geometry):
            raise ValueError(
                f"geometry must be 'euclidean' or 'cosine'; got {self.geometry!r}. Pass 'cosine' where only directions "
                "are compared."
            )
        if self.num_codes < 1:
            if self.codebook is None:
                raise ValueError(
                    "num_codes must be given for a codebook without vectors; got none. Pass the number of its codes."
                )
            if not self.codebook.shape[1]:
                raise ValueError(
                    f"codebook must hold at least one code; got shape {tuple(self.codebook.shape)}. Add codes."
                )
            object.__setattr__(self, "num_codes", self.codebook.shape[1])

    @classmethod
    def of_codes(
        cls,
        tokens: Tensor | None,
        codebook: Tensor | None,
        codes: Tensor,
        mask: Tensor | None = None,
        *,
        num_heads: int = 1,
        num_codes: int = 0,
        geometry: Geometry = "euclidean",
    ) -> "CodebookRecord":
        """The record of hard codes, in the shapes that quantizers return.

        Args:
            tokens: ``(*, H * d)`` of any float dtype, or None.
            codebook: ``(K, d)``, for several heads ``(H, K, d)``, or None of an implicit one. It is copied.
            codes: Integers ``(*)``, for several heads ``(*, H)``; -1 at padding.
            mask: ``(*)`` boolean, True for valid tokens.
            num_heads: H; that of a codebook ``(H, K, d)`` goes before.
            num_codes: K of an implicit codebook.
            geometry: ``"euclidean"`` or ``"cosine"``.

        Raises:
            TypeError: If the codes are not integers or the mask is not boolean.
            ValueError: If the numbers of tokens, codes and mask entries differ.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"codes must be integers; got {codes.dtype}. Take the argmax or use .long().")
        book = None
        if codebook is not None:
            book = codebook.detach().clone()
            book = book if book.dim() == 3 else book.unsqueeze(0)
            num_heads = book.shape[0]
        columns = codes.detach().long().reshape(-1, num_heads).T
        rows = None
        if tokens is not None:
            width, number = tokens.shape[-1] // num_heads, math.prod(tokens.shape[:-1])
            rows = tokens.detach().reshape(number, num_heads, width).transpose(0, 1)
            if number != columns.shape[1] or (book is not None and rows.shape[2] != book.shape[2]):
                raise ValueError(
                    f"tokens must be as many as codes, and as wide as the codebook; got tokens {tuple(tokens.shape)}, "
                    f"codes {tuple(codes.shape)} and codebook {None if book is None else tuple(book.shape)}. Move "
                    "the channels last, and give (*, H * d) tokens with (*, H) codes for H heads."
                )
        valid = None if mask is None else _flat_mask(mask, columns)
        if valid is not None:
            columns = columns.masked_fill(~valid, -1)
        return cls(rows, valid, book, codes=columns, num_codes=num_codes, geometry=geometry)

    def hard_codes(self) -> Tensor | None:
        """Hard codes ``(H, N)``, -1 at padding, or None where they are not known."""
        return self.codes

    @property
    def num_heads(self) -> int:
        """H."""
        for tensor in (self.codebook, self.codes, self.tokens):
            if tensor is not None:
                return tensor.shape[0]
        return 1

    def valid_tokens(self) -> Tensor:
        """Tokens without padding, ``(H, M, d)``.

        Raises:
            ValueError: If the record has no tokens.
        """
        if self.tokens is None:
            raise ValueError("tokens were not recorded; got None. Read the codes of this codebook only.")
        return self.tokens if self.mask is None else self.tokens[:, self.mask[0]]

    def rows(self) -> Tensor:
        """Valid tokens ``(M, H, d)`` on the CPU in float32: one row per token, the heads side by side."""
        return self.valid_tokens().transpose(0, 1).to("cpu", torch.float32)


@dataclass(frozen=True)
class BankRecord(CodebookRecord):
    """Record of a call of a :class:`~ddcl_lightning.PrototypeBank`, which has everything but, at times, codes.

    Attributes:
        detach_assignments: The bank's own setting, on which T_c depends.
    """

    tokens: Tensor
    codebook: Tensor
    temperature: Tensor
    terms: Decomposition
    advice: Advice = BANK
    detach_assignments: bool = False

    @classmethod
    def of_call(cls, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> "BankRecord":
        """The record of a call of a bank with tokens ``(*, H * d)``."""
        heads, flat_mask = bank.split_heads(tokens.detach(), mask)
        terms = Decomposition(*((term.detach() / output.scale).to(term.dtype) for term in output.terms))
        codes = None if output.codes is None else output.codes.reshape(-1, bank.num_heads).T
        prototypes, temperature = bank.prototypes.detach().clone(), bank.temperature.clone()
        return cls(heads, flat_mask, prototypes, temperature, terms, codes, detach_assignments=bank.detach_assignments)

    @classmethod
    def without_call(
        cls, tokens: Tensor, codebook: Tensor, temperature: Tensor, *, detach_assignments: bool = False
    ) -> "BankRecord":
        """The record of tokens ``(H, N, d)`` beside a codebook that has not been called with them: its terms are 0."""
        zeros = torch.zeros(len(codebook))
        terms = Decomposition(zeros, zeros, zeros)
        return cls(tokens, None, codebook, temperature, terms, detach_assignments=detach_assignments)

    def hard_codes(self) -> Tensor:
        """Hard codes ``(H, N)``, -1 at padding: those of the call, or the nearest prototypes."""
        if self.codes is not None:
            return self.codes
        nearest = nearest_prototype(self.tokens, self.codebook)
        return nearest if self.mask is None else nearest.masked_fill(~self.mask, -1)


def head_name(name: str, head: int, num_heads: int) -> str:
    """Name of one head of a codebook; that of the codebook itself where it has only one."""
    return f"{name}/head{head}" if num_heads > 1 else name


def by_head(values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Values of every head, by the name of the codebook, with that of the head where there are several."""
    named: dict[str, Any] = {}
    for name, heads in values.items():
        named.update({head_name(name, head, len(heads)): row for head, row in enumerate(heads)})
    return named


def belongs_to(label: str, name: str) -> bool:
    """True if a label is that of a codebook or of one of its heads."""
    return label == name or label.startswith(f"{name}/head")


def _flat_mask(mask: Tensor, codes: Tensor) -> Tensor:
    """Mask ``(*)`` as ``(H, N)``, the shape of the codes."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean with True for valid tokens; got {mask.dtype}. Use mask.bool().")
    if mask.numel() != codes.shape[1]:
        raise ValueError(
            f"mask must have an entry for each of the {codes.shape[1]} tokens; got shape {tuple(mask.shape)}. Pass it "
            "in the shape of the indices of one codebook."
        )
    return mask.detach().reshape(1, -1).expand_as(codes)
