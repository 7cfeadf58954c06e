"""The base of all data modules: one data set in memory, its splits, and the loaders over them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ddcl_lightning._utils.arguments import described, typed
from ddcl_lightning._utils.seeding import resolve_seed
from ddcl_lightning.datamodules._loading import (
    Augment,
    Batch,
    EpochSampler,
    InOrderSampler,
    ResumableDataLoader,
    Rows,
    as_is,
    even_batch_size,
)
from ddcl_lightning.datamodules._origin import Origin, check_names, writable
from ddcl_lightning.datamodules._partition import SPLITS, EvaluateOn, Loaded, Splits, partition

LARGEST_SIZE = 2**31 - 1  # of what is counted in rows or pixels; beyond it torch's loops overflow or never end
NO_PATH = "No path is given, so the 1,797 digits of scikit-learn are the data; --data.path names your own."
MOST_WORKERS = 1024  # processes per loader; more than that is a slip of the finger


class SplitDataModule(pl.LightningDataModule, ABC):
    """Data module of a data set with splits: variants load it, this class does the rest.

    Batches are dicts of the inputs (``x`` or ``text``), ``y`` ``(B,)`` int64, -1 where unlabelled, and ``index``
    ``(B,)`` int64: the number that the row has in the user's file, from 0, without header and blank lines, whatever is
    left out or shuffled. Where there are several files (or splits of a well-known data set) it counts on from one to
    the next: training, then validation, then test.

    Which rows the loaders run over:

    - **training**: the training split, less the rows that ``val_fraction`` holds out, of those ``limit``. Shuffled
      anew each epoch, as a function of seed and epoch alone: a run resumed in mid-epoch repeats the uninterrupted one.
    - **validation**: the official validation split where there is one; otherwise a stratified ``val_fraction`` of the
      training split; with ``val_fraction=0`` the test split; where there is none, the training rows themselves,
      the protocol of deep clustering, in which labels take no part in training.
    - **test**: the official test split where there is one, otherwise the rows of validation.
    - **prediction**: all rows of all splits in order of ``index``, except those that ``limit`` leaves out;
      :meth:`left_out` lists them.

    ``evaluate_on="held_out"`` validates on the ``val_fraction`` held out of the training split even where there is a
    validation split, so that settings are chosen on rows which take no part in the final metrics. ``"train"`` makes
    validation and test run over the training rows (the clustering protocol for data
    sets that have other splits), ``"all"`` over the rows of prediction. Several processes share each epoch; where the
    rows do not divide evenly a few are repeated, in training by :class:`EpochSampler`, in validation by Lightning.

    Args:
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split, in [0, 1); without effect, with a
            warning, where the data set has a validation split and ``evaluate_on`` is not ``"held_out"``.
        evaluate_on: ``"auto"``, ``"held_out"``, ``"train"`` or ``"all"``, see above.
        limit: Train on at most this many rows, at least 1, for quick runs: a random subset in which every class keeps
            its share, and which a larger limit at the same seed contains. None takes all. Validation and test rows are
            not limited; ``Trainer(limit_val_batches=...)`` does that.
        seed: Seed of split, limit, training order and augmentation, in [0, 2**32); None takes that of
            ``seed_everything``.
        num_workers: Worker processes per loader, in [0, 1024]; 0 is fastest for what needs no decoding.

    Attributes:
        class_names: Name of each class, in the order of the labels; empty where there are no labels.
        num_classes: Number of classes.

    Raises:
        ValueError: If an argument is out of its range; at set-up, if no row is left to train or validate on.
    """

    @typed
    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0, MOST_WORKERS)
        for name, value in (("eval_batch_size", eval_batch_size), ("limit", limit)):
            if value is not None:
                check_at_least(name, value, 1)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1); got {val_fraction}. Use 0 to hold out nothing.")
        check_choice("evaluate_on", evaluate_on, get_args(EvaluateOn))
        if evaluate_on == "held_out" and not val_fraction:
            raise ValueError("val_fraction must be > 0 with evaluate_on='held_out'; got 0. Hold out 0.05, say.")
        if evaluate_on == "train" and val_fraction:
            raise ValueError(
                f"val_fraction must be 0 with evaluate_on='train'; got {val_fraction}: the rows held out would be "
                "neither trained on nor evaluated. Drop one of the two."
            )
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.val_fraction = val_fraction
        self.evaluate_on = evaluate_on
        self.limit = limit
        self.seed = resolve_seed(seed)
        self.num_workers = num_workers
        self._ready: tuple[Loaded, Splits] | None = None

    if not TYPE_CHECKING:  # where it would stand for every attribute

        def __getattr__(self, name: str) -> Any:
            """Raise for a missing attribute, with the reason if that is an ``__init__`` that was not called."""
            if name in ("_ready", "batch_size", "prepare_data_per_node", "trainer") and "_ready" not in vars(self):
                kind = type(self).__name__
                raise AttributeError(
                    f"{kind}.__init__ must call super().__init__(batch_size=...); {name!r} is missing because it did "
                    f"not. Call it first in {kind}.__init__."
                )
            return self.__getattribute__(name)  # raises as usual

    # What variants give -------------------------------------------------------------------------

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""

    @abstractmethod
    def load(self) -> Loaded:
        """The whole data set, from where :meth:`prepare_data` has put it."""

    @abstractmethod
    def example(self, index: int) -> str | npt.NDArray[np.uint8]:
        """Content of row ``index`` for a person: a text, or an image ``(H, W)`` or ``(H, W, 3)``; after setup."""

    def transform(self, loaded: Loaded, train_rows: Tensor) -> Loaded:
        """Transform the inputs by statistics of the training rows; the identity unless overridden."""
        return loaded

    def augmentation(self) -> Augment | None:
        """Random augmentation of training batches; None unless overridden."""
        return None

    def lengths(self, loaded: Loaded) -> Tensor | None:
        """Length of each row of the whole data set, ``(N,)``, to batch similar ones in training; none by default."""
        return None

    # What they get ------------------------------------------------------------------------------

    row_columns: tuple[str, ...] = ()  # what predictions say of a row unasked, besides its number

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names that :meth:`describe_rows` takes; after setup."""
        origin = self._require_setup()[0].origin
        return tuple(dict.fromkeys([*(origin.columns if origin else ()), "label", "split"]))

    def describe_rows(self, index: Sequence[int], names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of rows by number: those of the user's file, ``label`` (name of the class) and ``split``.

        Args:
            index: Numbers of rows, M of them; those of rows that were dropped too.
            names: Of :attr:`row_names`.

        Returns:
            M cells by name, None where nothing is known of a row that was dropped.

        Raises:
            ValueError: If a name is unknown.
        """
        loaded, _ = self._require_setup()
        check_names(names, self.row_names)
        origin = Origin(loaded.numbers) if loaded.origin is None else loaded.origin
        dropped = {number for numbers in origin.dropped.values() for number in numbers}

        def cell(name: str, number: int) -> Any:
            if number in dropped:
                return origin.dropped_cells.get(number, {}).get(name)
            place = self._check_index(number)
            return origin.columns[name][place] if name in origin.columns else self._stored_text(name, place)

        return {name: [writable(cell(name, int(number))) for number in index] for name in names}

    def _stored_text(self, name: str, place: int) -> str | None:
        loaded, _ = self._require_setup()
        if name == "label":
            label = int(loaded.y[place])
            names = self.class_names
            return str(names[label] if label < len(names) else label) if label >= 0 else None
        first_test = len(loaded.y) - loaded.num_test
        return SPLITS[(place >= first_test - loaded.num_val) + (place >= first_test)]

    def left_out(self) -> dict[str, list[int]]:
        """Numbers of the rows of the user's file that prediction leaves out, by reason; after setup."""
        loaded, splits = self._require_setup()
        dropped: Mapping[str, Sequence[int]] = loaded.origin.dropped if loaded.origin else {}
        kept = torch.zeros(len(loaded.y), dtype=torch.bool)
        kept[splits.predict] = True
        limited = loaded.numbers[~kept].tolist()
        numbers_by_reason = {**dropped, f"limit={self.limit}": limited}
        return {reason: sorted(numbers) for reason, numbers in numbers_by_reason.items() if len(numbers)}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once."""
        if self._ready is None:
            loaded = self.load()
            if not isinstance(loaded, Loaded):
                raise TypeError(
                    f"{type(self).__name__}.load() must return Loaded(fetch, y, ...); got {described(loaded)}. Return "
                    "what gives the inputs of some rows, and the labels of all."
                )
            self._check_labels(loaded)
            splits = partition(
                loaded,
                type(self).__name__,
                val_fraction=self.val_fraction,
                evaluate_on=self.evaluate_on,
                limit=self.limit,
                seed=self.seed,
            )
            self._sorted_numbers, self._order = loaded.numbers.sort()
            self._ready = self.transform(loaded, splits.train), splits

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled training rows; resumes in the middle of an epoch."""
        loaded, splits = self._require_setup()
        dataset = Rows(loaded.fetch, loaded.y, splits.train, self.augmentation(), loaded.numbers)
        lengths = self.lengths(loaded)
        processes, rank = self._processes()
        return ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(
                dataset,
                num_replicas=processes,
                rank=rank,
                seed=self.seed,
                batch_size=self.batch_size,
                lengths=None if lengths is None else lengths[splits.train],
            ),
            collate_fn=as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation rows in order."""
        return self._in_order(self._require_setup()[1].val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test rows in order."""
        return self._in_order(self._require_setup()[1].test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """All rows in order."""
        return self._in_order(self._require_setup()[1].predict)

    def _in_order(self, rows: Tensor) -> DataLoader[Batch]:
        loaded, _ = self._require_setup()
        dataset = Rows(loaded.fetch, loaded.y, rows, numbers=loaded.numbers)
        processes, rank = self._processes()
        size = even_batch_size(len(rows), self.eval_batch_size, processes)
        sampler = InOrderSampler(dataset, size, processes, rank) if processes > 1 else None
        return DataLoader(dataset, batch_size=size, sampler=sampler, collate_fn=as_is, num_workers=self.num_workers)

    def _processes(self) -> tuple[int, int]:
        """Number of processes that share the data, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _check_labels(self, loaded: Loaded) -> None:
        names: object = self.class_names
        if isinstance(names, str) or not isinstance(names, Sequence):
            kind = type(self).__name__
            raise TypeError(
                f"{kind}.class_names must be a tuple with the name of each class, () without labels; got "
                f"{described(names)}. Set it in {kind}."
            )
        invalid = (loaded.y < -1) | (loaded.y >= self.num_classes)
        if bool(invalid.any()) and self.num_classes:
            row = int(invalid.nonzero()[0])
            raise ValueError(
                f"labels must be numbers of classes in [0, {self.num_classes}), or -1 for unlabelled; row "
                f"{int(loaded.numbers[row])} has {int(loaded.y[row])}. Correct the file."
            )

    def _require_setup(self) -> tuple[Loaded, Splits]:
        if self._ready is None:
            raise RuntimeError(f"{type(self).__name__} must be set up before it gives data; call setup() first.")
        return self._ready

    def _check_index(self, index: int) -> int:
        """Place of the row that has the number ``index``, if the data set has such a row."""
        self._require_setup()
        known = self._sorted_numbers
        rank = int(torch.searchsorted(known, index)) if isinstance(index, int) else len(known)
        if rank == len(known) or int(known[rank]) != index:
            dropped = next((why for why, numbers in self.left_out().items() if index in numbers), None)
            why = f"row {index} was left out ({dropped})" if dropped else f"got {index}"
            raise IndexError(
                f"index must be the number of a row, in [0, {int(known[-1]) + 1}); {why}. Take it from a batch's "
                "'index'."
            )
        return int(self._order[rank])


def check_at_least(name: str, value: int, minimum: int, maximum: int = LARGEST_SIZE) -> None:
    """Raise a ValueError that names the argument unless ``value`` is an integer in ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}. Pass {minimum} or more.")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}; got {value}. Pass a smaller number.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the argument unless ``value`` is one of the choices."""
    if value not in choices:
        *most, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}; got {value!r}. Choose one of them.")
