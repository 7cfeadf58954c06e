"""Faithfulness of an explanation, measured: does the prediction fall when what is said to matter is taken out?

Any score per token ``(B, T)`` can be judged by :func:`deletion_curves` and :func:`insertion_curves`;
:mod:`~ddcl_lightning.explain.token_scores` has several. Tokens are masked out at the head's input, so what an encoder
has mixed into the others stays there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddcl_lightning.explain.token_scores import (
    MAX_ELEMENTS,
    Logits,
    contribution_chunks,
    margins,
    random_scores,
    readout_logits,
)
from ddcl_lightning.heads.base import Head

STEPS = 10  # of a curve
DRAWS = 5  # random orders of the tokens of a sample
BATCH = 32  # samples at a time
MAX_ROWS = 512  # masked copies of samples at a time
KNOCK_OUTS = 20_000  # prototypes taken out, over all samples


@dataclass(frozen=True)
class Comparison:
    """A mean over samples beside that of random choices for the same samples.

    Attributes:
        value: By contribution.
        random: By chance.
        gain: How much better than chance, > 0 where it is; in the units of both.
        error: Standard error of ``gain`` over samples.
    """

    value: float
    random: float
    gain: float
    error: float

    @property
    def better(self) -> bool:
        """True if it is better than chance by more than two standard errors."""
        return self.gain > 2 * self.error and self.gain > 0


@dataclass(frozen=True)
class Faithfulness:
    """Measures of how faithful the contributions of a model are, on a sample of inputs.

    Attributes:
        samples: Inputs of several tokens whose tokens were masked out.
        tokens: Mean number of their tokens.
        draws: Random orders per input.
        deletion: Area under the probability of the predicted class while tokens are masked out, those first that
            speak most for it; in [0, 1], lower is better. None where samples have one token.
        insertion: The same while tokens are put in, in the same order; higher is better.
        knock_out_samples: Inputs whose prototypes were taken out.
        knock_out: Fall of the margin without the prototype that speaks most for the predicted class, and without one
            drawn at random (its expectation); in logits, higher is better. None where the head cannot.
    """

    samples: int
    tokens: float
    draws: int
    deletion: Comparison | None
    insertion: Comparison | None
    knock_out_samples: int
    knock_out: Comparison | None


def deletion_curves(
    logits: Logits, tokens: Tensor, mask: Tensor | None, scores: Tensor, classes: Tensor, steps: int = STEPS
) -> Tensor:
    """Probability of a class while tokens are masked out, largest scores first, until one is left.

    Args:
        logits: From tokens and mask to logits ``(B, C)``; see
            :func:`~ddcl_lightning.explain.token_scores.readout_logits`.
        tokens: ``(B, T, D)``.
        mask: ``(B, T)`` boolean, True for valid tokens, or None where all are.
        scores: ``(B, T)``, of any definition; equal ones go in the order of the tokens.
        classes: ``(B,)`` int64.
        steps: Points of the curve less one, at least 1: of n tokens ``round(j (n - 1) / steps)`` are out at point j.

    Returns:
        ``(B, steps + 1)`` float64 on the CPU, from all tokens to one.

    Raises:
        ValueError: If a shape does not fit, or a score is NaN.
    """
    rank, counts, valid = _ranks(tokens, mask, scores, steps)
    points = torch.arange(steps + 1, device=tokens.device)
    out = (points * (counts - 1).unsqueeze(1) / steps).round()  # (B, S + 1)
    kept = valid.unsqueeze(1) & (rank.unsqueeze(1) >= out.unsqueeze(2))
    return _curves(logits, tokens, kept, classes)


def insertion_curves(
    logits: Logits, tokens: Tensor, mask: Tensor | None, scores: Tensor, classes: Tensor, steps: int = STEPS
) -> Tensor:
    """Probability of a class while tokens are put in, largest scores first, from one to all.

    Arguments and result are those of :func:`deletion_curves`.

    Raises:
        ValueError: If a shape does not fit, or a score is NaN.
    """
    rank, counts, valid = _ranks(tokens, mask, scores, steps)
    points = torch.arange(steps + 1, device=tokens.device)
    number = 1 + (points * (counts - 1).unsqueeze(1) / steps).round()
    kept = valid.unsqueeze(1) & (rank.unsqueeze(1) < number.unsqueeze(2))
    return _curves(logits, tokens, kept, classes)


def area(curves: Tensor) -> Tensor:
    """Area under curves ``(B, S + 1)`` over an axis from 0 to 1, by trapezoids: ``(B,)``."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


@torch.no_grad()
def knock_out_falls(
    head: Head, classifier: nn.Linear, tokens: Tensor, mask: Tensor | None, classes: Tensor, others: Tensor | None
) -> Tensor | None:
    """Fall of the margin when a prototype is taken out and its tokens go to the others.

    Args:
        head: The head.
        classifier: Reads ``pooled``.
        tokens: ``(B, T, D)``.
        mask: ``(B, T)`` boolean, or None.
        classes: ``(B,)``.
        others: Classes to compare with, ``(B,)``; None for the class's logit alone.

    Returns:
        ``(B, H, K)``; NaN for the only prototype of a head. None where the head cannot say (``logits_without``).
    """
    without = head.logits_without(tokens, mask, classifier)
    if without is None:
        return None
    whole = margins(readout_logits(head, classifier)(tokens, mask), classes, others)
    return whole[:, None, None] - margins(without, classes, others)


@torch.no_grad()
def measure(
    head: Head,
    classifier: nn.Linear,
    samples: Sequence[tuple[Tensor, Tensor | None]],
    *,
    steps: int = STEPS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Faithfulness:
    """Faithfulness of a head's contributions to the margin of the predicted class against the runner-up.

    The same samples give the same numbers; the work is bounded by their number, by ``steps`` and ``draws``, and by
    20,000 prototypes taken out.

    Args:
        head: With exact contributions, in evaluation mode.
        classifier: Reads ``pooled``, for two classes or more.
        samples: Tokens ``(T, D)`` and mask ``(T,)`` of each, at the head's input; lengths may differ.
        steps: Of the curves.
        draws: Random orders of the tokens of each sample, at least 1.
        seed: Of the random orders.

    Raises:
        ValueError: If the head has no exact contributions.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = readout_logits(head, classifier)
    areas: list[Tensor] = []  # (B, 4): deletion and insertion, by contribution and by chance
    falls: list[Tensor] = []  # (B, 2): strongest and random prototype
    counts: list[Tensor] = []
    most = len(samples)
    for start in range(0, len(samples), BATCH):
        tokens, mask = pad_samples(samples[start : start + BATCH])
        classes, others = logits(tokens, mask).topk(2, -1).indices.unbind(-1)
        by_prototype, by_token = _terms(head, classifier, tokens, mask, classes, others)
        if by_token is not None:
            number = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(1).cpu()
            rows = torch.nonzero(number > 1).flatten().to(tokens.device)
            if len(rows):
                given = (tokens[rows], None if mask is None else mask[rows])
                orders = [by_token[rows], *(random_scores(given[0], generator) for _ in range(draws))]
                areas.append(_areas(logits, *given, orders, classes[rows], steps))
                counts.append(number[rows.cpu()])
        most = min(most, max(1, KNOCK_OUTS // by_prototype[0].numel()))
        if start < most and by_prototype[0].numel() > 1:
            rows = torch.arange(min(len(tokens), most - start), device=tokens.device)
            given = (tokens[rows], None if mask is None else mask[rows])
            fall = knock_out_falls(head, classifier, *given, classes[rows], others[rows])
            falls += [] if fall is None else _falls(fall, by_prototype[rows])
    deletion, insertion, knock_out = None, None, None
    if areas:
        table = torch.cat(areas)
        deletion, insertion = _compare(table[:, :2], -1), _compare(table[:, 2:], 1)
    if falls:
        knock_out = _compare(torch.cat(falls), 1)
    number_of = torch.cat(counts).double() if counts else torch.zeros(1)
    return Faithfulness(
        sum(map(len, areas)), float(number_of.mean()), draws, deletion, insertion, sum(map(len, falls)), knock_out
    )


def pad_samples(samples: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Samples ``(T_i, D)`` with masks ``(T_i,)`` as one batch ``(B, T, D)``, with a mask only where it is needed."""
    length = max(len(tokens) for tokens, _ in samples)
    if all(mask is None and len(tokens) == length for tokens, mask in samples):
        return torch.stack([tokens for tokens, _ in samples]), None
    first = samples[0][0]
    batch = first.new_zeros(len(samples), length, first.shape[-1])
    valid = torch.zeros(len(samples), length, dtype=torch.bool, device=first.device)
    for row, (tokens, mask) in enumerate(samples):
        batch[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True if mask is None else mask
    return batch, valid


def _terms(
    head: Head, classifier: nn.Linear, tokens: Tensor, mask: Tensor | None, classes: Tensor, others: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Contributions to the margin by prototype ``(B, H, K)``, and by token ``(B, T)`` where the head sums over them."""
    chunks = contribution_chunks(head, classifier, tokens, mask)
    terms = [margins(values, classes[rows], others[rows]) for rows, values in chunks]
    by_prototype = torch.cat([chunk.sum(1) for chunk in terms])
    same = terms[0].shape[1] == tokens.shape[1]
    return by_prototype, torch.cat([chunk.sum((2, 3)) for chunk in terms]) if same else None


def _ranks(tokens: Tensor, mask: Tensor | None, scores: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank of every token by its score, from 0, ``(B, T)``; number of valid tokens ``(B,)``; the mask ``(B, T)``."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}. Pass 1 or more.")
    if scores.shape != tokens.shape[:2]:
        raise ValueError(
            f"scores must have one number per token, shape {tuple(tokens.shape[:2])}; got {tuple(scores.shape)}. Sum "
            "over prototypes and dimensions first."
        )
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
    if bool(scores[valid].isnan().any()):
        raise ValueError("scores must not be NaN; got one for a valid token. Look at the scores before they are used.")
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # A score of -inf must not be mixed with padding.
    order = order.gather(1, (~valid).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return rank, valid.sum(1), valid


@torch.no_grad()
def _curves(logits: Logits, tokens: Tensor, kept: Tensor, classes: Tensor) -> Tensor:
    """Probabilities ``(B, S)`` of classes with only the tokens kept, ``(B, S, T)``."""
    samples, points, length = kept.shape
    rows = max(1, min(MAX_ROWS, MAX_ELEMENTS // (length * tokens.shape[2])) // points)
    curves = []
    for start in range(0, samples, rows):
        chunk = slice(start, start + rows)
        masks = kept[chunk].flatten(0, 1)
        scores = logits(tokens[chunk].repeat_interleave(points, 0), masks)
        chosen = classes[chunk].to(scores.device).repeat_interleave(points).unsqueeze(1)
        curves.append(scores.double().softmax(-1).gather(1, chosen).reshape(-1, points).cpu())
    return torch.cat(curves)


def _areas(
    logits: Logits, tokens: Tensor, mask: Tensor | None, orders: Sequence[Tensor], classes: Tensor, steps: int
) -> Tensor:
    """Areas ``(B, 4)``: deletion by the first order, by the mean of the others, and the same of insertion."""
    columns = []
    for curves in (deletion_curves, insertion_curves):
        first, *others = (area(curves(logits, tokens, mask, scores, classes, steps)) for scores in orders)
        columns += [first, torch.stack(others).mean(0)]
    return torch.stack(columns, 1)


def _falls(falls: Tensor, by_prototype: Tensor) -> list[Tensor]:
    """For each sample the fall without its strongest prototype and the mean fall over all, ``(1, 2)`` each."""
    rows = []
    for fall, terms in zip(falls.double().cpu().flatten(1), by_prototype.double().cpu().flatten(1), strict=True):
        known = ~fall.isnan()
        if bool(known.any()):
            strongest = terms.masked_fill(~known, -torch.inf).argmax()
            rows.append(torch.stack([fall[strongest], fall[known].mean()]).unsqueeze(0))
    return rows


def _compare(table: Tensor, sign: int) -> Comparison:
    """Comparison of two columns ``(N, 2)``; ``sign`` is -1 where the smaller one is better."""
    gain = sign * (table[:, 0] - table[:, 1])
    error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else float("inf")
    value, chance = table.mean(0).tolist()
    return Comparison(value, chance, float(gain.mean()), error)
