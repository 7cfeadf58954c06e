"""The card of a prototype: what it holds, and the samples and tokens nearest to it."""

import re
from collections.abc import Sequence
from html import escape

from ddcl_lightning.explain.explanation import Neighbour, PrototypeView
from ddcl_lightning.explain.html import anchor, caption, chip, hue, matches_base_rate, percent, picture, three_digits
from ddcl_lightning.explain.signed import digits_for, sign_bar, signed

CONTEXT = 90  # characters either side of a token
SNIPPET = 320  # characters of a nearest text
TOP_TERMS = 6  # classes that a prototype speaks for or against


def prototype_card(view: PrototypeView, prefix: str, token_level: bool) -> str:
    """Card of one prototype.

    Args:
        view: The prototype.
        prefix: ``"0."`` for head 0 of several, else empty.
        token_level: Whether samples have more than one token.
    """
    about = caption(view)
    head = f" <small>of head {prefix.removesuffix('.')}</small>" if prefix else ""
    purity = view.classes[0].share if view.classes else 0.0
    attributes = f'data-number="{view.number}" data-share="{view.share:.6f}" data-purity="{purity:.6f}"'
    header = (
        f'<article class="card{" dead" * view.dead}" id="{anchor(prefix, view.number)}" {attributes}'
        f"{' data-only' * (not view.dead)}><header>"
        f"{chip(view.number)}<h3>Prototype {view.number}{head}</h3>"
        + (f'<span class="says">{escape(about)}</span>' if about else "")
        + "</header>"
    )
    elements = [header, _share_line(view, token_level)]
    pictures = any(not isinstance(neighbour.sample.content, str) for neighbour in view.nearest)
    nearest = _examples(view)
    if pictures:
        elements.append(nearest)
    if view.words:
        words = "".join(f"<li>{escape(w.word)} <small>&times;{_times(w.lift)}</small></li>" for w in view.words)
        elements.append(f'<h4>Characteristic words</h4><ul class="words">{words}</ul>')
    if view.speaks:
        elements.append(_speaks(view))
    if view.classes:
        elements.append(_classes(view))
    if view.tokens:
        elements.append(f"<h4>{_title('Nearest tokens', view.tokens)}</h4>{neighbour_list(view.tokens)}")
    if not pictures:
        elements.append(nearest)
    return "".join(elements) + "</article>"


def _title(title: str, neighbours: Sequence[Neighbour]) -> str:
    """The title of a list of members, or of what is shown for want of any."""
    return title if all(neighbour.member for neighbour in neighbours) else f"{title}, though not members"


def _examples(view: PrototypeView) -> str:
    if view.strongest:
        title = _title("Nearest, by the mean of their tokens", view.nearest)
        folded = f"<details><summary>{title}</summary>{neighbour_list(view.nearest)}</details>"
        return f"<h4>{_title('Largest shares', view.strongest)}</h4>{neighbour_list(view.strongest, True)}{folded}"
    if not view.nearest:
        return ""
    title = _title("Nearest", view.nearest)
    return f"<h4>{title}</h4>{neighbour_list(view.nearest)}"


def _speaks(view: PrototypeView) -> str:
    """Signed table of the classes that a prototype speaks for and against, the largest terms, and its knock-out."""
    order = sorted(range(len(view.speaks)), key=lambda at: (-abs(view.speaks[at].term), at))[:TOP_TERMS]
    terms = sorted((view.speaks[at] for at in order), key=lambda term: -term.term)
    largest = max(abs(term.term) for term in terms)
    digits = digits_for([largest])
    rows = "".join(
        f'<span class="name">{escape(term.name)}</span>{sign_bar(term.term, largest)}'
        f'<span class="figure">{signed(term.term, digits)}</span>'
        for term in terms
    )
    rest = len(view.speaks) - len(terms)
    more = f'<p class="share">and {rest} classes with smaller terms</p>' if rest else ""
    fall = ""
    if view.knock_out is not None:
        way = "falls" if view.knock_out >= 0 else "rises"
        fall = (
            f'<p class="share">Without it the probability of the predicted class {way} by '
            f"{abs(view.knock_out):.3f} on average.</p>"
        )
    return f'<h4>Speaks for and against: mean contribution</h4><div class="classes speaks">{rows}</div>{more}{fall}'


def _share_line(view: PrototypeView, token_level: bool) -> str:
    if view.dead:
        what, weight = "token" if token_level else "sample", percent(view.weight)
        return f'<p class="share">Dead: nearest to no {what} of the data. Its mean share is {weight}.</p>'
    samples = f"<b>{percent(view.share)}</b> of the samples ({view.samples:,})"
    if token_level:
        where = samples if view.samples else "no sample"
        return (
            f'<p class="share">Nearest to <b>{percent(view.token_share)}</b> of the tokens, strongest in {where}; '
            f"mean share {percent(view.weight)}.</p>"
        )
    soft = f"; mean share {percent(view.weight)}" if abs(view.weight - view.share) >= 0.005 else ""
    return f'<p class="share">{samples}{soft}</p>'


def _times(lift: float) -> str:
    return f"{lift:.0f}" if lift >= 9.95 else f"{lift:.1f}"


def _classes(view: PrototypeView) -> str:
    if matches_base_rate(view.classes):
        return '<h4>Classes of what it holds</h4><p class="share">As in all data: none stands out.</p>'
    rows = []
    for share in view.classes:
        line = f'<span class="base" style="left:{100 * share.base:.2f}%"></span>'
        fill = f'<span class="fill hue" style="--h:{hue(view.number)};width:{100 * share.share:.2f}%"></span>'
        title = f"{percent(share.share)} here, {percent(share.base)} of all data"
        rows.append(
            f'<span class="name">{escape(share.name)}</span><span class="track" title="{title}">{fill}{line}</span>'
            f'<span class="figure">{percent(share.share)}</span>'
        )
    return f'<h4>Classes of what it holds</h4><div class="classes">{"".join(rows)}</div>'


def neighbour_list(neighbours: Sequence[Neighbour], by_share: bool = False) -> str:
    """Pictures or quotes of samples, with their distance or share."""
    if all(isinstance(neighbour.sample.content, str) for neighbour in neighbours):
        items = "".join(f"<li>{_quote(neighbour)}{_who(neighbour, by_share)}</li>" for neighbour in neighbours)
        return f'<ul class="quotes">{items}</ul>'
    items = "".join(f"<li>{picture(n.sample)}{_caption(n, by_share)}</li>" for n in neighbours)
    return f'<ul class="pictures">{items}</ul>'


def _caption(neighbour: Neighbour, by_share: bool) -> str:
    label = f"<b>{escape(neighbour.sample.label)}</b> " if neighbour.sample.label else ""
    text = neighbour.sample.content
    said = f"{escape(shortened(text, SNIPPET))} " if isinstance(text, str) else ""
    return f"{said}{label}#{neighbour.sample.index}<br>{_how(neighbour, by_share)}"


def _who(neighbour: Neighbour, by_share: bool) -> str:
    label = f"<b>{escape(neighbour.sample.label)}</b> · " if neighbour.sample.label else ""
    return f'<span class="who">{label}#{neighbour.sample.index} · {_how(neighbour, by_share)}</span>'


def _how(neighbour: Neighbour, by_share: bool) -> str:
    return percent(neighbour.share) if by_share else f"d {three_digits(neighbour.distance)}"


def _quote(neighbour: Neighbour) -> str:
    text = str(neighbour.sample.content)
    if neighbour.span is None:
        return escape(shortened(text, SNIPPET)) or '<span class="soft">(empty text)</span>'
    start, end = neighbour.span
    left, right = max(0, start - CONTEXT), min(len(text), end + CONTEXT)
    before, after = text[left:start], text[end:right]
    if left:  # no part of a word at the edges
        before = "… " + re.sub(r"^\S*\s+", "", before, count=1)
    if right < len(text):
        after = re.sub(r"\s+\S*$", "", after, count=1) + " …"
    before, after = _plain(before, trim_left=True), _plain(after, trim_right=True)
    return f"{escape(before)}<mark>{escape(text[start:end])}</mark>{escape(after)}"


def _plain(text: str, trim_left: bool = False, trim_right: bool = False) -> str:
    """Runs of white space as one space, kept at the inner edge."""
    words = " ".join(text.split())
    lead = " " if text[:1].isspace() and not trim_left and words else ""
    tail = " " if text[-1:].isspace() and not trim_right else ""
    return f"{lead}{words}{tail}"


def shortened(text: str, length: int) -> str:
    """The first words of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= length else words[:length].rsplit(" ", 1)[0] + " …"
