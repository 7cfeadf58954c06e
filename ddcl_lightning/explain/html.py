"""The smallest pieces of the page: numbers, colours, bars and pictures. Strings from the data pass ``html.escape``."""

from collections.abc import Sequence
from html import escape
from typing import Protocol

from ddcl_lightning.explain.explanation import ClassShare, Sample, WordShare
from ddcl_lightning.explain.png import data_uri

SMALL_IMAGE = 48  # pixels; smaller images are shown as pixels, not blurred
NAMED = 3  # prototypes that a sentence names
WORTH_NAMING = 0.1  # share from which a prototype other than the first is named
WHOLE = 0.995  # share that reads as 100 %
STANDS_OUT = 0.02  # difference of shares from which a class stands out
MOST = 0.55  # share from which a prototype is mostly something


def percent(share: float) -> str:
    """Share in percent: ``62 %``, ``<0.1 %``; two digits where one would round most of it away.

    The space does not break: a line that starts with "%" reads badly.
    """
    value = 100 * share
    if value == 0:
        return "0\u00a0%"
    if value < 0.1:
        return "<0.1\u00a0%"
    return f"{value:.0f}\u00a0%" if value >= 9.95 else f"{value:.1f}\u00a0%"


def three_digits(value: float) -> str:
    """Number with three digits, zeros too: beside 2.09, a bare 2.1 looks like another precision."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def hue(number: int) -> str:
    """CSS hue of a prototype: neighbours in number are far apart, and none comes twice."""
    return f"{(28 + number * 137.508) % 360:.0f}"


def anchor(prefix: str, number: int) -> str:
    """Id of a prototype's card; ``prefix`` is ``"0."`` for head 0 of several, else empty."""
    return f"p{prefix}{number}"


def chip(number: int, prefix: str | None = None) -> str:
    """The prototype's number on its colour; with a prefix, a link to its card."""
    tag, link = ("span", "") if prefix is None else ("a", f' href="#{anchor(prefix, number)}"')
    return f'<{tag} class="chip hue" style="--h:{hue(number)}"{link}>{number}</{tag}>'


def ranked(shares: Sequence[float]) -> tuple[list[int], str]:
    """Prototypes worth naming, largest first, and the others in words: ``10 % in 4 others``, or nothing."""
    order = sorted(range(len(shares)), key=lambda k: (-shares[k], k))
    named = [k for rank, k in enumerate(order) if rank == 0 or (rank < NAMED and shares[k] >= WORTH_NAMING)]
    others = [shares[k] for k in order[len(named) :]]
    rest = sum(others)
    # Very many may hold a visible part together, though none of them alone.
    count = sum(share >= 0.001 for share in others) or sum(share > 0 for share in others)
    return named, f"{percent(rest)} in {count} other{'s' * (count > 1)}" if rest >= 1 - WHOLE else ""


def sentence(shares: Sequence[float]) -> str:
    """Shares in words: ``62 % prototype 3, 28 % prototype 7, 10 % in 4 others``."""
    named, others = ranked(shares)
    return ", ".join([*(f"{percent(shares[k])} prototype {k}" for k in named), *([others] if others else [])])


def bar(shares: Sequence[float], prefix: str, css: str = "bar") -> str:
    """A stacked bar, one segment per prototype that can be seen; each is a link to the prototype's card."""
    segments = [
        f'<a href="#{anchor(prefix, number)}" class="hue" style="--h:{hue(number)};flex:{share:.4f} 1 0" '
        f'title="prototype {number}: {percent(share)}"><span>{number}</span></a>'
        for number, share in enumerate(shares)
        if share >= 0.002
    ]
    return f'<div class="{css}" role="group" aria-label="{escape(sentence(shares))}">{"".join(segments)}</div>'


def picture(sample: Sample) -> str:
    """The sample's picture, or nothing."""
    if sample.content is None or isinstance(sample.content, str):
        return ""
    height, width = sample.content.shape[:2]
    pixels = ' class="pixels"' if max(height, width) <= SMALL_IMAGE else ""
    text = f"sample {sample.index}" + (f", {sample.label}" if sample.label else "")
    return f'<img{pixels} src="{data_uri(sample.content)}" width="{width}" height="{height}" alt="{escape(text)}">'


class Described(Protocol):
    """A prototype or a branch of IDs, by the samples in it."""

    @property
    def dead(self) -> bool:
        """True if there are none."""

    @property
    def words(self) -> list[WordShare]:
        """Characteristic words."""

    @property
    def classes(self) -> list[ClassShare]:
        """Class composition, largest first."""


def caption(view: Described) -> str:
    """Description of a prototype in a few words; empty where nothing is known."""
    if view.dead:
        return "dead"
    classes = [] if matches_base_rate(view.classes) else view.classes
    if classes and classes[0].share >= MOST:
        return f"mostly {_class_name(classes[0])}"
    if view.words:
        return ", ".join(word.word for word in view.words[:3])
    if sum(share.share for share in classes[:2]) >= MOST:
        return " and ".join(map(_class_name, classes[:2]))
    return ""


def matches_base_rate(classes: Sequence[ClassShare]) -> bool:
    """True if the largest classes are as large as in all data, so that naming them would say nothing."""
    return all(abs(share.share - share.base) < STANDS_OUT for share in classes)


def _class_name(share: ClassShare) -> str:
    # A bare number would read as another prototype.
    return f"class {share.name}" if share.name.isdigit() else share.name
