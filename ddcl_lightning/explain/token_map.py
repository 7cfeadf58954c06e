"""Contributions of the tokens of an image, laid over it."""

from html import escape

import numpy as np

from ddcl_lightning.explain.decision_cards import legend
from ddcl_lightning.explain.explanation import Decision, Sample
from ddcl_lightning.explain.html import SMALL_IMAGE
from ddcl_lightning.explain.png import data_uri
from ddcl_lightning.explain.signed import digits_for, level, sign_hue, signed


def token_map(decision: Decision, sample: Sample) -> str:
    """The picture with a cell per token, tinted by what it adds; nothing without a grid or a picture."""
    if decision.grid is None or sample.content is None or isinstance(sample.content, str):
        return ""
    prefix, rows, columns = decision.grid
    terms = decision.terms.sum((1, 2))
    largest, digits = float(np.abs(terms).max()), digits_for(terms.tolist())
    cells = []
    for at, value in enumerate(terms[prefix:].tolist()):
        row, column = divmod(at, columns)
        opacity = 0.75 * level(value, largest)
        title = f"<title>row {row}, column {column}: {signed(value, digits)}</title>"
        cells.append(
            f'<rect class="cell" x="{column}" y="{row}" width="1" height="1" '
            f'style="--h:{sign_hue(value)};fill-opacity:{opacity:.2f}">{title}</rect>'
        )
    css = ' class="pixels"' if max(sample.content.shape[:2]) <= SMALL_IMAGE else ""
    picture = (
        f'<image{css} href="{data_uri(sample.content)}" width="{columns}" height="{rows}" '
        'preserveAspectRatio="none"></image>'
    )
    label = f"contributions of {rows} x {columns} tokens to {decision.predicted}"
    svg = (
        f'<svg class="map" viewBox="0 0 {columns} {rows}" role="img" aria-label="{escape(label)}">'
        f"{picture}{''.join(cells)}</svg>"
    )
    before = "".join(
        f"<span>{escape(decision.places[at].name)} {signed(terms[at], digits)}</span>" for at in range(prefix)
    )
    extra = f'<div class="legend special">Not in the picture: {before}</div>' if before else ""
    return f"{svg}{extra}{legend(decision, largest, digits)}"
