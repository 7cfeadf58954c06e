"""The card of an input: what is predicted and by which terms, what it is made of, and the sample itself."""

from collections.abc import Sequence
from html import escape

from ddcl_lightning.explain.decision_cards import TEXT, knock_out, spaced, sum_table, token_list, token_text
from ddcl_lightning.explain.explanation import HeadView, InputView, Span, TokenView
from ddcl_lightning.explain.html import WHOLE, anchor, bar, caption, chip, hue, percent, picture, ranked
from ddcl_lightning.explain.token_map import token_map


def input_card(view: InputView, heads: Sequence[HeadView], shares: bool = True) -> str:
    """Card of one input: its prediction and the terms of it, its prototypes, and the sample itself.

    Args:
        view: The input.
        heads: Of the page.
        shares: Whether shares belong beside it.
    """
    sample = view.sample
    text = sample.content if isinstance(sample.content, str) else None
    elements = [f"<h3>Input #{sample.index}</h3>", _verdict(view)]
    if view.decision is not None:
        elements.append(sum_table(view.decision, heads, text))
    if shares:
        elements.append(_shares(view, heads, text if view.decision is None else None))
    if view.decision is not None and view.decision.places:
        if text is not None and any(place.span[1] > place.span[0] for place in view.decision.places):
            elements.append(token_text(view.decision, text))
        else:
            elements.append(_text(text) + (token_map(view.decision, sample) or token_list(view.decision)))
    elif text is not None and not (view.tokens and shares and view.decision is None):
        elements.append(_text(text))
    css = f'class="card input"{" data-only" * view.wrong}'
    return f"<article {css}>{picture(sample)}<div>{''.join(elements)}</div></article>"


def _text(text: str | None) -> str:
    if text is None:
        return ""
    return f'<div class="text">{escape(spaced(text[:TEXT].strip()) + (" …" if len(text) > TEXT else ""))}</div>'


def _shares(view: InputView, heads: Sequence[HeadView], text: str | None) -> str:
    """Shares by head in words and as a bar, with the tokens of a text on the colours of their prototypes."""
    elements = []
    for number, head in enumerate(heads):
        prefix = f"{number}." if len(heads) > 1 else ""
        shares = [float(share) for share in view.shares[number]]
        title = f"<b>Head {number}:</b> " if prefix else ""
        lead = "Shares, which the prediction reads: " if view.decision is not None and not number else ""
        elements.append(
            f'<p class="words-of">{lead}{title}{_made_of(view, number, head, prefix)}</p>{bar(shares, prefix)}'
        )
        if text is not None and view.tokens:
            elements.append(_tinted(text, view.tokens[number], prefix))
    if text is not None and view.tokens and view.special:
        count = f"{view.special} special token{'s' * (view.special != 1)}"
        length = view.special + len(view.tokens[0])
        elements.append(
            f'<div class="legend special">{count} of the tokenizer, which stand for no characters, are '
            f"{percent(view.special / length)} of the {length} tokens.</div>"
        )
    return "".join(elements)


def all_or_nothing(views: Sequence[InputView]) -> bool:
    """True if every input belongs to one prototype alone, up to rounding in percent."""
    return all(float(shares.max()) >= WHOLE for view in views for shares in view.shares)


def _made_of(view: InputView, number: int, head: HeadView, prefix: str) -> str:
    """Shares in words, with what each prototype stands for, a link to it, and what is left without it."""
    shares = view.shares[number].tolist()
    named, others = ranked(shares)
    made = ""
    for k in named:
        about = caption(head.prototypes[k])
        meaning = f' <span class="soft">({escape(about)})</span>' if about else ""
        without = knock_out(view.decision, number, k) if view.decision is not None else ""
        made += f'{percent(shares[k])} <a href="#{anchor(prefix, k)}">prototype {k}</a>{meaning}'
        made += f" {without} " if without else ", "  # a chip needs no comma behind it
    return f"{made}{others}" if others else made.rstrip(", ")


def _verdict(view: InputView) -> str:
    truth, predicted = view.sample.label, view.predicted
    if predicted is None:
        return f'<p class="verdict">Class <b>{escape(truth)}</b></p>' if truth else ""
    said = f"Predicted <b>{escape(predicted)}</b>"
    if view.decision is not None:
        said += f" with probability {view.decision.probability:.2f}"
    if truth is None:
        return f'<p class="verdict">{said}</p>'
    mark = '<span class="good">✓ right</span>' if truth == predicted else '<span class="bad">✗ wrong</span>'
    return f'<p class="verdict">{said}, true class <b>{escape(truth)}</b> {mark}</p>'


def _tinted(text: str, tokens: Sequence[TokenView], prefix: str) -> str:
    """The text with its tokens on the colour of their prototype; neighbours that look the same become one run."""
    runs = _runs(text, tokens)
    pieces, at = [], 0
    end = max((span[1] for span, _, _ in runs), default=0)
    for (start, stop), number, level in runs:
        pieces.append(escape(spaced(text[at:start]) if at else text[:start].lstrip()))
        style = f"--h:{hue(number)};--a:{level / 4:.2f}"
        pieces.append(f'<span class="t" style="{style}" title="prototype {number}">{escape(text[start:stop])}</span>')
        at = stop
    rest = spaced(text[end : end + 200]) + (" …" if len(text) > end + 200 else "")
    if rest.strip():
        pieces.append(f'<span class="soft">{escape(rest)}</span>')
    counts: dict[int, int] = {}
    for token in tokens:
        counts[token.prototype] = counts.get(token.prototype, 0) + 1
    order = sorted(counts, key=lambda number: (-counts[number], number))[:12]
    legend = "".join(f"<span>{chip(k, prefix)} {counts[k]} token{'s' * (counts[k] != 1)}</span>" for k in order)
    if rest.strip():
        legend += "<span>grey: beyond what is shown of the tokens</span>"
    return f'<div class="text">{"".join(pieces)}</div><div class="legend">{legend}</div>'


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
