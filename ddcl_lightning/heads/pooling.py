"""Heads without prototypes: their common base, and the plain summaries CLS, mean and maximum."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional._common import masked_mean
from ddcl_lightning.heads.base import Head, ReadoutOutput, check_rebuild, check_tokens, fill_padding
from ddcl_lightning.heads.width import check_width, count_parameters, widest


class PoolingLayer(nn.Module):
    """A plain layer on tokens ``(B, T, D)`` and a mask ``(B, T)`` or None: padding is zero, no sample is empty.

    Attributes:
        output_dim: Dimension of the one vector per sample that it leads to.
    """

    output_dim: int


class PoolingHead(Head):
    """A head that is one layer, whose width is given or follows from a parameter budget.

    Subclasses keep their arguments and write ``create_layer``. All parameters belong to the task and step at
    ``lr_task``.

    Args:
        width: Width of the layer, or None for its default.
        max_parameters: Parameters that the head may have: the largest width within it is found by ``build``.
        step: What the width must be a multiple of.

    Raises:
        ValueError: If both are given, or one is below 1.
    """

    layer: PoolingLayer
    width_name = "dim"

    @typed
    def __init__(self, width: int | None, max_parameters: int | None, step: int = 1) -> None:
        super().__init__()
        check_width(self.width_name, width, max_parameters)
        self.max_parameters = max_parameters
        self._width, self._step = width, step

    @abstractmethod
    def create_layer(self, embed_dim: int, width: int | None) -> PoolingLayer:
        """The layer for tokens ``(B, T, embed_dim)``; ``width`` None is the default one."""

    def build(self, embed_dim: int) -> None:
        """Create the layer for tokens of dimension ``embed_dim``."""
        if check_rebuild(self, embed_dim):
            return
        width = self._width
        if self.max_parameters is not None:
            width = widest(
                lambda dim: count_parameters(lambda: self.create_layer(embed_dim, dim)), self.max_parameters, self._step
            )
        self.layer = self.create_layer(embed_dim, width)
        self.pooled_dim = self.layer.output_dim
        super().build(embed_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens with mask ``(B, T)``, True for valid ones; tokens stay as they are."""
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        return ReadoutOutput(tokens, self.layer(tokens, mask))


def first_token(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The first valid token of each sample, ``(B, D)``, on whichever side the padding is."""
    if mask is None:
        return tokens[:, 0]
    place = mask.int().argmax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), place]


def mean_token(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean valid token of each sample, ``(B, D)``."""
    return masked_mean(tokens, mask, dim=-2)


def code_shares(codes: Tensor, num_codes: int, mask: Tensor | None) -> Tensor:
    """Share of each sample's valid tokens that have each code, ``(B, H, K)``, of hard codes ``(B, T, H)``."""
    books = codes.clamp(min=0).transpose(1, 2)
    valid = torch.ones_like(books) if mask is None else mask.unsqueeze(1).expand_as(books)
    counts = torch.zeros(*books.shape[:2], num_codes, device=codes.device)
    return counts.scatter_add_(2, books, valid.to(counts.dtype)) / valid.sum(-1, keepdim=True)


class _Summary(PoolingLayer):
    """A summary without parameters, and the control ``GELU(W s + b)`` on top where a width is given."""

    def __init__(self, embed_dim: int, hidden_dim: int | None) -> None:
        super().__init__()
        self.output_dim = embed_dim if hidden_dim is None else hidden_dim
        self.control = None if hidden_dim is None else nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.GELU())

    def summarise(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = self.summarise(tokens, mask)
        return pooled if self.control is None else self.control(pooled)


class _First(_Summary):
    def summarise(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return first_token(tokens, mask)


class _Mean(_Summary):
    def summarise(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return mean_token(tokens, mask)


class _Max(_Summary):
    def summarise(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return (tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf)).amax(1)


class CLSPooling(PoolingHead):
    """The first token of each sample (Devlin et al. 2019, BERT, section 3: the ``[CLS]`` vector).

    With ``hidden_dim`` (or ``max_parameters``) it is the parameter-matched control of a comparison: a hidden layer on
    the same vector. What it gains over the bare token is what the parameters alone buy.

    Args:
        hidden_dim: Width of a layer ``GELU(W x + b)`` on the token, which becomes ``pooled_dim``; None leaves it out.
        max_parameters: Parameters that the head may have, instead of ``hidden_dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If both widths are given, or one is below 1; in ``build``, if ``max_parameters`` is too small.
    """

    width_name = "hidden_dim"

    @typed
    def __init__(
        self, hidden_dim: int | None = None, max_parameters: int | None = None, embed_dim: int | None = None
    ) -> None:
        super().__init__(hidden_dim, max_parameters)
        self.hidden_dim = hidden_dim
        if embed_dim is not None:
            self.build(embed_dim)

    def create_layer(self, embed_dim: int, width: int | None) -> PoolingLayer:
        """The first token, with a hidden layer of ``width``."""
        return _First(embed_dim, width)


class MeanPooling(PoolingHead):
    """The mean of the valid tokens (Reimers & Gurevych 2019, Sentence-BERT, section 3).

    With ``hidden_dim`` (or ``max_parameters``) it is the parameter-matched control, see :class:`CLSPooling`.

    Args:
        hidden_dim: Width of a layer ``GELU(W x + b)`` on the mean, which becomes ``pooled_dim``; None leaves it out.
        max_parameters: Parameters that the head may have, instead of ``hidden_dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If both widths are given, or one is below 1; in ``build``, if ``max_parameters`` is too small.
    """

    width_name = "hidden_dim"

    @typed
    def __init__(
        self, hidden_dim: int | None = None, max_parameters: int | None = None, embed_dim: int | None = None
    ) -> None:
        super().__init__(hidden_dim, max_parameters)
        self.hidden_dim = hidden_dim
        if embed_dim is not None:
            self.build(embed_dim)

    def create_layer(self, embed_dim: int, width: int | None) -> PoolingLayer:
        """The mean token, with a hidden layer of ``width``."""
        return _Mean(embed_dim, width)


class MaxPooling(PoolingHead):
    """The largest value of each dimension over the valid tokens (Collobert & Weston 2008). It has no parameters.

    Args:
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.
    """

    @typed
    def __init__(self, embed_dim: int | None = None) -> None:
        super().__init__(None, None)
        if embed_dim is not None:
            self.build(embed_dim)

    def create_layer(self, embed_dim: int, width: int | None) -> PoolingLayer:
        """The maximum over tokens."""
        return _Max(embed_dim, None)
