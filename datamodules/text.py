"""Texts of a user's own."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._labels import check_labels
from ddcl_lightning.datamodules._parquet import ParquetColumn, uncompressed_bytes
from ddcl_lightning.datamodules._partition import SPLIT_NAMES, SPLITS, EvaluateOn, Split
from ddcl_lightning.datamodules._storage import store_texts
from ddcl_lightning.datamodules._tables import (
    FORMATS,
    Columns,
    check_ids,
    frame_columns,
    read_columns,
    read_lines,
    require_column,
)
from ddcl_lightning.datamodules._texts import TextRows, TextSplitDataModule

LINES = (".txt", ".txt.gz")  # files of one text per line
LONGEST_TEXT = 10**8  # characters; more is a file that was read as one cell
LOOKED_AT = 100  # cells by which a column of texts is recognised
Source: TypeAlias = str | Path | Sequence[Any] | pd.DataFrame


class TextDataModule(TextSplitDataModule):
    """Texts from files, a list or a DataFrame; the backbone turns them into tokens.

    Batches hold ``text``, a list of B strings. The splits come from ``val_path`` and ``test_path``, or else from a
    column of ``path`` with the values train, validation (val, valid, dev) and test; without either all rows are
    training rows. For the rows of validation and test see :class:`~ddcl_lightning.datamodules.SplitDataModule`.

    Labels are integers or names. Classes are numbered in the order of the integers or of the alphabet, the same in all
    splits. A row whose label is empty, null, -1 or a number that is NaN has ``y`` -1; the text ``nan`` of a CSV is a
    name, and refused beside numbers.

    ``index`` is the row's number in its file, from 0, blank lines not counted. With ``val_path`` or ``test_path``
    it counts on from file to file, and predictions have the columns ``file`` and ``row`` (the number in that file) too.

    A parquet file need not fit in memory: it is read a few rows at a time, and its texts go to a temporary file where
    they are many. Other formats are read whole.

    Args:
        path: A list of texts, a DataFrame, or a file that ends in .csv, .tsv, .jsonl, .csv.gz, .tsv.gz, .jsonl.gz or
            .parquet, in UTF-8, with a header where the format has one; or in .txt or .txt.gz, one text per line.
        text: Column of the texts; by default ``text``, or else the only one that holds texts. A list and a file of
            lines have the column ``text``.
        label: Column of the labels; None for unlabelled texts, of which all have ``y`` -1, as those of a list and a
            file of lines have.
        id: Column that tells the rows apart, written beside predictions.
        split: Column of the splits, which need not be there; None ignores it.
        val_path: File of the validation split, with the same columns; then no column ``split`` is read.
        test_path: File of the test split, with the same columns; then no column ``split`` is read.
        drop_empty: Leave out texts that are empty or white space, with a warning that lists them;
            the others keep their number (``index``).
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split for validation, in [0, 1).
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for the arguments around it.
        limit: Train on at most this many texts, every class keeping its share.
        seed: Seed of split, limit and order; by default that of ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for texts in memory.

    Raises:
        ValueError: If an argument is out of its range; at set-up, if a file, a column or a label cannot be used.
        FileNotFoundError: At set-up, if a file does not exist.
        ImportError: At set-up, if a parquet file is given and pyarrow is missing.
    """

    @typed
    def __init__(
        self,
        path: str | Path | Sequence[Any] | pd.DataFrame,
        text: str | None = None,
        label: str | None = "label",
        id: str | None = None,
        split: str | None = "split",
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        drop_empty: bool = True,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            drop_empty=drop_empty,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.text, self.label, self.id, self.split = text, label, id, split
        self.row_columns = () if id is None else (id,)
        if val_path is not None or test_path is not None:
            self.row_columns = ("file", "row", *self.row_columns)

    def read(self) -> dict[Split, TextRows]:
        """Texts and labels of each split, from the files."""
        if self.val_path is None and self.test_path is None:
            return read_one_file(self.path, self.text, self.label, self.split, self.id)
        files = zip(SPLITS, ("path", "val_path", "test_path"), (self.path, self.val_path, self.test_path), strict=True)
        return {
            split: _with_file(_read_rows(argument, file, self.text, self.label, None, self.id), file)
            for split, argument, file in files
            if file is not None
        }


def read_one_file(
    path: Source, text: str | None, label: str | None, split: str | None, id: str | None = None
) -> dict[Split, TextRows]:
    """Texts and labels of a file, by what its column ``split`` says; all are training rows where it has none."""
    rows = _read_rows("path", path, text, label, split, id)
    if split is None or split not in rows.columns:
        return {"train": rows}
    rows_of_split: dict[Split, list[int]] = {name: [] for name in SPLITS}
    for row, value in enumerate(rows.columns[split]):
        name = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
        if name is None:
            raise ValueError(
                f"column {split!r} of {_title(path)} must hold train, validation (val, valid, dev) or test; got "
                f"{value!r}. Name another column as split, or pass split=None to ignore it."
            )
        rows_of_split[name].append(row)
    return {name: rows.take(np.array(members, np.int64)) for name, members in rows_of_split.items()}


def _with_file(rows: TextRows, file: Source) -> TextRows:
    """Rows with the columns ``file`` and ``row`` added, unless the file has such columns itself."""
    count = len(rows.texts)
    return rows._replace(columns={"file": [_title(file)] * count, "row": list(range(count)), **rows.columns})


def _title(source: Source) -> str:
    """Name of a source in errors."""
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"


def _columns(argument: str, source: Source) -> Columns:
    """Columns of a source; those without names have the one column ``text``."""
    if isinstance(source, pd.DataFrame):
        return frame_columns(argument, source)
    if isinstance(source, (str, Path)):
        if str(source).lower().endswith(LINES):
            return {"text": read_lines(argument, source)}
        return read_columns(argument, source, f"{FORMATS}, or .txt with one text per line")
    if not len(source):
        raise ValueError(f"{argument} must hold at least one text; got an empty {type(source).__name__}. Fill it.")
    return {"text": list(source)}


def _text_column(columns: Columns, source: Source, others: Sequence[str | None]) -> str:
    """Name of the column ``text``, or of the only column of texts."""
    if "text" in columns:
        return "text"
    names = [name for name, cells in columns.items() if name not in others and _holds_texts(cells)]
    if len(names) == 1:
        return names[0]
    candidates = f"{', '.join(names)} do" if names else f"none of {', '.join(columns)} does"
    raise ValueError(
        f"text must name the column of {_title(source)} that holds the texts; got None, and {candidates}. Name one."
    )


def _holds_texts(cells: Sequence[Any]) -> bool:
    """True if the first cells are texts, and some of them no numbers."""
    first = [cell for cell in islice(iter(cells), LOOKED_AT) if cell is not None and cell != ""]
    return bool(first) and all(isinstance(cell, str) for cell in first) and not all(map(_is_number, first))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_rows(
    argument: str, path: Source, text: str | None, label: str | None, split: str | None, id: str | None
) -> TextRows:
    """Texts and labels of a source, and all of its columns."""
    columns = _columns(argument, path)
    if text is None:
        text = _text_column(columns, path, (label, id, split))
    cells = require_column(columns, "text", text, _title(path))
    texts: Sequence[str] = _checked_texts(cells, text, path)
    if id is not None:
        check_ids(columns, id, _title(path))
    without_columns = not isinstance(path, pd.DataFrame) and (
        str(path).lower().endswith(LINES) if isinstance(path, (str, Path)) else True
    )
    if label is None or without_columns:
        return TextRows(texts, [None] * len(texts), columns=columns)
    remedy = " Pass label=None for unlabelled texts."
    labels = require_column(columns, "label", label, _title(path), remedy)
    check_labels(labels, label, _title(path))
    return TextRows(texts, labels, columns=columns)


def _checked_texts(cells: Sequence[Any], name: str, path: Source) -> Sequence[str]:
    """The cells of a column, if all of them are texts and one is more than white space."""
    filled = False

    def checked() -> Iterator[str]:
        nonlocal filled
        for row, value in enumerate(cells, start=1):
            if not isinstance(value, str):
                raise ValueError(
                    f"texts must be strings; row {row} of {_title(path)} has {value!r:.60} as {name!r}. Correct or "
                    "remove that row."
                )
            if len(value) > LONGEST_TEXT:
                raise ValueError(
                    f"texts must be at most {LONGEST_TEXT:,} characters long; row {row} of {_title(path)} has "
                    f"{len(value):,} as {name!r}. Cut it into several rows."
                )
            filled = filled or bool(value.strip())
            yield value

    hint = uncompressed_bytes(cells.path, name) if isinstance(cells, ParquetColumn) else 0
    texts = store_texts(checked(), f"the texts of {_title(path)}", hint)
    if not filled:
        raise ValueError(
            f"texts must hold more than white space; {_title(path)} has nothing else as {name!r}, in {len(texts)} "
            "rows. Name another column or file."
        )
    return texts
