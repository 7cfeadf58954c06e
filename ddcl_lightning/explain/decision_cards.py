"""The prediction of an input as a sum: prototypes with their biggest tokens, the bias, and the tokens of the text."""

import re
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from ddcl_lightning.explain.explanation import Decision, HeadView
from ddcl_lightning.explain.html import anchor, chip, percent
from ddcl_lightning.explain.signed import AGAINST, FOR, apportioned, digits_for, level, sign_bar, sign_hue, signed

NAMED = 5  # prototypes
BIGGEST = 3  # tokens of a prototype
TEXT = 2500  # characters of an input


def sum_table(decision: Decision, heads: Sequence[HeadView], text: str | None) -> str:
    """Table of the terms of a decision; what is printed adds up to the total that is printed.

    Args:
        decision: The prediction.
        heads: Of the page.
        text: The input, where it is one.
    """
    by_prototype = decision.terms.sum(0)
    named = _largest(by_prototype)[:NAMED]
    rest = by_prototype.size - len(named)
    values, printed, digits = _printed(decision)
    rows = [(_name(h, k, len(heads)), _remarks(decision, h, k, heads, text)) for h, k in named]
    rows += [(f"{rest} other prototype{'s' * (rest != 1)}", "")] if rest else []
    rows += [("lower levels", "")] if decision.below is not None else []
    rows.append(("bias", ""))
    largest = max(map(abs, values))
    lines = [
        f'<tr class="term"><th scope="row">{title}</th><td class="value">{signed(value, digits)}</td>'
        f"<td>{sign_bar(value, largest)}</td><td>{remarks}</td></tr>"
        for (title, remarks), value in zip(rows, printed, strict=True)
    ]
    total = signed(round(sum(printed), digits), digits)
    head = (
        f"Logit of <b>{escape(decision.predicted)}</b> less that of <b>{escape(decision.runner_up)}</b>, the runner-up"
    )
    foot = f'<tr class="total"><th scope="row">sum</th><td class="value">{total}</td><td></td><td></td></tr>'
    return f'<table class="sum"><caption>{head}</caption><tbody>{"".join(lines)}{foot}</tbody></table>'


def token_text(decision: Decision, text: str) -> str:
    """The text with its tokens tinted by their signed contribution, special tokens before it, and a legend."""
    terms = decision.terms.sum((1, 2))
    largest, digits = float(np.abs(terms).max()), digits_for(terms.tolist())
    runs = _runs(text, decision, terms)
    pieces, at = [], 0
    for (start, stop), value, what in runs:
        pieces.append(escape(spaced(text[at:start]) if at else text[:start].lstrip()))
        pieces.append(_tinted(text[start:stop], value, largest, f"{what}: {signed(value, digits)}"))
        at = stop
    rest = spaced(text[at : at + 200]) + (" …" if len(text) > at + 200 else "")
    if rest.strip():
        pieces.append(f'<span class="soft">{escape(rest)}</span>')
    beyond = "<span>grey: beyond what is shown of the tokens</span>" if rest.strip() and at else ""
    return (
        f'<div class="text">{"".join(pieces)}</div>{_special(decision, terms, largest)}'
        f"{_weights(decision, text)}{legend(decision, largest, digits)}"
        + (f'<div class="legend">{beyond}</div>' if beyond else "")
    )


def token_list(decision: Decision) -> str:
    """The biggest tokens of an input that is no text, in a line."""
    terms = decision.terms.sum((1, 2))
    digits, largest = digits_for(terms.tolist()), float(np.abs(terms).max())
    order = sorted(range(len(terms)), key=lambda at: (-abs(terms[at]), at))[: 2 * BIGGEST]
    shown = "".join(
        f"<span>{_tinted(decision.places[at].name, terms[at], largest)} {signed(terms[at], digits)}</span>"
        for at in order
    )
    rest = len(terms) - len(order)
    more = f"<span>{rest} more</span>" if rest else ""
    return f'<div class="legend">Biggest tokens: {shown}{more}</div>{_weights(decision, None)}'


def legend(decision: Decision, largest: float, digits: int) -> str:
    """Both hues, with what they say."""
    return (
        f'<div class="legend"><span>{_swatch(FOR)} for {escape(decision.predicted)}</span>'
        f"<span>{_swatch(AGAINST)} against it, for {escape(decision.runner_up)}</span>"
        f"<span>the fuller the larger; the largest token is {signed(largest, digits).lstrip('+')}</span></div>"
    )


def spaced(text: str) -> str:
    """The text with at most one blank line in a row."""
    return re.sub(r"\n[ \t\r]*(?:\n\s*)+(?=\n|\S|$)", "\n\n", text)


def _printed(decision: Decision) -> tuple[list[float], list[float], int]:
    """Terms of the table, as they are and as they are printed, and their decimal places.

    They are those of the prototypes that are named, of all others, of lower levels, and the bias.
    """
    by_prototype = decision.terms.sum(0)
    values = [float(by_prototype[pair]) for pair in _largest(by_prototype)[:NAMED]]
    if by_prototype.size > NAMED:
        values.append(float(by_prototype.sum()) - sum(values))
    values += [] if decision.below is None else [decision.below]
    values.append(decision.bias)
    digits = digits_for(values)
    return values, apportioned(values, digits), digits


def _tokens_total(decision: Decision) -> tuple[float, int]:
    """Sum of the prototypes as the table prints it, which is that of the tokens too, and its decimal places."""
    _, printed, digits = _printed(decision)
    prototypes = printed[: -1 if decision.below is None else -2]
    return round(sum(prototypes), digits), digits


def _largest(terms: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    pairs = [(h, k) for h in range(terms.shape[0]) for k in range(terms.shape[1])]
    return sorted(pairs, key=lambda pair: (-abs(terms[pair]), pair))


def _name(head: int, number: int, heads: int) -> str:
    prefix = f"{head}." if heads > 1 else ""
    of_head = f" of head {head}" if heads > 1 else ""
    return f'{chip(number, prefix)} <a href="#{anchor(prefix, number)}">prototype {number}</a>{of_head}'


def _remarks(decision: Decision, head: int, number: int, heads: Sequence[HeadView], text: str | None) -> str:
    """Characteristic words, the knock-out and the biggest tokens of a prototype in this input."""
    remarks = []
    words = heads[head].prototypes[number].words[:3] if head < len(heads) else []
    if words:
        remarks.append(f'<span class="soft">({escape(", ".join(word.word for word in words))})</span>')
    remarks.append(knock_out(decision, head, number))
    if decision.places:
        terms = decision.terms[:, head, number]
        digits = digits_for(terms.tolist())
        order = sorted(range(len(terms)), key=lambda at: (-abs(terms[at]), at))[:BIGGEST]
        big = [f"{_quoted(decision, at, text)} {signed(terms[at], digits)}" for at in order if terms[at]]
        remarks += [f'<span class="tokens">{", ".join(big)}</span>'] if big else []
    return " ".join(filter(None, remarks))


def knock_out(decision: Decision, head: int, number: int) -> str:
    """Probability of the predicted class with and without a prototype; nothing where the head cannot say."""
    if decision.without is None or np.isnan(decision.without[head, number]):
        return ""
    before, after = f"{decision.probability:.2f}", f"{decision.without[head, number]:.2f}"
    return f'<span class="without">without it {before} → {after}</span>'


def _quoted(decision: Decision, at: int, text: str | None) -> str:
    place = decision.places[at]
    start, end = place.span
    if text is None or end <= start or not text[start:end]:
        return escape(place.name)
    return f"“{escape(text[start:end])}”"


def _special(decision: Decision, terms: npt.NDArray[np.float64], largest: float) -> str:
    """Tokens that stand for no characters, with their terms, and the sums of both kinds."""
    special = [at for at, place in enumerate(decision.places) if place.span[1] <= place.span[0]]
    if not special:
        return ""
    rest = float(terms.sum() - sum(terms[at] for at in special))
    total, digits = _tokens_total(decision)
    printed = apportioned([*(float(terms[at]) for at in special), rest], digits, total)
    chips = "".join(
        f"<span>{_tinted(decision.places[at].name, terms[at], largest)} {signed(value, digits)}</span>"
        for at, value in zip(special, printed, strict=False)
    )
    return (
        f'<div class="legend special">Special tokens: {chips}<span>all other tokens {signed(printed[-1], digits)}; '
        f"all prototypes together {signed(total, digits)}</span></div>"
    )


def _weights(decision: Decision, text: str | None) -> str:
    """The tokens with the largest learned weights, in a line."""
    if decision.weights is None:
        return ""
    weights = decision.weights
    order = sorted(range(len(weights)), key=lambda at: (-weights[at], at))[: 2 * BIGGEST]
    shown = ", ".join(f"{_quoted(decision, at, text)} {percent(float(weights[at]))}" for at in order)
    return f'<div class="legend">Largest weights of tokens (they sum to 100 %): {shown}</div>'


def _swatch(number: int) -> str:
    return f'<span class="t swatch" style="--h:{number};--a:1.00"></span>'


def _tinted(text: str, value: float, largest: float, title: str | None = None) -> str:
    said = "" if title is None else f' title="{escape(title)}"'
    style = f"--h:{sign_hue(value)};--a:{level(value, largest):.2f}"
    return f'<span class="t" style="{style}"{said}>{escape(text)}</span>'


def _runs(text: str, decision: Decision, terms: npt.NDArray[np.float64]) -> list[tuple[tuple[int, int], float, str]]:
    """Characters of each token with its term, in order; those that overlap others would repeat characters."""
    real = sorted((place.span, at) for at, place in enumerate(decision.places) if place.span[1] > place.span[0])
    runs, end = [], 0
    for (start, stop), at in real:
        if start >= min(TEXT, len(text)):
            break
        if start >= end:
            runs.append(((start, stop), float(terms[at]), decision.places[at].name))
            end = stop
    return runs
