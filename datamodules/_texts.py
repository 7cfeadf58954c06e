"""The base of the text data modules."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._labels import class_numbers
from ddcl_lightning.datamodules._loading import Batch
from ddcl_lightning.datamodules._origin import Origin, listing
from ddcl_lightning.datamodules._partition import SPLITS, EvaluateOn, Loaded, Split
from ddcl_lightning.datamodules._splits import SplitDataModule
from ddcl_lightning.datamodules._storage import joined, picked


class TextRows(NamedTuple):
    """Texts of a split with their labels as they were found: lists, or sequences that are read as they are needed.

    Attributes:
        texts: M texts.
        labels: M labels.
        numbers: Number of each in the user's file; None counts on from the split before.
        columns: M cells of each column of the file.
    """

    texts: Sequence[str]
    labels: Sequence[Any]
    numbers: npt.NDArray[np.int64] | None = None
    columns: Mapping[str, Sequence[Any]] = {}

    def take(self, rows: npt.NDArray[np.int64]) -> "TextRows":
        """Some of the rows."""
        cells = {name: picked(column, rows) for name, column in self.columns.items()}
        numbers = rows if self.numbers is None else self.numbers[rows]
        return TextRows(picked(self.texts, rows), picked(self.labels, rows), numbers, cells)


class Texts:
    """Function from row numbers to texts of a sequence.

    Args:
        texts: N texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __call__(self, rows: Tensor) -> Batch:
        """``text`` of the rows, B of them."""
        return {"text": [self.texts[row] for row in rows.tolist()]}


class TextSplitDataModule(SplitDataModule):
    """Data module of texts: variants read them, this class and its base do the rest.

    Batches hold ``text``, a list of B strings; the backbone turns them into tokens. Training batches are of texts of
    similar length, which need little padding: every 50 shuffled batches are sorted, and the batches shuffled again.

    Args:
        drop_empty: Leave out texts of white space, which have no tokens of meaning, with a warning that lists them.
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: Rows per batch of all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split for validation, in [0, 1).
        evaluate_on: Rows of validation and test, see :class:`~ddcl_lightning.datamodules.SplitDataModule`.
        limit: Train on at most this many rows, every class keeping its share; None takes all.
        seed: Seed of split, limit, and order; None takes that of ``seed_everything``.
        num_workers: Worker processes per loader, at least 0.
    """

    known_classes: ClassVar[tuple[str, ...] | None] = None  # where the data do not decide

    @typed
    def __init__(
        self,
        *,
        drop_empty: bool,
        batch_size: int,
        eval_batch_size: int | None,
        val_fraction: float,
        evaluate_on: EvaluateOn,
        limit: int | None,
        seed: int | None,
        num_workers: int,
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
        self.drop_empty = drop_empty
        self._class_names = self.known_classes

    @abstractmethod
    def read(self) -> dict[Split, TextRows]:
        """Texts and labels of each split that there is."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; those of a user's file are known after setup."""
        if self._class_names is None:
            raise RuntimeError(f"{type(self).__name__} must be set up before it knows its classes; call setup() first.")
        return self._class_names

    def load(self) -> Loaded:
        """The texts of all splits."""
        splits = _numbered(self.read())
        dropped: dict[int, dict[str, Any]] = {}
        if self.drop_empty:
            splits, dropped = self._without_empty(splits)
        rows = [splits.get(name, TextRows([], [])) for name in SPLITS]
        train, val, test = rows
        labels = joined([split.labels for split in rows])
        self._class_names, y = class_numbers(labels, len(train.labels), self.known_classes)
        fetch = Texts(joined([split.texts for split in rows]))
        places = [split.numbers for split in rows if split.numbers is not None]
        numbers = torch.from_numpy(np.concatenate(places).astype(np.int64))
        names = dict.fromkeys(name for split in rows for name in split.columns)
        columns = {
            name: joined([split.columns.get(name, [None] * len(split.texts)) for split in rows]) for name in names
        }
        origin = Origin(
            numbers, {**columns, "text": columns.get("text", fetch.texts)}, {"white space": sorted(dropped)}, dropped
        )
        return Loaded(fetch, torch.tensor(y, dtype=torch.int64), len(val.texts), len(test.texts), origin)

    def lengths(self, loaded: Loaded) -> Tensor:
        """Characters of each text."""
        assert isinstance(loaded.fetch, Texts)
        return torch.from_numpy(np.fromiter(map(len, loaded.fetch.texts), np.int64, len(loaded.y)))

    def example(self, index: int) -> str:
        """Text ``index``."""
        fetch = self._require_setup()[0].fetch
        assert isinstance(fetch, Texts)
        return fetch.texts[self._check_index(index)]

    def _without_empty(self, splits: dict[Split, TextRows]) -> tuple[dict[Split, TextRows], dict[int, dict[str, Any]]]:
        """The rows that hold text, and the cells of the others by number."""
        kept: dict[Split, TextRows] = {}
        empty: dict[int, dict[str, Any]] = {}
        for split, rows in splits.items():
            assert rows.numbers is not None
            filled = np.fromiter((bool(text.strip()) for text in rows.texts), bool, len(rows.texts))
            kept[split] = rows if filled.all() else rows.take(np.flatnonzero(filled))
            for row in np.flatnonzero(~filled).tolist():
                cells = {name: column[row] for name, column in rows.columns.items()}
                text = {"text": rows.texts[row], "label": rows.labels[row], "split": split}
                empty[int(rows.numbers[row])] = {**text, **cells}
        if empty:
            total = sum(len(rows.texts) for rows in splits.values())
            rank_zero_warn(
                f"{type(self).__name__} left out {len(empty)} of {total} texts, which hold nothing but white "
                f"space ({listing(list(empty))}, from 0); drop_empty=False keeps them."
            )
        return kept, empty


def _numbered(splits: dict[Split, TextRows]) -> dict[Split, TextRows]:
    """Splits whose rows all have a number: that of their file, or else counted on from split to split."""
    numbered, counted = {}, 0
    for name in (name for name in SPLITS if name in splits):
        rows = splits[name]
        numbers = np.arange(counted, counted + len(rows.texts)) if rows.numbers is None else rows.numbers
        counted += len(rows.texts)
        numbered[name] = rows._replace(numbers=numbers)
    return numbered
