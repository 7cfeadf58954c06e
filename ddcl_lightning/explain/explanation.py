"""What is to be said about a trained bank, as plain data: collected in one place, rendered in another."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]  # characters [start, end) of a text
Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """One sample as a person sees it.

    Attributes:
        index: Its place in the full data set.
        content: Text, image ``(H, W)`` or ``(H, W, 3)`` uint8, or None where there is nothing to show.
        label: Name of its class, or None.
    """

    index: int
    content: str | Image | None
    label: str | None


@dataclass(frozen=True)
class Neighbour:
    """A sample, or a token in it, close to a prototype.

    Attributes:
        sample: The sample.
        distance: Euclidean distance to the prototype, in the space of the bank.
        share: Mean assignment of the sample to the prototype, in [0, 1].
        span: Characters of the token, or None where the whole sample is meant.
    """

    sample: Sample
    distance: float
    share: float
    span: Span | None = None


@dataclass(frozen=True)
class WordShare:
    """A word that a prototype holds more of than of the words in general.

    Attributes:
        word: In lower case.
        lift: Its share among the prototype's words over its share among all words, > 1.
    """

    word: str
    lift: float


@dataclass(frozen=True)
class ClassShare:
    """A class within a prototype.

    Attributes:
        name: Name of the class.
        share: Its share of the prototype's labelled mass, in [0, 1].
        base: Its share of the labelled data, in [0, 1].
    """

    name: str
    share: float
    base: float


@dataclass(frozen=True)
class PrototypeView:
    """One prototype.

    Attributes:
        number: Its place in the bank.
        samples: Samples whose strongest prototype it is.
        share: The same as a share of all samples.
        weight: Mean assignment over samples; the weights of a head sum to 1.
        token_share: Share of the tokens that are nearest to it; equals ``share`` for one token per sample.
        nearest: Nearest samples, by the mean of their tokens.
        strongest: Samples with the largest share of it; empty for one token per sample, where these are the nearest.
        tokens: Nearest tokens, one per sample; empty without character spans.
        words: Characteristic words, most telling first; empty without text.
        classes: Class composition, largest first; empty without labels.
    """

    number: int
    samples: int
    share: float
    weight: float
    token_share: float
    nearest: list[Neighbour]
    strongest: list[Neighbour] = field(default_factory=list)
    tokens: list[Neighbour] = field(default_factory=list)
    words: list[WordShare] = field(default_factory=list)
    classes: list[ClassShare] = field(default_factory=list)

    @property
    def dead(self) -> bool:
        """True if no token of the data is nearest to the prototype."""
        return self.token_share == 0


@dataclass(frozen=True)
class HeadView:
    """The bank of one head.

    Attributes:
        temperature: T, in units of squared distance.
        metrics: ``usage``, ``perplexity`` and, with labels, ``acc``, ``nmi``, ``ari``: of the strongest prototype of
            every sample.
        prototypes: All of them, in order.
    """

    temperature: float
    metrics: dict[str, float]
    prototypes: list[PrototypeView]


@dataclass(frozen=True)
class TokenView:
    """A token of a text and its strongest prototype."""

    span: Span
    prototype: int
    weight: float


@dataclass(frozen=True)
class InputView:
    """One input.

    Attributes:
        sample: The sample; its label is the true class.
        predicted: Name of the class that the task predicts, or None.
        shares: Mean assignment to each prototype, per head: ``(H, K)``.
        tokens: The tokens of the text per head; empty without character spans.
    """

    sample: Sample
    predicted: str | None
    shares: npt.NDArray[np.float64]
    tokens: list[list[TokenView]] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """True if a class is predicted, the true one is known, and they differ."""
        return self.predicted is not None and self.sample.label not in (None, self.predicted)


@dataclass(frozen=True)
class Explanation:
    """Everything in a report.

    Attributes:
        data: Name of the data set.
        model: Its parts, from backbone to task.
        checkpoint: Name of the checkpoint's file, or None.
        samples: Training samples that were read.
        complete: Whether these are all of the training data.
        tokens: Tokens that were read.
        accuracy: Share of right predictions on the samples read, where the task predicts classes.
        heads: One per head of the last bank.
        inputs: Inputs, in order.
        health: What a CollapseWarning found in training, a line for each codebook; empty where none watched.
    """

    data: str
    model: list[str]
    checkpoint: str | None
    samples: int
    complete: bool
    tokens: int
    accuracy: float | None
    heads: list[HeadView]
    inputs: list[InputView]
    health: tuple[str, ...] = ()

    @property
    def token_level(self) -> bool:
        """True if samples have more than one token."""
        return self.tokens > self.samples

    def to_dict(self) -> dict[str, Any]:
        """Metrics of every head as plain numbers, for a notebook or a test."""
        return {f"head{number}": head.metrics for number, head in enumerate(self.heads)}
