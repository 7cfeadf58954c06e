"""Columns of a table in CSV, TSV, JSON lines or parquet, or a DataFrame."""

import csv
import difflib
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd

from ddcl_lightning.datamodules._parquet import ParquetColumn, open_parquet

FORMATS = ".csv, .tsv, .jsonl (each also with .gz) or .parquet"
Columns = dict[str, Sequence[Any]]


def read_columns(argument: str, path: str | Path, formats: str = FORMATS) -> Columns:
    """Read a table; of a parquet file cells are decoded as they are needed.

    Args:
        argument: Name of the argument that gave the path, for errors.
        path: File in one of the :data:`FORMATS`. CSV and TSV have a header; texts with separators, quotes or line
            breaks are quoted, with quotes inside doubled.
        formats: What the file may be, for errors.

    Returns:
        Cells by column: strings from CSV and TSV, whatever there is otherwise, None where a cell is missing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not in one of the formats, or has no row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be an existing file in {formats}; got {path}. Correct the path.")
    form = Path(path.name.lower().removesuffix(".gz")).suffix
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if form not in readers:
        raise ValueError(f"{argument} must be a file in {formats}; got {path}. Convert or rename it.")
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
    if not any(map(len, columns.values())):
        raise ValueError(f"{argument} must hold at least one row; {path} has none. Name a file that has.")
    return columns


def read_lines(argument: str, path: str | Path) -> list[str]:
    """Lines of a text file in UTF-8, ``.txt`` or ``.txt.gz``, without their ends.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not in UTF-8, or empty.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be an existing file; got {path}. Correct the path.")
    try:
        with _open_text(path) as file:
            lines = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument} must be a text file in UTF-8; {path} cannot be read{_undecodable(path)} ({error.reason}). "
            "Save it as UTF-8."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{argument} must be a text file in UTF-8; {path} cannot be read ({error}). Write the file once more."
        ) from None
    if not lines:
        raise ValueError(f"{argument} must hold at least one line; {path} is empty. Name a file that has text.")
    return lines


def frame_columns(argument: str, frame: pd.DataFrame) -> Columns:
    """Columns of a DataFrame by their names as text, None where a cell is missing.

    Raises:
        ValueError: If it has no row, or two columns of one name.
    """
    names = [str(name) for name in frame.columns]
    check_names(names, "the DataFrame")
    if not len(frame) or not names:
        raise ValueError(f"{argument} must hold at least one row; got a DataFrame of shape {frame.shape}. Fill it.")
    columns: Columns = {}
    for place, name in enumerate(names):
        column = frame.iloc[:, place]
        cells, missing = column.tolist(), column.isna().tolist()
        columns[name] = [None if gap else cell for cell, gap in zip(cells, missing, strict=True)]
    return columns


def check_ids(columns: Columns, name: str, path: str | Path) -> None:
    """Refuse a column of ids that does not tell every row from the others.

    Raises:
        ValueError: If there is no such column, a cell is missing, or two are equal; names the rows, from 0.
    """
    first: dict[Any, int] = {}
    for row, cell in enumerate(require_column(columns, "id", name, path)):
        if cell is None or cell == "" or isinstance(cell, (list, dict)):
            raise ValueError(f"id must name every row; row {row} (from 0) of {path} has {cell!r} as {name!r}. Fill it.")
        if first.setdefault(cell, row) != row:
            raise ValueError(
                f"id must tell rows apart; rows {first[cell]} and {row} (from 0) of {path} both have {cell!r:.60} as "
                f"{name!r}. Correct one, or name another column."
            )


def require_column(columns: Columns, argument: str, name: str, path: str | Path, remedy: str = "") -> Sequence[Any]:
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
    check_names(header, path)
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
    with open_parquet(path) as file:
        names = list(file.schema_arrow.names)
    check_names(names, path)
    return {name: ParquetColumn(path, name) for name in names}


def check_names(names: Sequence[str], path: str | Path) -> None:
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
