"""Columns of a table in CSV, TSV, JSON lines or parquet, and the labels in one of them."""

import csv
import difflib
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ddcl_lightning._utils.arguments import LARGEST
from ddcl_lightning.datamodules._optional import require

FORMATS = ".csv, .tsv, .jsonl (each also with .gz) or .parquet"
UNKNOWN = -1
_INTEGER = re.compile(r"-?[0-9]+")
_WHOLE_FLOAT = re.compile(r"(-?[0-9]+)\.0")  # as pandas writes a column of integers with gaps
Columns = dict[str, list[Any]]


def read_columns(argument: str, path: str | Path) -> Columns:
    """Read a table.

    Args:
        argument: Name of the argument that gave the path, for errors.
        path: File in one of the :data:`FORMATS`. CSV and TSV have a header; texts with separators, quotes or line
            breaks are quoted, with quotes inside doubled.

    Returns:
        Cells by column: strings from CSV and TSV, whatever there is otherwise, None where a cell is missing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not in one of the formats, or has no row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be an existing file in {FORMATS}; got {path}. Correct the path.")
    form = Path(path.name.lower().removesuffix(".gz")).suffix
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if form not in readers:
        raise ValueError(f"{argument} must be a file in {FORMATS}; got {path}. Convert or rename it.")
    try:
        columns = readers[form](path)
    except UnicodeDecodeError as error:
        place = _undecodable(path)
        raise ValueError(
            f"{argument} must be a {form} file in UTF-8; {path} cannot be read{place} ({error.reason}). Save it as "
            "UTF-8."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{argument} must be a {form} file in UTF-8; {path} cannot be read ({error}). Write the file once more."
        ) from None
    if not any(columns.values()):
        raise ValueError(f"{argument} must hold at least one row; {path} has none. Name a file that has.")
    return columns


def require_column(columns: Columns, argument: str, name: str, path: str | Path, remedy: str = "") -> list[Any]:
    """The cells of a column.

    Raises:
        ValueError: If there is none of that name; names those there are, and the nearest.
    """
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{argument} must name a column of {path}, which has {', '.join(columns)}; got {name!r}.{hint}{remedy}"
        )
    return columns[name]


def check_labels(labels: Sequence[Any], column: str, path: str | Path) -> None:
    """Refuse labels of a table that can be no classes, by their row.

    Args:
        labels: Cells of the column.
        column: Its name.
        path: Of the table.

    Raises:
        ValueError: If one is neither an integer of at least 0 nor a name, or is true or false beside others, or if all
            are numbers and one is not whole.
    """
    rule = "labels must be names, or integers of at least 0 (-1, empty or null where there is none)"
    kinds = {type(label) for label in labels if label is not None}
    numeric = all(_is_number(label) for label in labels)
    for row, label in enumerate(labels, start=1):
        if label is None or label != label or label == UNKNOWN:
            continue
        whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
        fits = abs(label) <= LARGEST and (whole and label >= 0) if isinstance(label, (int, float)) else True
        text = label.strip() if isinstance(label, str) else ""
        if text and numeric:
            whole_text = _WHOLE_FLOAT.fullmatch(text) or _INTEGER.fullmatch(text)
            fits = whole_text is not None and len(text) < 19 and float(text) >= UNKNOWN
        if not (fits and isinstance(label, (int, float, str))) or (isinstance(label, bool) and kinds != {bool}):
            shown = repr(label) if len(repr(label)) <= 40 else f"{repr(label)[:40]}..."
            raise ValueError(f"{rule}; row {row} of {path} has {shown} as {column!r}. Correct it, or leave it empty.")


def _is_number(label: Any) -> bool:
    """True for a number, a text of one, and for no label."""
    if not isinstance(label, str):
        return label is None or isinstance(label, (int, float))
    try:
        float(label.strip() or "0")
    except ValueError:
        return False
    return True


def class_numbers(
    labels: Sequence[Any], num_train: int, known: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[int]]:
    """Number the classes: integers in their order, names alphabetically.

    Args:
        labels: Integers or names, training rows first. None, ``""`` and -1 mean unlabelled.
        num_train: Training rows, whose labels are all that a classifier can learn.
        known: Names of the classes, where they are known: then labels are names or numbers of them.

    Returns:
        Names of the classes, and the number of each row, -1 where unlabelled.

    Raises:
        ValueError: If a label is neither an integer nor a string, is not one of ``known``, or occurs outside of the
            training rows alone while these have labels.
    """
    cells = [_label(label) for label in labels]
    given = {cell for cell in cells if cell is not None}
    integers = all(_INTEGER.fullmatch(cell) for cell in given)
    ordered = sorted(given, key=int) if integers else sorted(given)
    if integers and ordered and int(ordered[0]) < 0:
        raise ValueError(f"integer labels must be at least 0, or -1 for unlabelled; got {ordered[0]}.")
    if known is None:
        classes = tuple(ordered)
        numbers = {name: number for number, name in enumerate(classes)}
    else:
        classes = known
        numbers = {spelling: number for number, name in enumerate(known) for spelling in (name, str(number))}
    invalid = [cell for cell in ordered if cell not in numbers]
    if invalid:
        raise ValueError(
            f"labels must be one of {', '.join(classes)} or their numbers; got {', '.join(invalid[:5])}. Use "
            "TextDataModule for classes of your own."
        )
    numbered = [UNKNOWN if cell is None else numbers[cell] for cell in cells]
    learned = set(numbered[:num_train]) - {UNKNOWN}
    new = sorted(set(numbered[num_train:]) - {UNKNOWN} - learned)
    if learned and new:
        raise ValueError(
            "every label must occur in the training rows; only validation or test rows have "
            f"{', '.join(classes[label] for label in new[:5])}. Move such rows, or drop them."
        )
    return classes, numbered


def _label(value: Any) -> str | None:
    """A label in its one spelling, None for an unlabelled row."""
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps
        value = int(value)
    if value is None or value != value or value == UNKNOWN:
        return None
    if not isinstance(value, (int, str)):
        raise ValueError(f"labels must be integers or strings; got {value!r}. Convert them, or pass label=None.")
    cell = str(value).strip()
    whole = _WHOLE_FLOAT.fullmatch(cell)
    cell = whole[1] if whole else cell
    return None if cell in ("", str(UNKNOWN)) else cell


# Formats ----------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Columns:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Columns:
    return _read_separated(path, "\t")


def _read_separated(path: Path, separator: str) -> Columns:
    with _open_text(path) as file, _long_fields():
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            rows = list(_checked_rows(reader, path))
        except csv.Error as error:
            if "NUL" in str(error):  # Python 3.10
                raise ValueError(
                    f"line {reader.line_num} of {path} must hold text; got a NUL byte. Save the table once more."
                ) from None
            raise ValueError(
                f"line {reader.line_num} of {path} has unbalanced quotes ({error}). Quote texts that hold separators, "
                'quotes or line breaks, and double the quotes inside ("").'
            ) from None
    header, *body = rows or [[]]
    _check_names(header, path)
    return {name: [row[place] for row in body] for place, name in enumerate(header)}


def _undecodable(path: Path) -> str:
    """Place of the first line that is not UTF-8."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f" in line {number}"
    return ""


def _checked_rows(reader: Any, path: Path) -> Iterator[list[str]]:
    width = None
    for row in reader:
        if not row:
            continue
        if any("\0" in field for field in row):
            raise ValueError(
                f"line {reader.line_num} of {path} must hold text; got a NUL byte. Save the table once more."
            )
        width = width or len(row)
        if len(row) != width:
            raise ValueError(
                f"line {reader.line_num} of {path} has {len(row)} fields between {reader.dialect.delimiter!r} and the "
                f"header {width}. Quote texts that hold separators."
            )
        if any("\n" in field and "\t" in field for field in row) and reader.dialect.delimiter == "\t":
            raise ValueError(
                f"the row that ends in line {reader.line_num} of {path} holds a tab and a line break in one field: a "
                "single quote has probably swallowed the rows after it. Double quotes inside of texts and quote them, "
                "or write .jsonl."
            )
        yield row


def _read_jsonl(path: Path) -> Columns:
    rows: list[dict[str, Any]] = []
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_without_repetition)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} of {path} must be JSON; {error.msg.removesuffix(' at')} at character "
                    f"{error.pos + 1}. Correct that line."
                ) from None
            except ValueError as error:  # an integer of thousands of digits, or a key twice
                raise ValueError(f"line {number} of {path} must be JSON; {error}. Correct that line.") from None
            except RecursionError:
                raise ValueError(f"line {number} of {path} must not be nested so deeply. Write it flat.") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"line {number} of {path} must be a JSON object; got {line.strip()[:40]}. Write {{...}}."
                )
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return row


def _read_parquet(path: Path) -> Columns:
    parquet = require("pyarrow.parquet", "parquet")
    arrow = require("pyarrow", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, path)
            columns: Columns = file.read().to_pydict()
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a parquet file; it cannot be read ({error}). Write it once more.") from None
    return columns


def _check_names(names: Sequence[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"columns of {path} must have different names; got {', '.join(names)}. Rename or drop one.")


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield file


@contextmanager
def _long_fields() -> Iterator[None]:
    """Accept texts beyond the csv module's default of 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
