"""Feature vectors of a user's own files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._origin import Origin
from ddcl_lightning.datamodules._partition import EvaluateOn, Loaded
from ddcl_lightning.datamodules._splits import SplitDataModule
from ddcl_lightning.datamodules._tables import Columns, check_labels, class_numbers, read_columns, require_column
from ddcl_lightning.datamodules._tensors import Features

TITLES = ("title", "name", "text")  # columns that say what a row is, the first that is there


class FeaturesDataModule(SplitDataModule):
    """Vectors from a ``.npy`` array or a table, such as embeddings of items; batches hold ``x`` ``(B, F)`` float32.

    All rows are training rows, but for those that ``val_fraction`` holds out; ``index`` is the number of the row in the
    file. What else is known of the rows, the columns of the table or of ``items``, can be written beside predictions
    (``--predictions.columns``) and is shown in reports.

    Args:
        path: File of the vectors: ``.npy``, an array ``(N, F)``; or a table (.csv, .tsv, .jsonl, also with .gz, or
            .parquet).
        features: Of a table, the column that holds a list of F numbers in each row, or the F columns of one number.
        items: Table with one row for each row of a ``.npy``.
        label: Column of the labels; None for unlabelled rows, of which all have ``y`` -1.
        title: Column that is shown for a row; by default ``title``, ``name`` or ``text``, where there is one.
        standardize: Subtract the mean of the training rows from each feature and divide it by their standard deviation.
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out for validation and test, in [0, 1).
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for the arguments around it.
        limit: Train on at most this many rows, every class keeping its share.
        seed: Seed of split, limit and order; by default that of ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for tensors in memory.

    Raises:
        ValueError: If an argument is out of its range; at set-up, if a file, a column or a value cannot be used.
        FileNotFoundError: At set-up, if a file does not exist.
        ImportError: At set-up, if a parquet file is given and pyarrow is missing.
    """

    @typed
    def __init__(
        self,
        path: str | Path,
        features: str | list[str] = "features",
        items: str | Path | None = None,
        label: str | None = None,
        title: str | None = None,
        standardize: bool = False,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        self.path, self.features, self.items = path, features, items
        self.label, self.title, self.standardize = label, title, standardize
        self._class_names: tuple[str, ...] = ()
        self._titles: Sequence[Any] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, known after setup; empty without labels."""
        return self._class_names

    def load(self) -> Loaded:
        """The vectors, and what is known of their rows."""
        self._raw, columns = self._read()
        y = torch.full((len(self._raw),), -1)
        source = self.items or self.path
        named = next((f"{name} {value!r}" for name in ("label", "title") if (value := getattr(self, name))), None)
        if named and not columns:
            raise ValueError(f"items must be a table for {named}, since {source} has no columns; got None. Name one.")
        if self.label is not None:
            cells = require_column(columns, "label", self.label, source)
            check_labels(cells, self.label, source)
            self._class_names, numbers = class_numbers(cells, len(cells))
            y = torch.tensor(numbers, dtype=torch.int64)
        if self.title is not None:
            self._titles = require_column(columns, "title", self.title, source)
        else:
            self._titles = next((columns[name] for name in TITLES if name in columns), None)
        return Loaded(Features(self._raw), y, origin=Origin(torch.arange(len(y)), columns))

    def transform(self, loaded: Loaded, train_rows: Tensor) -> Loaded:
        """The vectors as the training rows scale them."""
        if not self.standardize:
            return loaded
        spread, mean = torch.std_mean(self._raw[train_rows].double(), dim=0, correction=0)
        scaled = (self._raw - mean) / torch.where(spread > 0, spread, 1.0)
        return loaded._replace(fetch=Features(scaled))

    def example(self, index: int) -> str:
        """The title of row ``index``, or the first of its values."""
        place = self._check_index(index)
        if self._titles is not None:
            return str(self._titles[place])
        values = ", ".join(f"{value:.3g}" for value in self._raw[place, :6].tolist())
        return f"{values}{', ...' if self._raw.shape[1] > 6 else ''}"

    def _read(self) -> tuple[Tensor, Columns]:
        """Vectors ``(N, F)`` and the other columns."""
        path = Path(self.path).expanduser()
        if path.suffix.lower() != ".npy":
            if self.items is not None:
                raise ValueError(f"items must be None where path is a table; got {self.items}. Add its columns there.")
            return self._from_table(read_columns("path", path), path)
        if not path.is_file():
            raise FileNotFoundError(f"path must be an existing file; got {path}. Correct the path.")
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"path must be an array that numpy.save wrote; {path} cannot be read ({_reason(path, error)}). Save it "
                "anew."
            ) from None
        vectors = _as_vectors(array, path)
        columns = {} if self.items is None else read_columns("items", self.items)
        rows = next(map(len, columns.values()), len(vectors))
        if rows != len(vectors):
            raise ValueError(
                f"items must have one row for each of the {len(vectors)} rows of {path}; {self.items} has {rows}. "
                "Drop or add rows."
            )
        return vectors, columns

    def _from_table(self, columns: Columns, path: Path) -> tuple[Tensor, Columns]:
        names = [self.features] if isinstance(self.features, str) else self.features
        remedy = " Name the column of vectors, or list those of numbers, as features."
        cells = [require_column(columns, "features", name, path, remedy) for name in names]
        rows = cells[0] if isinstance(self.features, str) else [list(row) for row in zip(*cells, strict=True)]
        try:
            array = np.array([[float(value) for value in row] for row in rows])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"features must hold numbers, equally many in each row; {path} has others ({error}).{remedy}"
            ) from None
        return _as_vectors(array, path), {name: cell for name, cell in columns.items() if name not in names}


def _reason(path: Path, error: Exception) -> str:
    """Reason why a file is no array; NumPy takes whatever it does not know for a pickle."""
    if "pickle" not in str(error):
        return str(error)
    with path.open("rb") as file:
        known = file.read(6) == b"\x93NUMPY"
    return "it holds Python objects, not numbers" if known else "it is a file of another kind under that name"


def _as_vectors(array: Any, path: Path) -> Tensor:
    """Array ``(N, F)`` as float32, if it is such and finite."""
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "fiu"
    if not numbers or array.ndim != 2 or not array.size:
        form = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"path must hold numbers of shape (N, F), a row per item; {path} has {form}.")
    vectors = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    broken = torch.nonzero(~vectors.isfinite().all(1)).flatten()
    if len(broken):
        row = int(broken[0])
        column = int(torch.nonzero(~vectors[row].isfinite())[0])
        raise ValueError(
            f"features must be finite numbers in float32; row {row}, column {column} of {path} (from 0) has "
            f"{array[row, column]}. Correct or remove it."
        )
    return vectors
