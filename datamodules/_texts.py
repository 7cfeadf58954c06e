"""The base of the text data modules."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddcl_lightning.datamodules._loading import Batch
from ddcl_lightning.datamodules._splits import SPLITS, EvaluateOn, Loaded, Split, SplitDataModule
from ddcl_lightning.datamodules._tables import class_numbers


class TextRows(NamedTuple):
    """Texts of a split with their labels as they were found."""

    texts: list[str]
    labels: list[Any]


class Texts:
    """Gives texts of a list.

    Args:
        texts: N texts.
    """

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __call__(self, rows: Tensor) -> Batch:
        """``text`` of the rows, B of them."""
        return {"text": [self.texts[row] for row in rows.tolist()]}


class TextSplitDataModule(SplitDataModule):
    """Data module of texts: variants read them, this class and its base do the rest.

    Batches hold ``text``, a list of B strings; the backbone turns them into tokens. Training batches are of texts of
    similar length, which need little padding: every 50 shuffled batches are sorted, and the batches shuffled again.

    Args:
        drop_empty: Leave out texts of white space, which have no tokens of meaning, with a warning that counts them.
        batch_size: This and the following as in :class:`~ddcl_lightning.datamodules.SplitDataModule`.
        eval_batch_size: See there.
        val_fraction: See there.
        evaluate_on: See there.
        limit: See there.
        seed: See there.
        num_workers: See there.
    """

    known_classes: ClassVar[tuple[str, ...] | None] = None  # where the data do not decide

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
        found = self.read()
        if self.drop_empty:
            found = self._without_empty(found)
        train, val, test = (found.get(name, TextRows([], [])) for name in SPLITS)
        labels = [*train.labels, *val.labels, *test.labels]
        self._class_names, y = class_numbers(labels, len(train.labels), self.known_classes)
        fetch = Texts([*train.texts, *val.texts, *test.texts])
        return Loaded(fetch, torch.tensor(y, dtype=torch.int64), len(val.texts), len(test.texts))

    def lengths(self, loaded: Loaded) -> Tensor:
        """Characters of each text."""
        assert isinstance(loaded.fetch, Texts)
        return torch.tensor([len(text) for text in loaded.fetch.texts])

    def example(self, index: int) -> str:
        """Text ``index``."""
        fetch = self._require_setup()[0].fetch
        assert isinstance(fetch, Texts)
        return fetch.texts[self._check_index(index)]

    def _without_empty(self, found: dict[Split, TextRows]) -> dict[Split, TextRows]:
        kept = {name: _filled(rows) for name, rows in found.items()}
        before, after = (sum(len(rows.texts) for rows in splits.values()) for splits in (found, kept))
        if after < before:
            rank_zero_warn(
                f"{type(self).__name__} left out {before - after} of {before} texts, which hold nothing but white "
                "space; drop_empty=False keeps them."
            )
        return kept


def _filled(rows: TextRows) -> TextRows:
    kept = [pair for pair in zip(*rows, strict=True) if pair[0].strip()]
    return TextRows([text for text, _ in kept], [label for _, label in kept])
