"""Running sums over the training data for each prototype."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddcl_lightning._utils.batch import Batch, class_labels
from ddcl_lightning.explain.batch_summary import BatchSummary, distances, real_tokens
from ddcl_lightning.explain.decisions import Effects
from ddcl_lightning.explain.explanation import ClassShare, ClassTerm, HeadView, Neighbour, PrototypeView
from ddcl_lightning.explain.nearest import MembersFirst
from ddcl_lightning.explain.samples import Album, positions
from ddcl_lightning.explain.typical_words import WordMass, words_at, words_of
from ddcl_lightning.functional import code_counts
from ddcl_lightning.metrics.clustering_metrics import (
    adjusted_rand_index,
    hungarian_accuracy,
    normalized_mutual_info,
    perplexity,
    usage,
)

TOP_WORDS = 12
TOP_CLASSES = 6
MIN_SHARE = 0.01  # of a sample that stands for a prototype
# Smallest lift of a characteristic word: long texts hold more of all words, so whole texts need more of a contrast.
TOKEN_LIFT, TEXT_LIFT = 1.2, 2.0
MAX_CLASSES = 10_000  # more are no classes but identities


class Tally:
    """Sums over batches; their memory depends on prototypes, classes and words, not on the number of samples.

    Args:
        heads: H.
        prototypes: K per head.
        examples: Nearest samples and tokens kept per prototype.
        album: Shows samples.

    Attributes:
        samples: Samples so far.
        tokens: Valid tokens so far.
    """

    def __init__(self, heads: int, prototypes: int, examples: int, album: Album) -> None:
        self.samples = self.tokens = 0
        self._shape, self._album = (heads, prototypes), album
        self._weight = torch.zeros(heads, prototypes, dtype=torch.float64)
        self._token_counts = torch.zeros(heads, prototypes, dtype=torch.int64)
        self._class_weight = torch.zeros(heads, prototypes, 0, dtype=torch.float64)
        self._counts = torch.zeros(heads, prototypes, 0, dtype=torch.int64)
        self._sizes = torch.zeros(heads, prototypes, dtype=torch.int64)
        self._predicted = self._right = 0
        columns = heads * prototypes
        self._nearest: MembersFirst[Neighbour] = MembersFirst(columns, examples)
        self._strongest: MembersFirst[Neighbour] = MembersFirst(columns, examples)
        self._nearest_tokens: MembersFirst[Neighbour] = MembersFirst(columns, examples)
        self._words = WordMass(heads * prototypes)
        self._by_token = False

    def add(self, summary: BatchSummary, batch: Batch) -> None:
        """Add a batch and the module's results for it."""
        prototypes = self._shape[1]
        places, known = positions(batch, self.samples)
        truth = class_labels(batch)
        self._weight += summary.shares.sum(0)
        strongest = summary.shares.argmax(-1)
        self._sizes += code_counts(strongest.T, prototypes)
        self._token_counts += code_counts(summary.codes.flatten(0, 1).T, prototypes, summary.mask.flatten())
        self._add_classes(summary, strongest, truth)
        where = torch.tensor(places)
        apart = distances(summary.means.movedim(1, 0), summary.prototypes.cpu().double())  # (H, B, K)

        def sample(column: int, row: int) -> Neighbour:
            head, k = divmod(column, prototypes)
            shown = self._album.sample(batch, row, places[row], known)
            share, member = float(summary.shares[row, head, k]), bool(strongest[row, head] == k)
            return Neighbour(shown, float(apart[head, row, k]), share, member=member)

        members = torch.nn.functional.one_hot(strongest, prototypes).bool().flatten(1).T  # (H K, B)
        self._nearest.add(apart.mT.flatten(0, 1), members, where, sample)
        if summary.mask.shape[1] > 1:
            # Of no share at all is no example, however few there are.
            absent = torch.where(summary.shares > MIN_SHARE, -summary.shares, torch.inf)
            self._strongest.add(absent.flatten(1).T, members, where, sample)
        if isinstance(batch, dict) and "text" in batch:
            self._add_text(summary, batch, places, known)
        self.samples += len(places)
        self.tokens += int(summary.mask.sum())

    def _add_classes(self, summary: BatchSummary, strongest: Tensor, truth: Tensor) -> None:
        labelled = torch.nonzero((truth >= 0) & (truth < MAX_CLASSES)).flatten()
        if not len(labelled):
            return
        classes = truth[labelled]
        missing = int(classes.max()) + 1 - self._counts.shape[-1]
        if missing > 0:
            self._counts = torch.nn.functional.pad(self._counts, (0, missing))
            self._class_weight = torch.nn.functional.pad(self._class_weight, (0, missing))
        for head in range(self._shape[0]):
            self._counts[head].index_put_(
                (strongest[labelled, head], classes), torch.ones_like(classes), accumulate=True
            )
            self._class_weight[head].index_add_(1, classes, summary.shares[labelled, head].T)
        if summary.predicted is not None:
            self._predicted += len(labelled)
            self._right += int((summary.predicted[labelled] == classes).sum())

    def _add_text(self, summary: BatchSummary, batch: Batch, places: Sequence[int], known: bool) -> None:
        """Words by their tokens where the backbone tells their places, else by the text that they are in."""
        texts: Sequence[str] = batch["text"]
        if summary.spans is None:
            for row, text in enumerate(texts):
                words = words_of(text)
                self._words.add(words, np.tile(summary.shares[row].flatten().numpy(), (len(words), 1)))
            return
        nearest = torch.full((self._weight.numel(), len(texts)), torch.inf, dtype=torch.float64)
        token = torch.zeros(nearest.shape, dtype=torch.int64)
        own = torch.zeros(nearest.shape, dtype=torch.bool)
        for row, (text, spans) in enumerate(zip(texts, summary.spans, strict=True)):
            real = real_tokens(spans)
            if not real:
                continue
            weights = summary.token_weights(row).movedim(1, 0).flatten(1)  # (T, H K)
            named = [(place, word) for place, word in enumerate(words_at(text, spans)) if word is not None]
            self._words.add([word for _, word in named], weights[[place for place, _ in named]].numpy())
            by_head = summary.token_distances(row)[:, real].movedim(1, 0)  # (T, H, K)
            codes = torch.nn.functional.one_hot(summary.codes[row, real], self._shape[1]).bool().flatten(1)
            apart, has_own = by_head.flatten(1), codes.any(0)
            # The nearest of its own tokens, where the text has any.
            at = torch.where(has_own, apart.masked_fill(~codes, torch.inf).argmin(0), apart.argmin(0))
            nearest[:, row] = apart.gather(0, at.unsqueeze(0))[0]
            token[:, row], own[:, row] = torch.tensor(real)[at], has_own
        spans_of, self._by_token = summary.spans, True

        def context(column: int, row: int) -> Neighbour:
            span = spans_of[row][int(token[column, row])]
            shown = self._album.sample(batch, row, places[row], known)
            share = float(summary.shares[row].flatten()[column])
            return Neighbour(shown, float(nearest[column, row]), share, span, bool(own[column, row]))

        self._nearest_tokens.add(nearest, own, torch.tensor(places), context)

    def counts(self) -> dict[str, Any]:
        """Samples and tokens so far, and the ``accuracy`` where the task predicts and there are labels, else None."""
        accuracy = self._right / self._predicted if self._predicted else None
        return {"samples": self.samples, "tokens": self.tokens, "accuracy": accuracy}

    def heads(
        self, temperatures: Sequence[float], prototypes: Tensor, effects: Effects | None = None
    ) -> list[HeadView]:
        """Description of every head, from all batches so far.

        Args:
            temperatures: H of them.
            prototypes: ``(H, K, d)``.
            effects: Of the prototypes on predictions.
        """
        views = []
        for head, temperature in enumerate(temperatures):
            positions, explained = principal_plane(prototypes[head])
            described = [self._prototype(head, k, effects) for k in range(self._shape[1])]
            views.append(HeadView(temperature, self._metrics(head), described, positions, explained))
        return views

    def _metrics(self, head: int) -> dict[str, float]:
        sizes, counts = self._sizes[head], self._counts[head]
        values = {"usage": usage(sizes), "perplexity": perplexity(sizes)}
        if counts.sum() > 0:
            values |= {
                "acc": hungarian_accuracy(counts),
                "nmi": normalized_mutual_info(counts),
                "ari": adjusted_rand_index(counts),
            }
        return {name: float(value) for name, value in values.items()}

    def _prototype(self, head: int, k: int, effects: Effects | None) -> PrototypeView:
        column = head * self._shape[1] + k
        return PrototypeView(
            number=k,
            samples=int(self._sizes[head, k]),
            share=float(self._sizes[head, k]) / self.samples,
            weight=float(self._weight[head, k]) / self.samples,
            token_share=float(self._token_counts[head, k]) / max(self.tokens, 1),
            nearest=self._nearest.of(column),
            strongest=self._strongest.of(column),
            tokens=self._nearest_tokens.of(column),
            words=self._words.top(column, TOP_WORDS, TOKEN_LIFT if self._by_token else TEXT_LIFT),
            classes=self._classes(head, k),
            speaks=[] if effects is None else self._speaks(effects.contributions[head, k]),
            knock_out=None if effects is None or effects.knock_out is None else known(effects.knock_out[head, k]),
        )

    def _speaks(self, terms: Tensor) -> list[ClassTerm]:
        return [ClassTerm(self._album.class_name(c) or str(c), term) for c, term in enumerate(terms.tolist())]

    def _classes(self, head: int, k: int) -> list[ClassShare]:
        mass, base = self._class_weight[head, k], self._class_weight[head].sum(0)
        # Denormal masses far from a prototype are no evidence of anything.
        if not len(mass) or float(mass.sum()) <= 1e-6:
            return []
        shares, bases = mass / mass.sum(), base / base.sum()
        order = sorted(range(len(shares)), key=lambda c: (-float(shares[c]), c))[:TOP_CLASSES]
        return [
            ClassShare(self._album.class_name(c) or str(c), float(shares[c]), float(bases[c]))
            for c in order
            if float(shares[c]) >= 5e-4
        ]


def known(value: Tensor) -> float | None:
    """A number, or None for NaN."""
    return None if bool(value.isnan()) else float(value)


def principal_plane(prototypes: Tensor) -> tuple[npt.NDArray[np.float64], float]:
    """Projections of prototypes ``(K, d)`` on their two first principal components ``(K, 2)``, and their share.

    Signs are such that the coordinate of the largest size of each axis is positive.
    """
    points = prototypes.detach().cpu().double()
    centered = points - points.mean(0)
    left, sizes, _ = torch.linalg.svd(centered, full_matrices=False)
    plane = torch.zeros(len(points), 2, dtype=torch.float64)
    width = min(2, len(sizes))
    plane[:, :width] = left[:, :width] * sizes[:width]
    largest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    plane = torch.where(largest < 0, -plane, plane)
    total = float(sizes.square().sum())
    return plane.numpy(), float(sizes[:2].square().sum()) / total if total > 0 else 1.0
