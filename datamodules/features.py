"""Feature vectors of a user's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from sklearn.datasets import load_digits
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._labels import check_labels, class_numbers
from ddcl_lightning.datamodules._loading import Batch
from ddcl_lightning.datamodules._origin import Origin
from ddcl_lightning.datamodules._partition import EvaluateOn, Loaded
from ddcl_lightning.datamodules._splits import NO_PATH, SplitDataModule
from ddcl_lightning.datamodules._storage import StoredVectors
from ddcl_lightning.datamodules._tables import check_ids, read_columns, require_column
from ddcl_lightning.datamodules._vectors import VectorTable, is_table, read_vectors

TITLES = ("title", "name", "text")  # columns that say what a row is, the first that is there


class FeaturesDataModule(SplitDataModule):
    """Vectors from an array or a table, such as embeddings of items; batches hold ``x`` ``(B, F)`` float32.

    A ``.npy`` file is read as batches need its rows, a parquet file a few rows at a time, so neither has to fit in
    memory (vectors of a large parquet file go to a temporary file, of N x F x 4 bytes). Other formats are read whole.

    All rows are training rows, but for those that ``val_fraction`` holds out; ``index`` is the number of the row in the
    file. What else is known of the rows, the columns of the table or of ``items``, can be written beside predictions
    (``--predictions.columns``) and is shown in reports.

    Args:
        path: The vectors: an array or tensor ``(N, F)``, a DataFrame, or a file: ``.npy`` or ``.npz``, or a table
            (.csv, .tsv, .jsonl, also with .gz, or .parquet). None takes scikit-learn's digits, to try it.
        features: Of a table, the column that holds a list of F numbers in each row, or the F columns of one number; of
            a ``.npz`` the name of the array. By default the column ``features``, or else the only one of lists, or else
            all columns of numbers but ``id`` and ``index``; a line says which.
        items: Table with one row for each row of an array.
        id: Column that tells the rows apart, written beside predictions; it is no feature.
        label: Column of the labels; None for unlabelled rows, of which all have ``y`` -1.
        title: Column that is shown for a row; by default ``title``, ``name`` or ``text``, where there is one.
        standardize: Subtract the mean of the training rows from each feature and divide it by their standard deviation;
            None does so where features are columns of their own, each perhaps with a unit of its own.
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
        path: str | Path | np.ndarray | Tensor | pd.DataFrame | None = None,
        features: str | list[str] | None = None,
        items: str | Path | None = None,
        id: str | None = None,
        label: str | None = None,
        title: str | None = None,
        standardize: bool | None = False,
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
        self.id, self.label, self.title, self.standardize = id, label, title, standardize
        self.row_columns = () if id is None else (id,)
        self._class_names: tuple[str, ...] = ()
        self._titles: Sequence[Any] | None = None
        self._separate = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, known after setup; empty without labels."""
        return self._class_names

    def load(self) -> Loaded:
        """The vectors, and what is known of their rows."""
        if self.path is None:
            return self._sample()
        self._raw, columns, self._separate = self._read()
        y = torch.full((len(self._raw),), -1)
        source = self._name(self.path if self.items is None else self.items)
        given = ((name, getattr(self, name)) for name in ("id", "label", "title"))
        named = next((f"{name} {value!r}" for name, value in given if value), None)
        if named and not columns:
            raise ValueError(f"items must be a table for {named}, since {source} has no columns; got None. Name one.")
        if self.id is not None:
            check_ids(columns, self.id, source)
        if self.label is not None:
            cells = require_column(columns, "label", self.label, source)
            check_labels(cells, self.label, source)
            self._class_names, numbers = class_numbers(cells, len(cells))
            y = torch.tensor(numbers, dtype=torch.int64)
        if self.title is not None:
            self._titles = require_column(columns, "title", self.title, source)
        else:
            self._titles = next((columns[name] for name in TITLES if name in columns), None)
        return Loaded(VectorFetch(self._raw), y, origin=Origin(torch.arange(len(y)), columns))

    def transform(self, loaded: Loaded, train_rows: Tensor) -> Loaded:
        """The vectors as the training rows scale them."""
        if not (self._separate if self.standardize is None else self.standardize):
            return loaded
        places = train_rows.numpy()
        chunks = (chunk.astype(np.float64) for chunk in self._raw.chunks(places))
        mean = sum(chunk.sum(0) for chunk in chunks) / len(places)
        chunks = (chunk.astype(np.float64) for chunk in self._raw.chunks(places))
        spread = np.sqrt(sum(np.square(chunk - mean).sum(0) for chunk in chunks) / len(places))
        spread = np.where(spread > 0, spread, 1.0)
        return loaded._replace(fetch=VectorFetch(self._raw, torch.from_numpy(mean), torch.from_numpy(spread)))

    def example(self, index: int) -> str:
        """The title of row ``index``, or the first of its values."""
        place = self._check_index(index)
        if self._titles is not None:
            return str(self._titles[place])
        row = self._raw.rows(slice(place, place + 1))[0]
        values = ", ".join(f"{value:.3g}" for value in row[:6].tolist())
        return f"{values}{', ...' if len(row) > 6 else ''}"

    def _sample(self) -> Loaded:
        """The digits of scikit-learn, with their labels."""
        rank_zero_info(NO_PATH)
        pixels, digits = load_digits(return_X_y=True)
        self._raw = StoredVectors((pixels / 16).astype(np.float32))
        self._class_names = tuple(str(digit) for digit in range(10))
        return Loaded(VectorFetch(self._raw), torch.from_numpy(digits).long())

    def _read(self) -> VectorTable:
        """Vectors ``(N, F)`` and the other columns."""
        assert self.path is not None
        if self.items is not None and is_table(self.path):
            raise ValueError(f"items must be None where path is a table; got {self.items}. Add its columns there.")
        others = [name for name in (self.id, self.label, self.title) if name is not None]
        table = read_vectors(self.path, self.features, others)
        if self.items is None:
            return table
        columns = read_columns("items", self.items)
        rows = next(map(len, columns.values()), 0)
        if rows != len(table.vectors):
            raise ValueError(
                f"items must have one row for each of the {len(table.vectors)} rows of {self._name(self.path)}; "
                f"{self.items} has {rows}. Drop or add rows."
            )
        return table._replace(columns=columns)

    def _name(self, source: Any) -> str:
        return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"


class VectorFetch:
    """Function from row numbers to vectors, scaled where that is asked for.

    Args:
        vectors: All of them.
        mean: What to subtract, ``(F,)`` float64.
        spread: What to divide by, ``(F,)`` float64, > 0.
    """

    def __init__(self, vectors: StoredVectors, mean: Tensor | None = None, spread: Tensor | None = None) -> None:
        self.vectors, self.mean, self.spread = vectors, mean, spread

    def __call__(self, rows: Tensor) -> Batch:
        """``x`` of the rows, ``(B, F)`` float32."""
        x = torch.from_numpy(self.vectors.rows(rows.numpy()))
        if self.mean is not None and self.spread is not None:
            x = ((x.double() - self.mean) / self.spread).float()
        return {"x": x}
