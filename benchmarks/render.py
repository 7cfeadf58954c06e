"""Write the tables of ``results/*.json``, and cells of them in the text, between their markers in the documentation.

A marker is a line ``<!-- table: STUDY/TABLE -->`` and ends with ``<!-- end -->``. Inside of a sentence ``<!-- cell:
STUDY/TABLE | ROW | COLUMN -->TEXT<!-- /cell -->``, all of it in one line, is the cell of the row that begins with ROW.
Needs neither torch nor the package.

    python benchmarks/render.py            # write
    python benchmarks/render.py --check    # fail where the text is not what this would write

A study that is changed makes its tables anew with ``python benchmarks/STUDY.py --tables``.
"""

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^<!-- table: (\S+) -->\n(?:.*?\n)??<!-- end -->$", re.MULTILINE | re.DOTALL)
CELL = re.compile(r"<!-- cell: ([^|\n]+?) \| ([^|\n]+?) \| ([^|\n]+?) -->[^<\n]*<!-- /cell -->")


def markdown(table: list[list[str]]) -> str:
    """A table as Markdown; the first row is the header."""
    header, *rows = (f"| {' | '.join(row)} |\n" for row in table)
    return "".join([header, "|" + "---|" * len(table[0]) + "\n", *rows])


def load_tables(folder: Path) -> dict[str, list[list[str]]]:
    """Every table of every study, by ``STUDY/TABLE``."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {
        f"{study}/{name}": table
        for study, content in contents.items()
        for name, table in content.get("tables", {}).items()
    }


def cells(tables: dict[str, list[list[str]]]) -> dict[tuple[str, str, str], str]:
    """Every cell, by its table, the first cell of its row and the title of its column."""
    return {
        (name, row[0], title): cell
        for name, (header, *rows) in tables.items()
        for row in rows
        for title, cell in zip(header, row, strict=True)
    }


def render(text: str, tables: dict[str, list[list[str]]]) -> str:
    """The text with every table and every cell between its markers.

    Raises:
        KeyError: If a marker names a table or a cell that no results have.
    """
    known = cells(tables)
    text = MARKER.sub(lambda mark: f"<!-- table: {mark[1]} -->\n\n{markdown(tables[mark[1]])}\n<!-- end -->", text)
    return CELL.sub(
        lambda mark: f"<!-- cell: {' | '.join(mark.groups())} -->{known[mark.groups()]}<!-- /cell -->",  # type: ignore[index]
        text,
    )


def problems(pages: dict[Path, str], tables: dict[str, list[list[str]]]) -> list[str]:
    """Problems of the pages: bad markers, unknown tables and cells, tables shown nowhere."""
    named = {page: MARKER.findall(text) for page, text in pages.items()}
    shown = [name for names in named.values() for name in names]
    messages = [
        f"{page.name}: every '<!-- table: STUDY/TABLE -->' must be a line of its own and have its '<!-- end -->'"
        for page, text in pages.items()
        if not text.count("<!-- table:") == text.count("<!-- end -->") == len(named[page])
    ]
    messages += [
        f"{page.name}: every '<!-- cell: STUDY/TABLE | ROW | COLUMN -->' must be inside of a line with '<!-- /cell -->'"
        for page, text in pages.items()
        if not text.count("<!-- cell:") == text.count("<!-- /cell -->") == len(CELL.findall(text))
        or re.search("^<!-- cell:", text, re.MULTILINE)  # which would end the paragraph
    ]
    known = cells(tables)
    messages += [
        f"{page.name}: no results have the cell {' | '.join(cell)}"
        for page, text in pages.items()
        for cell in CELL.findall(text)
        if cell not in known
    ]
    messages += [f"no results have the table {name}" for name in shown if name not in tables]
    messages += [f"the table {name} is on no page" for name in tables if name not in shown]
    return messages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something would change")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    tables = load_tables(options.results)
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(options.docs.rglob("*.md"))}
    if wrong := problems(pages, tables):
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    code = 0
    for path, text in pages.items():
        rendered = render(text, tables)
        if rendered == text:
            continue
        if options.check:
            lines = difflib.unified_diff(
                text.splitlines(), rendered.splitlines(), str(path), "as rendered", lineterm=""
            )
            print(*lines, sep="\n", file=sys.stderr)
            code = 1
        else:
            path.write_text(rendered, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
