"""What is to be said about a trained bank, as plain data: collected in one place, rendered in another."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ddcl_lightning.explain.faithfulness import Faithfulness

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
        member: Whether the prototype is the strongest one of the sample, or the nearest one of the token.
    """

    sample: Sample
    distance: float
    share: float
    span: Span | None = None
    member: bool = True


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
class ClassTerm:
    """Mean contribution of a prototype to a class.

    Attributes:
        name: Name of the class.
        term: To its logit less the mean logit over all classes.
    """

    name: str
    term: float


@dataclass(frozen=True)
class PrototypeView:
    """One prototype.

    Attributes:
        number: Its place in the bank.
        samples: Samples whose strongest prototype it is.
        share: The same as a share of all samples.
        weight: Mean assignment over samples; the weights of a head sum to 1.
        token_share: Share of the tokens that are nearest to it; equals ``share`` for one token per sample.
        nearest: Nearest members by the mean of their tokens; where it has none, the nearest samples.
        strongest: Members with the largest share of it, or samples where it has none; empty for one token per sample,
            where these are the nearest.
        tokens: Nearest tokens of its own, one per sample; where it has none, the nearest; empty without character
            spans.
        words: Characteristic words, most telling first; empty without text.
        classes: Class composition, largest first; empty without labels.
        speaks: Mean contributions to all classes of the evaluated inputs; empty without exact contributions.
        knock_out: Mean fall of the probability of the predicted class without it; None where that is not known.
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
    speaks: list[ClassTerm] = field(default_factory=list)
    knock_out: float | None = None

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
        positions: Their projections on the two first principal components of the bank, ``(K, 2)``; None where that was
            not computed.
        explained: Share of the prototypes' variance that these hold, in [0, 1].
    """

    temperature: float
    metrics: dict[str, float]
    prototypes: list[PrototypeView]
    positions: npt.NDArray[np.float64] | None = None
    explained: float = 0.0


@dataclass(frozen=True)
class TokenView:
    """A token of a text and its strongest prototype."""

    span: Span
    prototype: int
    weight: float


@dataclass(frozen=True)
class Place:
    """Place of a token in an input.

    Attributes:
        span: Characters of the text, ``(0, 0)`` for a token that stands for none.
        name: As the tokenizer or the grid calls it, such as ``[CLS]`` or ``row 2, column 3``.
    """

    span: Span
    name: str


@dataclass(frozen=True)
class Decision:
    """Margin of the predicted class over the runner-up, as an exact sum.

    ``bias + below + terms.sum()`` is the logit of the predicted class less that of the runner-up.

    Attributes:
        predicted: Name of the predicted class.
        runner_up: Name of the class with the next largest logit.
        probability: Of the predicted class.
        margin: The difference of the two logits.
        bias: Difference of the two biases.
        terms: Contributions of each of the T tokens that the head sums over, by prototype, ``(T, H, K)``.
        places: Where the tokens are, T of them; empty where the head sums over one token per sample.
        below: Contribution of lower levels of a hierarchy that the classifier reads too.
        without: Probability of the predicted class without each prototype, ``(H, K)``, NaN where there is no other;
            None where the head cannot say.
        weights: Learned weights of the tokens ``(T,)``; None where all count alike.
        grid: Tokens before the grid, rows and columns of the tokens of an image; None where that is not known.
    """

    predicted: str
    runner_up: str
    probability: float
    margin: float
    bias: float
    terms: npt.NDArray[np.float64]
    places: list[Place]
    below: float | None = None
    without: npt.NDArray[np.float64] | None = None
    weights: npt.NDArray[np.float64] | None = None
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class InputView:
    """One input.

    Attributes:
        sample: The sample; its label is the true class.
        predicted: Name of the class that the task predicts, or None.
        shares: Mean assignment to each prototype, per head: ``(H, K)``.
        tokens: The tokens of the text per head; empty without character spans.
        decision: The prediction as a sum; None without exact contributions.
        special: Tokens of the text that stand for no characters.
    """

    sample: Sample
    predicted: str | None
    shares: npt.NDArray[np.float64]
    tokens: list[list[TokenView]] = field(default_factory=list)
    decision: Decision | None = None
    special: int = 0

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
        predicts: Whether the task predicts classes.
        reads_shares: Whether the prediction is a function of the shares alone.
        no_contributions: Why there are no exact contributions to a prediction, one sentence; None where there are.
        effects: Inputs from which mean contributions and knock-outs of the prototypes were computed, and those of
            which prototypes were taken out.
        faithfulness: Of the contributions, on the same inputs; None where it was not measured.
        inputs_from: Which data the inputs are from.
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
    predicts: bool = False
    reads_shares: bool = False
    no_contributions: str | None = None
    effects: tuple[int, int] = (0, 0)
    faithfulness: Faithfulness | None = None
    inputs_from: str = "prediction data"

    @property
    def shows_shares(self) -> bool:
        """True where shares belong beside an input: nothing is predicted, or they are what the prediction reads."""
        return not self.predicts or (self.reads_shares and self.no_contributions is None)

    @property
    def token_level(self) -> bool:
        """True if samples have more than one token."""
        return self.tokens > self.samples

    def to_dict(self) -> dict[str, Any]:
        """Metrics of every head as plain numbers, for a notebook or a test."""
        return {f"head{number}": head.metrics for number, head in enumerate(self.heads)}
