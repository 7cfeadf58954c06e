"""Texts of a user's own files."""

from pathlib import Path

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._partition import SPLIT_NAMES, SPLITS, EvaluateOn, Split
from ddcl_lightning.datamodules._tables import check_labels, read_columns, require_column
from ddcl_lightning.datamodules._texts import TextRows, TextSplitDataModule


class TextDataModule(TextSplitDataModule):
    """Texts from CSV, TSV, JSON lines or parquet files; the backbone turns them into tokens.

    Batches hold ``text``, a list of B strings. The splits come from ``val_path`` and ``test_path``, or else from a
    column of ``path`` with the values train, validation (val, valid, dev) and test; without either all rows are
    training rows. For the rows of validation and test see :class:`~ddcl_lightning.datamodules.SplitDataModule`.

    Labels are integers or names. Classes are numbered in the order of the integers or of the alphabet, the same in all
    splits. A row whose label is empty, null, -1 or a number that is NaN has ``y`` -1; the text ``nan`` of a CSV is a
    name, and refused beside numbers.

    ``index`` is the row's number in its file, from 0, blank lines not counted. With ``val_path`` or ``test_path``
    it counts on from file to file, and predictions have the columns ``file`` and ``row`` (the number in that file) too.

    Args:
        path: File that ends in .csv, .tsv, .jsonl, .csv.gz, .tsv.gz, .jsonl.gz or .parquet, in UTF-8, with a header
            where the format has one.
        text: Column of the texts.
        label: Column of the labels; None for unlabelled texts, of which all have ``y`` -1.
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
        path: str | Path,
        text: str = "text",
        label: str | None = "label",
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
        self.text, self.label, self.split = text, label, split
        if val_path is not None or test_path is not None:
            self.row_columns = ("file", "row")

    def read(self) -> dict[Split, TextRows]:
        """Texts and labels of each split, from the files."""
        if self.val_path is None and self.test_path is None:
            return read_one_file(self.path, self.text, self.label, self.split)
        files = zip(SPLITS, ("path", "val_path", "test_path"), (self.path, self.val_path, self.test_path), strict=True)
        return {
            split: _with_file(_read_rows(argument, file, self.text, self.label), file)
            for split, argument, file in files
            if file is not None
        }


def read_one_file(path: str | Path, text: str, label: str | None, split: str | None) -> dict[Split, TextRows]:
    """Texts and labels of a file, by what its column ``split`` says; all are training rows where it has none."""
    rows = _read_rows("path", path, text, label)
    if split is None or split not in rows.columns:
        return {"train": rows}
    rows_of_split: dict[Split, list[int]] = {name: [] for name in SPLITS}
    for row, value in enumerate(rows.columns[split]):
        name = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
        if name is None:
            raise ValueError(
                f"column {split!r} of {path} must hold train, validation (val, valid, dev) or test; got {value!r}. "
                "Name another column as split, or pass split=None to ignore it."
            )
        rows_of_split[name].append(row)
    return {name: rows.take(members) for name, members in rows_of_split.items()}


def _with_file(rows: TextRows, file: str | Path) -> TextRows:
    """Rows with the columns ``file`` and ``row`` added, unless the file has such columns itself."""
    return rows._replace(
        columns={"file": [str(file)] * len(rows.texts), "row": list(range(len(rows.texts))), **rows.columns}
    )


def _read_rows(argument: str, path: str | Path, text: str, label: str | None) -> TextRows:
    """Texts and labels of a file, and all of its columns."""
    columns = read_columns(argument, path)
    texts = require_column(columns, "text", text, path)
    for row, value in enumerate(texts, start=1):
        if not isinstance(value, str):
            raise ValueError(
                f"texts must be strings; row {row} of {path} has {value!r} as {text!r}. Correct or remove that row."
            )
    if not any(value.strip() for value in texts):
        raise ValueError(
            f"texts must hold more than white space; {path} has nothing else as {text!r}, in {len(texts)} rows. Name "
            "another column or file."
        )
    if label is None:
        return TextRows(texts, [None] * len(texts), columns=columns)
    remedy = " Pass label=None for unlabelled texts."
    labels = require_column(columns, "label", label, path, remedy)
    check_labels(labels, label, path)
    return TextRows(texts, labels, columns=columns)
