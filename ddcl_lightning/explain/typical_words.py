"""Words that are typical of a prototype, in bounded memory."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddcl_lightning.explain.explanation import Span, WordShare

WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")  # letters, with inner apostrophes and hyphens
LONGEST = 40  # characters; a longer run of letters is a script without spaces, or noise
TABLE_ELEMENTS = 1 << 23  # entries of the table of masses: 64 MiB
MIN_COUNT = 3.0  # tokens a word needs in all before it can be typical of anything


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, each once, in order."""
    words = (match.group().lower() for match in WORD.finditer(text))
    return list(dict.fromkeys(word for word in words if 1 < len(word) <= LONGEST))


def words_at(text: str, spans: Sequence[Span]) -> list[str | None]:
    """The word that each token is a part of, in lower case; None for punctuation, numbers and special tokens.

    A tokenizer cuts rare words into pieces, and pieces say little: each stands for its whole word.
    """
    words: list[str | None] = [None] * len(spans)
    order = sorted((span, place) for place, span in enumerate(spans) if span[1] > span[0])
    matches = list(WORD.finditer(text))
    at = 0
    for (start, end), place in order:
        while at < len(matches) and matches[at].end() <= start:
            at += 1
        if at == len(matches):
            break
        word = matches[at].group()
        if matches[at].start() >= end or len(word) < 2:
            continue
        words[place] = word.lower() if len(word) <= LONGEST else text[start:end].lower()
    return words


class WordMass:
    """Mass of each word in each prototype, over a stream of tokens.

    Sums are exact for frequent words; when the table is full the rarest half is forgotten.

    Args:
        columns: Prototypes over all heads.
    """

    def __init__(self, columns: int) -> None:
        self._limit = max(1000, min(100_000, TABLE_ELEMENTS // max(columns, 1)))
        self._rows: dict[str, int] = {}
        self._table = np.zeros((1024, columns))
        self._counts = np.zeros(1024)
        self._totals = np.zeros(columns)
        self._count = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, words: Sequence[str], weights: npt.NDArray[np.float64]) -> None:
        """Add occurrences of words with their assignments, ``(len(words), columns)``."""
        if not len(words):
            return
        rows = np.array([self._rows.setdefault(word, len(self._rows)) for word in words])
        while len(self._rows) > len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        np.add.at(self._table, rows, weights)
        np.add.at(self._counts, rows, 1.0)
        self._totals += weights.sum(0)
        self._count += len(words)
        if len(self._rows) > self._limit:
            self._forget()

    def top(self, column: int, number: int, min_lift: float) -> list[WordShare]:
        """Words that a prototype holds more of than by chance, by how much evidence there is for it.

        The evidence is the word's term of the log-likelihood ratio, mass * ln(mass / expected mass): it favours neither
        words that are everywhere nor words that occur once.

        Args:
            column: The prototype.
            number: Words at most.
            min_lift: Smallest lift that is worth a mention, at least 1.
        """
        if not self._rows or self._totals[column] <= 0:
            return []
        used = len(self._rows)
        mass = self._table[:used, column]
        expected = self._counts[:used] / self._count * self._totals[column]
        lift = mass / expected
        # A prototype that holds half of everything cannot hold any word more than twice as often.
        floor = min(min_lift, 0.5 + 0.5 * self._count / self._totals[column])
        telling = (lift >= floor) & (mass >= 1.0) & (self._counts[:used] >= MIN_COUNT)
        evidence = np.where(telling, mass * np.log(np.maximum(lift, 1.0)), 0.0)
        names = list(self._rows)
        best = sorted(np.flatnonzero(evidence), key=lambda row: (-evidence[row], names[row]))[:number]
        return [WordShare(names[row], float(lift[row])) for row in best]

    def _forget(self) -> None:
        names = list(self._rows)
        keep = np.sort(np.argsort(-self._counts[: len(names)], kind="stable")[: self._limit // 2])
        table, counts = np.zeros_like(self._table), np.zeros_like(self._counts)
        table[: len(keep)], counts[: len(keep)] = self._table[keep], self._counts[keep]
        self._table, self._counts = table, counts
        self._rows = {names[row]: place for place, row in enumerate(keep)}
