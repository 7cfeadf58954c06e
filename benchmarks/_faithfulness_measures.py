"""What the study of faithfulness measures of a trained head: orders of word pieces, knock-outs, members."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ddcl_lightning.backbones import Tokens, TransformersBackbone
from ddcl_lightning.explain.faithfulness import area, deletion_curves, insertion_curves, pad_samples
from ddcl_lightning.explain.reencoding import reencoded_logits
from ddcl_lightning.explain.token_scores import (
    Logits,
    contribution_scores,
    gradient_times_input,
    leave_one_out,
    margins,
    prototype_scores,
    random_scores,
    readout_logits,
    weight_scores,
)
from ddcl_lightning.heads import DDCLReadout, PMAPooling
from ddcl_lightning.heads.base import Head

KEPT = 150_000  # sequences whose tokens stay in memory
BATCH = 64  # sequences that are encoded together
NAMED = 5  # prototypes that the card of an input names
Numbers = dict[str, float]
Assigned = tuple[Tensor, Tensor]  # codes of tokens (B, T, H), and shares of samples (B, H, K)


class Encoder:
    """Tokens of sequences of ids, rounded as the cache of features is; most are encoded once."""

    def __init__(self, backbone: TransformersBackbone) -> None:
        self._backbone, self._kept = backbone, dict[tuple[int, ...], Tensor]()

    @torch.no_grad()
    def __call__(self, samples: Sequence[Tensor]) -> Tokens:
        """Tokens of sequences ``(T_i,)``, padded; those that are new are encoded with others of their length."""
        keys = [tuple(ids.tolist()) for ids in samples]
        missing = sorted({key for key in keys if key not in self._kept}, key=len)
        encoded = {}
        for start in range(0, len(missing), BATCH):
            chunk = missing[start : start + BATCH]
            values = self._backbone.encode([torch.tensor(key) for key in chunk]).values.half()
            encoded |= {key: row[: len(key)].clone() for key, row in zip(chunk, values, strict=True)}
        rows = [(self._kept[key] if key in self._kept else encoded[key]).float() for key in keys]
        if len(self._kept) < KEPT:
            self._kept |= encoded
        return Tokens(*pad_samples([(row, None) for row in rows]))


@dataclass(frozen=True)
class Inputs:
    """Texts as an encoder reads them, and what a head predicts.

    Attributes:
        pieces: Word pieces ``(B, T, 2)``, see :func:`~ddcl_lightning.explain.reencoding.word_pieces`.
        kept: ``(B, T)`` boolean, True for word pieces.
        tokens: ``(B, T, D)``.
        mask: ``(B, T)`` boolean, True for special tokens too.
        classes: Predicted class ``(B,)``.
        others: The runner-up ``(B,)``.
    """

    pieces: Tensor
    kept: Tensor
    tokens: Tensor
    mask: Tensor
    classes: Tensor
    others: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pieces: Tensor, kept: Tensor, encode: Encoder, head: Head, classifier: nn.Linear) -> "Inputs":
        """Inputs of a head, from word pieces."""
        mask = kept | (pieces[..., 1] == 1)
        tokens, _ = encode([row[valid] for row, valid in zip(pieces[..., 0], mask, strict=True)])
        classes, others = readout_logits(head, classifier)(tokens, mask).topk(2, -1).indices.unbind(-1)
        return cls(pieces, kept, tokens, mask, classes, others)

    @property
    def compared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of every score: tokens, mask, classes and others."""
        return self.tokens, self.mask, self.classes, self.others


def orders(head: Head, classifier: nn.Linear, inputs: Inputs, reencoded: Logits, draws: int) -> dict[str, list[Tensor]]:
    """Scores ``(B, T)`` of all tokens by several definitions, of random ones several; the same draws for every head."""
    compared = (inputs.classes, inputs.others)
    generator = torch.Generator().manual_seed(0)
    scores = {
        "random": [random_scores(inputs.tokens, generator) for _ in range(draws)],
        "leave-one-out": [leave_one_out(reencoded, inputs.pieces, inputs.kept, *compared)],
        "gradient": [gradient_times_input(readout_logits(head, classifier), *inputs.compared)],
    }
    if not isinstance(head, PMAPooling):
        scores["contribution"] = [contribution_scores(head, classifier, *inputs.compared)]
    if isinstance(head, DDCLReadout):
        scores["share"] = [strongest_share(head, inputs.tokens, inputs.mask)]
    if not isinstance(head, DDCLReadout) or head.token_weights != "uniform":
        weights = pma_weights if isinstance(head, PMAPooling) else weight_scores
        scores["weight"] = [weights(head, inputs.tokens, inputs.mask)]  # type: ignore[arg-type]
    return scores


@torch.no_grad()
def strongest_share(head: DDCLReadout, tokens: Tensor, mask: Tensor) -> Tensor:
    """Assignment of every token to the prototype that its sample has the largest share of, ``(B, T)``."""
    shares = head(tokens, mask).assignments
    weights = head.attention(tokens, mask, need_weights=True).weights
    assert shares is not None
    assert weights is not None
    by_prototype = weights.transpose(2, 3).flatten(1, 2)  # (B, H K, T)
    return by_prototype[torch.arange(len(tokens)), shares.flatten(1).argmax(1)]


@torch.no_grad()
def pma_weights(head: PMAPooling, tokens: Tensor, mask: Tensor) -> Tensor:
    """Attention of the seed, its mean over heads, ``(B, T)``."""
    keys = head.feed_forward(tokens).relu()
    seeds = head.seeds.expand(len(tokens), -1, -1)
    _, weights = head.block.attention(seeds, keys, keys, ~mask, need_weights=True)
    return weights.mean(1)


def curve_areas(
    head: Head, classifier: nn.Linear, inputs: Inputs, encode: Encoder, steps: int, draws: int
) -> dict[str, Numbers]:
    """Areas of deletion and insertion by order, where the encoder reads anew what is left of the texts.

    The standard error of the difference to the exact contributions, over inputs, is there too (the larger of the two).
    """
    reencoded = reencoded_logits(encode, head, classifier)
    columns = {}
    for name, several in orders(head, classifier, inputs, reencoded, draws).items():
        given = (reencoded, inputs.pieces, inputs.kept)
        columns[name] = torch.stack(
            [
                torch.stack([area(curves(*given, scores, inputs.classes, steps)) for scores in several]).mean(0)
                for curves in (deletion_curves, insertion_curves)
            ]
        )
    result = {}
    for name, areas in columns.items():
        result[name] = {"deletion": float(areas[0].mean()), "insertion": float(areas[1].mean())}
        if "contribution" in columns:
            errors = (columns["contribution"] - areas).std(1) / areas.shape[1] ** 0.5
            result[name] |= {"error": float(errors.max())}
    return result


@torch.no_grad()
def knock_outs(head: DDCLReadout, classifier: nn.Linear, inputs: Inputs) -> dict[str, Numbers]:
    """Fall of margin and probability of the predicted class without a prototype, by how it is chosen.

    Also how often the margin falls, and the correlation of what chooses with the falls, over all inputs and prototypes.
    """
    logits = readout_logits(head, classifier)(inputs.tokens, inputs.mask)
    without = head.logits_without(inputs.tokens, inputs.mask, classifier)  # (B, H, K, C)
    compared = (inputs.classes, inputs.others)
    falls = (margins(logits, *compared)[:, None, None] - margins(without, *compared)).flatten(1)
    before, after = (margins(values.double().softmax(-1), inputs.classes) for values in (logits, without))
    losses = (before[:, None, None] - after).flatten(1)
    shares = head(inputs.tokens, inputs.mask).assignments
    assert shares is not None
    predicted = {
        "contribution": prototype_scores(head, classifier, *inputs.compared).flatten(1),
        "share": shares.flatten(1),
    }
    result = {"random": _losses(falls, losses)}
    for name, values in predicted.items():
        chosen = values.argmax(1, keepdim=True)
        correlation = torch.corrcoef(torch.stack([values.flatten().double(), falls.flatten().double()]))[0, 1]
        result[name] = _losses(falls.gather(1, chosen), losses.gather(1, chosen)) | {"correlation": float(correlation)}
    return result


def _losses(falls: Tensor, losses: Tensor) -> Numbers:
    return {
        "margin": float(falls.mean()),
        "probability": float(losses.mean()),
        "supports": float((falls > 0).double().mean()),
    }


# Edits -------------------------------------------------------------------------------------------


def word_less(text: str, generator: np.random.Generator) -> str:
    """The text without one of its words, drawn at random."""
    words = text.split()
    del words[int(generator.integers(len(words)))]
    return " ".join(words)


def full_stop(text: str, generator: np.random.Generator) -> str:
    """The text without its full stop, or with one."""
    text = text.rstrip()
    return text.removesuffix(".").rstrip() if text.endswith(".") else f"{text} ."


def swapped_words(text: str, generator: np.random.Generator) -> str:
    """The text with two neighbouring words in the other order."""
    words = text.split()
    at = int(generator.integers(len(words) - 1))
    words[at : at + 2] = words[at + 1], words[at]
    return " ".join(words)


EDITS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "word": word_less,
    "stop": full_stop,
    "swap": swapped_words,
}


def named_overlap(head: DDCLReadout, classifier: nn.Linear, inputs: Inputs, edited: Inputs) -> float:
    """Mean Jaccard index of the prototypes that are named before and after an edit, those of the largest terms."""
    named = [
        _largest(prototype_scores(head, classifier, *each.compared).flatten(1), NAMED) for each in (inputs, edited)
    ]
    return float(jaccard(*named).mean())


def piece_overlap(scores: Sequence[Tensor], kept: Tensor, number: int = 3) -> float:
    """Mean Jaccard index of the word pieces of the largest terms by two models."""
    return float(jaccard(*(_largest(each.masked_fill(~kept, 0.0), number) for each in scores)).mean())


def _largest(values: Tensor, number: int) -> Tensor:
    """Boolean ``(B, N)``, True for the values of largest magnitude in each row."""
    places = values.abs().topk(min(number, values.shape[1]), 1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, places, torch.ones_like(places, dtype=torch.bool))


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Jaccard index of two boolean tensors ``(B, N)`` by row."""
    return (first & second).sum(1).double() / (first | second).sum(1).clamp(min=1)


# Members -----------------------------------------------------------------------------------------


@torch.no_grad()
def read_out(head: DDCLReadout, tokens: Tensor, mask: Tensor) -> Assigned:
    """Tokens and samples as a head assigns them."""
    weights, shares = head.attention(tokens, mask, need_weights=True).weights, head(tokens, mask).assignments
    assert weights is not None
    assert shares is not None
    return weights.argmax(-1).transpose(1, 2), shares


def nearest(centers: Tensor, tokens: Tensor, mask: Tensor) -> Assigned:
    """Tokens at their nearest centers; the shares of a sample are those of its tokens."""
    codes = torch.cdist(tokens, centers).argmin(-1)
    return codes.unsqueeze(-1), (one_hot(codes, len(centers)) * mask.unsqueeze(-1)).sum(1, keepdim=True)


def matched_members(first: Tensor, second: Tensor, sizes: int) -> float:
    """Mean Jaccard index of the members of prototypes, matched by the Hungarian method.

    Args:
        first: Codes ``(N, H)`` int64 of tokens, by one model.
        second: Codes of the same tokens by another one.
        sizes: K, prototypes of every codebook.
    """
    marks = [one_hot(codes, sizes).flatten(1).double() for codes in (first, second)]
    both = marks[0].T @ marks[1]
    union = marks[0].sum(0).unsqueeze(1) + marks[1].sum(0) - both
    overlap = (both / union.clamp(min=1)).numpy()
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return float(overlap[rows, columns].mean())


def purity(codes: Tensor, labels: Tensor, sizes: int) -> float:
    """Share of the majority class among members, weighted by their number; the mean over codebooks.

    Args:
        codes: ``(N, H)`` int64.
        labels: ``(N,)`` int64.
        sizes: K.
    """
    classes = one_hot(labels).double()
    counts = [one_hot(column, sizes).double().T @ classes for column in codes.T]  # (K, C) each
    return float(np.mean([float(table.max(1).values.sum()) / len(codes) for table in counts]))
