"""Heads without prototypes: their common base, and the plain summaries CLS, mean and maximum."""

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional._common import masked_mean
from ddcl_lightning.heads.base import (
    Head,
    ReadoutOutput,
    check_classifier,
    check_rebuild,
    check_tokens,
    fill_padding,
)
from ddcl_lightning.heads.contracts import check_created
from ddcl_lightning.heads.width import check_width, count_parameters, widest


class PoolingHead(Head):
    """A head without prototypes that makes one vector of a sample. Subclass it and write ``create`` and ``pool``.

    Arguments are kept in attributes of the same names, as for every head. One that is called ``max_parameters`` makes
    ``build`` look for the largest width within it; the width itself may be given in the attribute that ``width_name``
    names. All parameters belong to the task and step at ``lr_task``.

    Attributes:
        max_parameters: Parameters that the head may have, or None.
        width_name: Attribute that holds the width, None for its default.
        width_step: What the width must be a multiple of (the number of heads).
    """

    max_parameters: int | None = None
    width_name: ClassVar[str] = "dim"
    width_step: int = 1

    @abstractmethod
    def create(self, embed_dim: int, width: int | None) -> int:
        """Create the layers as attributes, for tokens ``(B, T, embed_dim)``; called once.

        Args:
            embed_dim: Dimension of the tokens.
            width: Width of the layers, or None for the default.

        Returns:
            ``pooled_dim``, the dimension of what ``pool`` returns.
        """

    @abstractmethod
    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """One vector per sample, ``(B, pooled_dim)``.

        Args:
            tokens: ``(B, T, embed_dim)``, zero at padding.
            mask: ``(B, T)`` boolean, True for valid tokens, at least one in every sample; None where all are.
        """

    def build(self, embed_dim: int) -> None:
        """Create the layers for tokens of dimension ``embed_dim``."""
        if check_rebuild(self, embed_dim):
            return
        width = getattr(self, self.width_name, None)
        if self.max_parameters is not None:
            width = widest(
                lambda dim: count_parameters(lambda: self._sketch(embed_dim, dim)), self.max_parameters, self.width_step
            )
        self.pooled_dim = check_created(self, self.create(embed_dim, width))
        super().build(embed_dim)

    def _sketch(self, embed_dim: int, width: int) -> "PoolingHead":
        """A copy with layers of its own, to be counted."""
        sketch = copy.copy(self)
        nn.Module.__init__(sketch)  # else the two would share the dictionaries of their layers
        for name in ("_parameters", "_buffers", "_modules"):
            getattr(sketch, name).update(getattr(self, name))
        sketch.create(embed_dim, width)
        return sketch

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens with mask ``(B, T)``, True for valid ones; tokens stay as they are."""
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        return ReadoutOutput(tokens, self.pool(tokens, mask))

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Terms ``(B, T, H, 1, C)`` of a head whose summary is H weighted means, see :class:`~ddcl_lightning.Head`.

        Raises:
            ValueError: If a shape does not fit, or the summary is none.
        """
        check_classifier(self, classifier)
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        weights = self.weights(tokens, mask)
        if weights is None:
            return super().contributions(tokens, mask, classifier)
        matrix = torch.unflatten(classifier.weight.to(weights.dtype), -1, (weights.shape[1], -1))
        scores = torch.einsum("btd,chd->bthc", tokens.to(weights.dtype), matrix)
        return (weights.mT.unsqueeze(-1) * scores).unsqueeze(-2)

    def weights(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Weights ``(B, H, T)`` of a head whose summary is H weighted means of the tokens; None for others."""
        return None


def first_token(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The first valid token of each sample, ``(B, D)``, on whichever side the padding is."""
    if mask is None:
        return tokens[:, 0]
    place = mask.int().argmax(1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), place]


def mean_token(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean valid token of each sample, ``(B, D)``."""
    return masked_mean(tokens, mask, dim=-2)


class _Summary(PoolingHead):
    """A summary without parameters, and the control ``GELU(W s + b)`` on top where a width is given.

    Args:
        hidden_dim: Width of a layer ``GELU(W s + b)`` on the summary, which becomes ``pooled_dim``; None leaves it out.
        max_parameters: Parameters that the head may have, instead of ``hidden_dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.
    """

    width_name = "hidden_dim"
    control: nn.Sequential | None

    @typed
    def __init__(
        self, hidden_dim: int | None = None, max_parameters: int | None = None, embed_dim: int | None = None
    ) -> None:
        super().__init__()
        check_width("hidden_dim", hidden_dim, max_parameters)
        self.hidden_dim, self.max_parameters = hidden_dim, max_parameters
        if embed_dim is not None:
            self.build(embed_dim)

    @abstractmethod
    def summarize(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """One vector per sample, ``(B, embed_dim)``."""

    def create(self, embed_dim: int, width: int | None) -> int:
        """A hidden layer of ``width`` on the summary, if any."""
        self.control = None if width is None else nn.Sequential(nn.Linear(embed_dim, width), nn.GELU())
        return width or embed_dim

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The summary, through the hidden layer."""
        pooled = self.summarize(tokens, mask)
        return pooled if self.control is None else self.control(pooled)

    def weights(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Weights ``(B, 1, T)`` of the tokens in the summary; None behind a hidden layer."""
        if self.control is not None:
            return None
        # The summary is linear: what it makes of unit vectors are its weights.
        unit = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
        return self.summarize(unit, mask).unsqueeze(1)


class CLSPooling(_Summary):
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

    def summarize(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The first valid token, ``(B, embed_dim)``."""
        return first_token(tokens, mask)


class MeanPooling(_Summary):
    """The mean of the valid tokens (Reimers & Gurevych 2019, Sentence-BERT, section 3).

    With ``hidden_dim`` (or ``max_parameters``) it is the parameter-matched control, see :class:`CLSPooling`.

    Args:
        hidden_dim: Width of a layer ``GELU(W x + b)`` on the mean, which becomes ``pooled_dim``; None leaves it out.
        max_parameters: Parameters that the head may have, instead of ``hidden_dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If both widths are given, or one is below 1; in ``build``, if ``max_parameters`` is too small.
    """

    def summarize(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The mean valid token, ``(B, embed_dim)``."""
        return mean_token(tokens, mask)


class MaxPooling(PoolingHead):
    """The largest value of each dimension over the valid tokens (Collobert & Weston 2008). It has no parameters.

    Args:
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.
    """

    @typed
    def __init__(self, embed_dim: int | None = None) -> None:
        super().__init__()
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int, width: int | None) -> int:
        """Nothing: there is no layer."""
        return embed_dim

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The maximum over tokens, ``(B, embed_dim)``."""
        return (tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf)).amax(1)

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Terms ``(B, T, 1, 1, C)``: every dimension counts for the token that has its maximum, the first of equals.

        Raises:
            ValueError: If a shape does not fit.
        """
        check_classifier(self, classifier)
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        filled = tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        largest, place = filled.max(1, keepdim=True)
        values = torch.zeros_like(tokens).scatter(1, place, largest).to(classifier.weight.dtype)
        return torch.einsum("btd,cd->btc", values, classifier.weight)[:, :, None, None]
