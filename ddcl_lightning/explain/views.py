"""The pieces of the page: prototypes, inputs, bars and quotes. Every string from the data passes ``html.escape``."""

import re
from collections.abc import Sequence
from html import escape

from ddcl_lightning.explain.explanation import (
    HeadView,
    InputView,
    Neighbour,
    PrototypeView,
    Sample,
    Span,
    TokenView,
)
from ddcl_lightning.explain.png import data_uri

CONTEXT = 90  # characters either side of a token
SNIPPET = 320  # characters of a nearest text
TEXT = 2500  # characters of an input
SMALL_IMAGE = 48  # pixels; smaller images are shown as pixels, not blurred


def percent(share: float) -> str:
    """A share as a person writes it: ``62 %``, ``<1 %``; two figures where one would lose most of it."""
    value = 100 * share
    if value == 0:
        return "0 %"
    if value < 0.1:
        return "<0.1 %"
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %"


def hue(number: int) -> str:
    """CSS hue of a prototype: neighbours in number are far apart, and none comes twice."""
    return f"{(28 + number * 137.508) % 360:.0f}"


def name_of(prefix: str, number: int) -> str:
    """Name of a prototype: its number, after that of its head where there are several."""
    return f"{prefix}{number}"


def chip(prefix: str, number: int) -> str:
    """The prototype's name on its colour."""
    return f'<span class="chip hue" style="--h:{hue(number)}">{name_of(prefix, number)}</span>'


def sentence(shares: Sequence[float], prefix: str = "") -> str:
    """Shares in words: ``62 % prototype 3, 28 % prototype 7, 10 % in 4 others``."""
    order = sorted(range(len(shares)), key=lambda k: (-shares[k], k))
    named = [k for rank, k in enumerate(order) if rank == 0 or (rank < 4 and shares[k] >= 0.05)]
    words = [f"{percent(shares[k])} prototype {name_of(prefix, k)}" for k in named]
    rest = sum(shares[k] for k in order[len(named) :])
    others = sum(shares[k] >= 0.001 for k in order[len(named) :])
    if rest >= 0.005 and others:
        words.append(f"{percent(rest)} in {others} other{'s' * (others > 1)}")
    return ", ".join(words)


def bar(shares: Sequence[float], prefix: str, links: Sequence[str] | None = None, css: str = "bar") -> str:
    """A stacked bar, one segment per prototype that can be seen."""
    parts = []
    for number, share in enumerate(shares):
        if share < 0.002:
            continue
        name = name_of(prefix, number)
        attributes = (
            f'class="hue" style="--h:{hue(number)};flex:{share:.4f} 1 0" title="prototype {name}: {percent(share)}"'
        )
        label = name if share >= 0.012 * (1 + len(name)) else ""
        parts.append(
            f'<a href="{links[number]}" {attributes}>{label}</a>' if links else f"<span {attributes}>{label}</span>"
        )
    return f'<div class="{css}" role="img" aria-label="{escape(sentence(shares, prefix))}">{"".join(parts)}</div>'


def prototype_card(view: PrototypeView, prefix: str, token_level: bool) -> str:
    """One prototype."""
    name = name_of(prefix, view.number)
    says = _says(view)
    purity = view.classes[0].share if view.classes else 0.0
    attributes = f'data-number="{view.number}" data-share="{view.share:.6f}" data-purity="{purity:.6f}"'
    opening = (
        f'<article class="card{" dead" * view.dead}" id="p{name}" {attributes}{" data-only" * (not view.dead)}><header>'
        f"{chip(prefix, view.number)}<h3>Prototype {name}</h3>"
        + (f'<span class="says">{escape(says)}</span>' if says else "")
        + "</header>"
    )
    parts = [opening, _share_line(view, token_level)]
    pictures = any(not isinstance(neighbour.sample.content, str) for neighbour in view.nearest)
    nearest = _examples(view)
    if pictures:
        parts.append(nearest)
    if view.words:
        words = "".join(f"<li>{escape(w.word)} <small>&times;{w.lift:.2g}</small></li>" for w in view.words)
        parts.append(f'<h4>Characteristic words</h4><ul class="words">{words}</ul>')
    if view.classes:
        parts.append(_classes(view))
    if view.tokens:
        parts.append(f"<h4>Nearest tokens</h4>{_neighbours(view.tokens)}")
    if not pictures:
        parts.append(nearest)
    return "".join(parts) + "</article>"


def _examples(view: PrototypeView) -> str:
    if view.strongest:
        folded = f"<details><summary>Nearest by the mean of their tokens</summary>{_neighbours(view.nearest)}</details>"
        return f"<h4>Most of it</h4>{_neighbours(view.strongest, by_share=True)}{folded}"
    title = "Nearest, though not near" if view.dead else "Nearest examples"
    return f"<h4>{title}</h4>{_neighbours(view.nearest)}" if view.nearest else ""


def _says(view: PrototypeView) -> str:
    if view.dead:
        return "dead"
    if view.classes and view.classes[0].share >= 0.55:
        return f"mostly {view.classes[0].name}"
    if view.words:
        return ", ".join(word.word for word in view.words[:3])
    return " and ".join(share.name for share in view.classes[:2])


def _share_line(view: PrototypeView, token_level: bool) -> str:
    if view.dead:
        what, weight = "token" if token_level else "sample", percent(view.weight)
        return f'<p class="share">Dead: nearest to no {what} of the data. Its mean weight is {weight}.</p>'
    samples = f"<b>{percent(view.share)}</b> of the samples ({view.samples:,})"
    if token_level:
        where = samples if view.samples else "no sample"
        return (
            f'<p class="share">Nearest to <b>{percent(view.token_share)}</b> of the tokens, strongest in {where}; '
            f"mean weight {percent(view.weight)}.</p>"
        )
    soft = f", {percent(view.weight)} of the weight" if abs(view.weight - view.share) >= 0.005 else ""
    return f'<p class="share">{samples}{soft}</p>'


def _classes(view: PrototypeView) -> str:
    rows = []
    for share in view.classes:
        line = f'<span class="base" style="left:{100 * share.base:.2f}%"></span>'
        fill = f'<span class="fill hue" style="--h:{hue(view.number)};width:{100 * share.share:.2f}%"></span>'
        title = f"{percent(share.share)} here, {percent(share.base)} of all data"
        rows.append(
            f'<span class="name">{escape(share.name)}</span><span class="track" title="{title}">{fill}{line}</span>'
            f'<span class="figure">{percent(share.share)}</span>'
        )
    return f'<h4>Classes</h4><div class="classes">{"".join(rows)}</div>'


def _neighbours(neighbours: Sequence[Neighbour], by_share: bool = False) -> str:
    if all(isinstance(neighbour.sample.content, str) for neighbour in neighbours):
        items = "".join(f"<li>{_quote(neighbour)}{_who(neighbour, by_share)}</li>" for neighbour in neighbours)
        return f'<ul class="quotes">{items}</ul>'
    items = "".join(f"<li>{image(n.sample)}{_caption(n, by_share)}</li>" for n in neighbours)
    return f'<ul class="pictures">{items}</ul>'


def image(sample: Sample) -> str:
    """The sample's picture, or nothing."""
    if sample.content is None or isinstance(sample.content, str):
        return ""
    height, width = sample.content.shape[:2]
    pixels = ' class="pixels"' if max(height, width) <= SMALL_IMAGE else ""
    text = f"sample {sample.index}" + (f", {sample.label}" if sample.label else "")
    return f'<img{pixels} src="{data_uri(sample.content)}" width="{width}" height="{height}" alt="{escape(text)}">'


def _caption(neighbour: Neighbour, by_share: bool) -> str:
    label = f"<b>{escape(neighbour.sample.label)}</b> " if neighbour.sample.label else ""
    text = neighbour.sample.content
    said = f"{escape(_shortened(text, SNIPPET))} " if isinstance(text, str) else ""
    return f"{said}{label}#{neighbour.sample.index}<br>{_how(neighbour, by_share)}"


def _who(neighbour: Neighbour, by_share: bool) -> str:
    label = f"<b>{escape(neighbour.sample.label)}</b> · " if neighbour.sample.label else ""
    return f'<span class="who">{label}#{neighbour.sample.index} · {_how(neighbour, by_share)}</span>'


def _how(neighbour: Neighbour, by_share: bool) -> str:
    return percent(neighbour.share) if by_share else f"d {neighbour.distance:.3g}"


def _quote(neighbour: Neighbour) -> str:
    text = str(neighbour.sample.content)
    if neighbour.span is None:
        return escape(_shortened(text, SNIPPET)) or '<span class="soft">(empty text)</span>'
    start, end = neighbour.span
    left, right = max(0, start - CONTEXT), min(len(text), end + CONTEXT)
    before = ("… " if left else "") + _plain(text[left:start], trim_left=True)
    after = _plain(text[end:right], trim_right=True) + (" …" if right < len(text) else "")
    return f"{escape(before)}<mark>{escape(text[start:end])}</mark>{escape(after)}"


def _plain(text: str, trim_left: bool = False, trim_right: bool = False) -> str:
    """Runs of white space as one space, kept at the inner edge."""
    words = " ".join(text.split())
    lead = " " if text[:1].isspace() and not trim_left and words else ""
    tail = " " if text[-1:].isspace() and not trim_right else ""
    return f"{lead}{words}{tail}"


def _spaced(text: str) -> str:
    """The text with at most one blank line in a row."""
    return re.sub(r"\n[ \t\r]*(?:\n\s*)+(?=\n|\S|$)", "\n\n", text)


def _shortened(text: str, length: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else words[:length].rsplit(" ", 1)[0] + " …"


def input_card(view: InputView, heads: Sequence[HeadView]) -> str:
    """One input: what it is made of, what is predicted, and the sample itself."""
    sample = view.sample
    parts = [f"<h3>Input #{sample.index}</h3>", _verdict(view)]
    text = sample.content if isinstance(sample.content, str) else None
    for number, head in enumerate(heads):
        prefix = f"{number}." if len(heads) > 1 else ""
        shares = [float(share) for share in view.shares[number]]
        strongest = head.prototypes[max(range(len(shares)), key=shares.__getitem__)]
        says = _says(strongest)
        whose = f"{name_of(prefix, strongest.number)}: " if max(shares) < 0.995 else ""
        about = f' <span class="soft">({escape(whose + says)})</span>' if says else ""
        parts.append(f'<p class="words-of">{sentence(shares, prefix)}{about}</p>{bar(shares, prefix)}')
        if text is not None and view.tokens:
            parts.append(_tinted(text, view.tokens[number], prefix))
    if text is not None and not view.tokens:
        cut = _spaced(text[:TEXT].strip()) + (" …" if len(text) > TEXT else "")
        parts.append(f'<div class="text">{escape(cut)}</div>')
    return (
        f'<article class="card input"{" data-only" * view.wrong}>{image(sample)}<div>{"".join(parts)}</div></article>'
    )


def _verdict(view: InputView) -> str:
    truth, predicted = view.sample.label, view.predicted
    if predicted is None:
        return f'<p class="verdict">Class <b>{escape(truth)}</b></p>' if truth else ""
    said = f"Predicted <b>{escape(predicted)}</b>"
    if truth is None:
        return f'<p class="verdict">{said}</p>'
    mark = '<span class="good">✓ right</span>' if truth == predicted else '<span class="bad">✗ wrong</span>'
    return f'<p class="verdict">{said}, true class <b>{escape(truth)}</b> {mark}</p>'


def _tinted(text: str, tokens: Sequence[TokenView], prefix: str) -> str:
    """The text with its tokens on the colour of their prototype; neighbours that look the same become one run."""
    runs = _runs(text, tokens)
    parts, at = [], 0
    end = max((span[1] for span, _, _ in runs), default=0)
    for (start, stop), number, level in runs:
        parts.append(escape(_spaced(text[at:start]) if at else text[:start].lstrip()))
        name = name_of(prefix, number)
        style = f"--h:{hue(number)};--a:{level / 4:.2f}"
        parts.append(f'<span class="t" style="{style}" title="prototype {name}">{escape(text[start:stop])}</span>')
        at = stop
    rest = _spaced(text[end : end + 200]) + (" …" if len(text) > end + 200 else "")
    if rest.strip():
        parts.append(f'<span class="soft">{escape(rest)}</span>')
    counts: dict[int, int] = {}
    for token in tokens:
        counts[token.prototype] = counts.get(token.prototype, 0) + 1
    order = sorted(counts, key=lambda number: (-counts[number], number))[:12]
    legend = "".join(f"<span>{chip(prefix, k)} {counts[k]} token{'s' * (counts[k] != 1)}</span>" for k in order)
    if rest.strip():
        legend += "<span>grey: beyond what is shown of the tokens</span>"
    return f'<div class="text">{"".join(parts)}</div><div class="legend">{legend}</div>'


def _runs(text: str, tokens: Sequence[TokenView]) -> list[tuple[Span, int, int]]:
    runs: list[tuple[Span, int, int]] = []
    for token in sorted(tokens, key=lambda token: token.span):
        level = 1 + min(3, int(4 * token.weight))
        (start, stop), number = token.span, token.prototype
        if start >= TEXT:
            break
        if runs:
            (first, last), before, before_level = runs[-1]
            if start < last:
                continue  # overlapping spans would repeat characters
            if (before, before_level) == (number, level) and not text[last:start].strip(" "):
                runs[-1] = ((first, stop), number, level)
                continue
        runs.append(((start, stop), number, level))
    return runs
