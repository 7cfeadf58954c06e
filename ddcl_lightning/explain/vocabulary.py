"""All prototypes at a glance: a plane of them, and one line each."""

from collections.abc import Sequence
from html import escape

import numpy as np

from ddcl_lightning.explain.explanation import ClassTerm, HeadView, Neighbour, PrototypeView
from ddcl_lightning.explain.html import anchor, chip, hue, matches_base_rate, percent, picture
from ddcl_lightning.explain.signed import signed

WIDTH, HEIGHT, MARGIN = 460, 340, 26  # of the plane, in its own units
LARGEST, SMALLEST = 24.0, 4.0  # radii
MEMBERS = 2  # members in a line
QUOTE = 28  # characters of a member
STANDS_OUT = 0.25  # of the largest term, from which a class is named


def vocabulary(head: HeadView, prefix: str, token_level: bool) -> str:
    """Plane and lines of the prototypes of a head; the area of a circle is the prototype's size.

    Args:
        head: The bank.
        prefix: ``"0."`` for head 0 of several, else empty.
        token_level: Whether samples have more than one token.
    """
    what = "tokens" if token_level else "samples"
    lines = "".join(_line(view, prefix, token_level) for view in head.prototypes)
    says = "speaks for" if any(view.speaks for view in head.prototypes) else "classes"
    table = (
        f'<table class="vocabulary"><thead><tr><th></th><th>{what}</th><th>members</th><th>words</th><th>{says}</th>'
        f"</tr></thead><tbody>{lines}</tbody></table>"
    )
    return f'<div class="glance">{_plane(head, prefix, what)}{table}</div>'


def _plane(head: HeadView, prefix: str, what: str) -> str:
    if head.positions is None:
        return ""
    points = head.positions - head.positions.min(0)
    spread = points.max(0)
    # One scale for both axes, or distances would not be comparable.
    scale = min(
        (side - 2 * MARGIN) / extent if extent > 0 else np.inf
        for side, extent in zip((WIDTH, HEIGHT), spread.tolist(), strict=True)
    )
    scale = scale if np.isfinite(scale) else 1.0
    x = (WIDTH - scale * spread[0]) / 2 + scale * points[:, 0]
    y = HEIGHT - (HEIGHT - scale * spread[1]) / 2 - scale * points[:, 1]
    largest = max((view.token_share for view in head.prototypes), default=0.0)
    order = sorted(head.prototypes, key=lambda view: (-view.token_share, view.number))  # small ones stay in sight
    circles = "".join(_circle(view, prefix, float(x[view.number]), float(y[view.number]), largest) for view in order)
    label = f"{len(head.prototypes)} prototypes on two principal components"
    return (
        f'<figure><svg class="plane" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{circles}</svg>'
        f"<figcaption>Two principal components of the prototypes, {percent(head.explained)} of their variance; the "
        f"area of a circle is its share of the {what}.</figcaption></figure>"
    )


def _circle(view: PrototypeView, prefix: str, x: float, y: float, largest: float) -> str:
    radius = max(SMALLEST, LARGEST * (view.token_share / largest) ** 0.5) if largest > 0 else SMALLEST
    css = "dot hollow" if view.dead else "dot"
    title = f"prototype {view.number}: {percent(view.token_share)}"
    # A number that does not fit into its circle stands beside it.
    place = f'x="{x:.1f}"' if radius >= 9 else f'x="{x + radius + 7:.1f}"'
    return (
        f'<a href="#{anchor(prefix, view.number)}"><title>{title}</title>'
        f'<circle class="{css}" style="--h:{hue(view.number)}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"></circle>'
        f'<text {place} y="{y:.1f}">{view.number}</text></a>'
    )


def _line(view: PrototypeView, prefix: str, token_level: bool) -> str:
    size = percent(view.token_share) if token_level else percent(view.share)
    words = escape(", ".join(word.word for word in view.words[:4]))
    return (
        f"<tr{' class=dead' * view.dead}><td>{chip(view.number, prefix)}</td>"
        f'<td class="value">{"dead" if view.dead else size}</td><td>{_members(view)}</td><td>{words}</td>'
        f"<td>{_classes(view)}</td></tr>"
    )


def _members(view: PrototypeView) -> str:
    nearest = [neighbour for neighbour in view.tokens or view.strongest or view.nearest if neighbour.member][:MEMBERS]
    if not nearest:
        return '<span class="soft">no members</span>'
    return " ".join(_member(neighbour) for neighbour in nearest)


def _member(neighbour: Neighbour) -> str:
    content = neighbour.sample.content
    if not isinstance(content, str):
        return picture(neighbour.sample) or f"#{neighbour.sample.index}"
    if neighbour.span is not None:
        return f"<mark>{escape(content[neighbour.span[0] : neighbour.span[1]])}</mark>"
    words = " ".join(content.split())
    return f"“{escape(words if len(words) <= QUOTE else words[:QUOTE].rsplit(' ', 1)[0] + ' …')}”"


def _classes(view: PrototypeView) -> str:
    if view.speaks:
        terms = spoken_for(view.speaks)
        return escape(", ".join(f"{term.name} {signed(term.term)}" for term in terms)) or "-"
    if not view.classes or matches_base_rate(view.classes):
        return "-"
    return escape(f"{view.classes[0].name} ") + percent(view.classes[0].share)


def spoken_for(terms: Sequence[ClassTerm]) -> list[ClassTerm]:
    """At most two classes with the largest positive terms that stand out among a prototype's terms."""
    largest = max(abs(term.term) for term in terms)
    order = sorted(terms, key=lambda term: -term.term)
    return [term for term in order[:2] if term.term > 0 and term.term >= STANDS_OUT * largest]
