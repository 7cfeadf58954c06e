"""What a prototype readout keeps of a sample, and what each token and prototype adds to a linear classifier of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ddcl_lightning.nn.attention import DDCLAttention
from ddcl_lightning.nn.token_weights import TokenWeights, uniform_weights


@dataclass(frozen=True)
class Reading:
    """Tokens of B samples as a readout reads them, and how they are assigned.

    Attributes:
        layer: The layer that has read them.
        tokens: ``(B, T, D)``, zero at padding.
        embedded: As the bank sees them, ``(B, T, H * d)``.
        mask: ``(B, T)`` boolean, True for valid tokens; None where all are.
        log_assignments: ``ln q``, ``(B, H, T, K)``, at padding too.
        weighting: What reads the weights of the tokens from their assignments; None for a plain mean.
        left_out: Head and number of a prototype that no token is assigned to, if any.
    """

    layer: DDCLAttention
    tokens: Tensor
    embedded: Tensor
    mask: Tensor | None
    log_assignments: Tensor
    weighting: TokenWeights | None = None
    left_out: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        layer: DDCLAttention,
        tokens: Tensor,
        embedded: Tensor,
        mask: Tensor | None,
        weighting: TokenWeights | None = None,
    ) -> "Reading":
        """The reading of tokens that a layer has embedded."""
        return cls(layer, tokens, embedded, mask, layer.bank.log_assignments(embedded), weighting)

    @cached_property
    def weights(self) -> Tensor:
        """Weights of the tokens ``(B, T)``, which sum to 1; zero at padding."""
        if self.weighting is None:
            return uniform_weights(self.log_assignments[:, 0], self.mask)
        weights: Tensor = self.weighting(self.log_assignments, self.mask)
        return weights

    @cached_property
    def assignments(self) -> Tensor:
        """``q``, ``(B, H, T, K)``."""
        return self.log_assignments.exp()

    @cached_property
    def weighted_assignments(self) -> Tensor:
        """``a_t q_thk``, ``(B, T, H, K)``."""
        return torch.einsum("bt,bhtk->bthk", self.weights, self.assignments)

    @cached_property
    def histogram(self) -> Tensor:
        """Weighted mean assignment, ``(B, H, K)``: in every head it sums to 1."""
        return torch.einsum("bt,bhtk->bhk", self.weights, self.assignments)

    @cached_property
    def slot_weights(self) -> Tensor:
        """Assignments normalized over tokens instead, ``(B, H, T, K)``; zero for a prototype that is left out."""
        logits = self.log_assignments
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask[:, None, :, None], -torch.inf)
        if self.left_out is None:
            return logits.softmax(-2)
        head, number = self.left_out
        weights = logits.softmax(-2)
        weights[:, head, :, number] = 0.0
        return weights

    def without(self, head: int, number: int) -> "Reading":
        """The reading with one prototype taken out, by its head and number; its tokens go to the others there."""
        logits = self.log_assignments.clone()
        logits[:, head, :, number] = -torch.inf
        return replace(self, log_assignments=logits.log_softmax(-1), left_out=(head, number))

    def by_head(self, width: int) -> Tensor:
        """Embedded tokens of each head, ``(B, T, H, d)``."""
        return torch.unflatten(self.embedded, -1, (-1, width)).to(self.weights.dtype)


class Summary(ABC):
    """A kind of summary: a vector per sample, linear in something that every token has with every prototype.

    Subclass it and write the three methods; :data:`SUMMARIES` lists those that a pooling is made of.
    """

    @abstractmethod
    def width(self, layer: DDCLAttention) -> int:
        """Numbers of the summary."""

    @abstractmethod
    def pool(self, reading: Reading) -> Tensor:
        """Summary ``(B, width)``."""

    @abstractmethod
    def contributions(self, reading: Reading, matrix: Tensor) -> Tensor:
        """Terms ``(B, T, H, K, C)`` whose sum over tokens and prototypes is ``matrix`` times the summary.

        Args:
            reading: The tokens.
            matrix: ``(C, width)``, the columns of a classifier that read this summary.
        """


class Histogram(Summary):
    """Weighted mean assignment, H * K numbers: which prototypes occur."""

    def width(self, layer: DDCLAttention) -> int:
        """H * K."""
        return layer.bank.num_heads * layer.bank.num_prototypes

    def pool(self, reading: Reading) -> Tensor:
        """``sum_t a_t q_thk``."""
        return reading.histogram.flatten(1)

    def contributions(self, reading: Reading, matrix: Tensor) -> Tensor:
        """``a_t q_thk w_hk``."""
        return weighted(reading, torch.unflatten(matrix, -1, reading.assignments.shape[1::2]))


class Centroid(Summary):
    """Weighted mean of the layer's output: where the mixtures lie, or with a residual tokens and mixtures."""

    def width(self, layer: DDCLAttention) -> int:
        """Dimension of the layer's output."""
        return layer.output_dim

    def pool(self, reading: Reading) -> Tensor:
        """``sum_t a_t c_t``, as projected and added to the tokens."""
        centroids = torch.einsum("bhk,hkd->bhd", reading.histogram, reading.layer.bank.prototypes.to(reading.weights))
        pooled = centroids.flatten(1)
        if reading.layer.output_projection is not None:
            pooled = reading.layer.output_projection(pooled.to(reading.layer.output_projection.weight.dtype))
        return pooled + token_mean(reading) if reading.layer.residual else pooled

    def contributions(self, reading: Reading, matrix: Tensor) -> Tensor:
        """``a_t q_thk (W p_hk)``; a token that is added to its mixture is divided as its assignments are."""
        layer = reading.layer
        by_head = matrix if layer.output_projection is None else matrix @ layer.output_projection.weight.to(matrix)
        by_head = torch.unflatten(by_head, -1, (layer.bank.num_heads, layer.bank.dim))
        terms = weighted(reading, torch.einsum("hkd,chd->chk", layer.bank.prototypes.to(matrix), by_head))
        return terms + of_tokens(reading, matrix) if layer.residual else terms


class Tokens(Summary):
    """Weighted mean of the tokens themselves, D numbers."""

    def width(self, layer: DDCLAttention) -> int:
        """D."""
        return layer.embed_dim

    def pool(self, reading: Reading) -> Tensor:
        """``sum_t a_t x_t``."""
        return token_mean(reading)

    def contributions(self, reading: Reading, matrix: Tensor) -> Tensor:
        """``a_t (W x_t) q_thk / H``: a token's own term, divided as its assignments are."""
        return of_tokens(reading, matrix)


class Slots(Summary):
    """For every prototype the mean of the tokens that it is responsible for, H * K * d numbers.

    Assignments say which prototypes a token belongs to; normalized over tokens they say which tokens belong to a
    prototype, whatever its share of the sample. It is the read-out of one iteration of slot attention (Locatello et al.
    2020, Algorithm 1, lines 7 and 8) with distances to prototypes as its logits, in log space: a prototype that no
    token is near gets the tokens nearest to it, not 0 / 0.
    """

    def width(self, layer: DDCLAttention) -> int:
        """H * K * d."""
        return layer.bank.prototypes.numel()

    def pool(self, reading: Reading) -> Tensor:
        """``sum_t w_thk z_th``."""
        heads = reading.by_head(reading.layer.bank.dim)
        return torch.einsum("bhtk,bthd->bhkd", reading.slot_weights, heads).flatten(1)

    def contributions(self, reading: Reading, matrix: Tensor) -> Tensor:
        """``w_thk (W_hk z_th)``."""
        bank = reading.layer.bank
        by_prototype = torch.unflatten(matrix, -1, (bank.num_heads, bank.num_prototypes, bank.dim))
        scores = torch.einsum("bthd,chkd->bthkc", reading.by_head(bank.dim), by_prototype)
        return reading.slot_weights.transpose(1, 2).unsqueeze(-1) * scores


SUMMARIES: dict[str, tuple[Summary, ...]] = {
    "centroid": (Centroid(),),
    "histogram": (Histogram(),),
    "both": (Centroid(), Histogram()),
    "slots": (Slots(),),
    "tokens": (Tokens(),),
    "tokens_histogram": (Tokens(), Histogram()),
}


def pool(reading: Reading, summaries: tuple[Summary, ...]) -> Tensor:
    """The summaries side by side, ``(B, pooled_dim)``."""
    return torch.cat([summary.pool(reading) for summary in summaries], -1)


def contributions(reading: Reading, summaries: tuple[Summary, ...], classifier: nn.Linear) -> Tensor:
    """Terms ``(B, T, H, K, C)`` whose sum over tokens, heads and prototypes is the logits less the bias."""
    widths = [summary.width(reading.layer) for summary in summaries]
    matrices = torch.split(classifier.weight.to(reading.weights.dtype), widths, dim=1)
    terms = [summary.contributions(reading, matrix) for summary, matrix in zip(summaries, matrices, strict=True)]
    return torch.stack(terms).sum(0)


def weighted(reading: Reading, scores: Tensor) -> Tensor:
    """``a_t q_thk`` times scores ``(C, H, K)`` of the prototypes, ``(B, T, H, K, C)``."""
    return reading.weighted_assignments.unsqueeze(-1) * scores.movedim(0, -1)


def token_mean(reading: Reading) -> Tensor:
    """``sum_t a_t x_t``, ``(B, D)``."""
    return torch.einsum("bt,btd->bd", reading.weights, reading.tokens.to(reading.weights.dtype))


def of_tokens(reading: Reading, matrix: Tensor) -> Tensor:
    """``a_t (W x_t)``, divided among the prototypes of each head as the token is, ``(B, T, H, K, C)``."""
    scores = torch.einsum("btd,cd->btc", reading.tokens.to(matrix.dtype), matrix)
    num_heads = reading.assignments.shape[1]
    return reading.weighted_assignments.unsqueeze(-1) * scores[:, :, None, None, :] / num_heads
