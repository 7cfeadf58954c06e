"""The shell of every report: one HTML document, and the sections that reports share."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

# Controls, and the characters that turn the direction of what follows them: shown as their escapes.
_UNSEEN = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}

Fact = tuple[str, str, str]  # title, value, what it means


def document(title: str, body: Sequence[str]) -> str:
    """A complete HTML document that fetches nothing, with the style and the script of all reports."""
    style, script = _asset("report.css"), _asset("report.js")
    # The hash lets the page's own script run and nothing else; no source but data: URIs may be fetched.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{script}</script>\n</body>\n</html>\n"
    )
    return text.translate(_UNSEEN)


def guide_section(guide: Mapping[str, str]) -> str:
    """The terms of a report with their meaning, at its end."""
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in guide.items())
    return f'<footer id="guide"><h3>How to read this</h3><dl>{terms}</dl></footer>'


def fact_list(facts: Sequence[Fact]) -> str:
    """Values in a row of cells."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(text)}</small></dd></div>"
        for name, value, text in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def health_lines(health: Sequence[str]) -> str:
    """Verdicts of training, one line for each codebook."""
    lines = "".join(f'<p class="soft">Health in training of {escape(line)}</p>' for line in health)
    return lines or '<p class="soft">Health in training: not watched (CollapseWarning was not there).</p>'


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
