"""Loaders over tensors in memory, whose training order survives a restart in the middle of an epoch.

Lightning restores the number of batches seen, not the place in the data: without more, a run resumed in the
middle of an epoch sees its first batches again. It does restore loaders that have ``state_dict`` and
``load_state_dict``.
"""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ddcl_lightning.seeding import resolve_seed

Batch = dict[str, Tensor]


class LabelledTensors(Dataset[Batch]):
    """Rows of a feature matrix with their labels.

    Args:
        x: Features, ``(N, F)`` float32.
        y: Labels, ``(N,)`` int64.
        index: Place of each row in the full data set, ``(N,)`` int64.
    """

    def __init__(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        self.x = x
        self.y = y
        self.index = index

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Batch:
        return {"x": self.x[row], "y": self.y[row], "index": self.index[row]}


class EpochSampler(DistributedSampler[int]):
    """Shuffled order that depends on the seed and the epoch alone, split over processes.

    A :class:`~torch.utils.data.DistributedSampler`, so that Lightning sets the epoch and does not replace it.

    Args:
        dataset: Data set to sample from.
        num_replicas: Number of processes.
        rank: This process, in [0, num_replicas).
        seed: Seed of the order, the same in all processes.

    Attributes:
        start: Rows of this process to leave out at the beginning of the next pass.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


class ResumableDataLoader(DataLoader[Batch]):
    """Data loader that continues where its ``state_dict`` was taken, without loading the batches before.

    Its state is the epoch and the number of batches handed out, so batches that workers have fetched ahead do
    not count. ``len()`` stays that of a full epoch, which is how Lightning finds the end of a resumed one.
    Takes the arguments of :class:`~torch.utils.data.DataLoader`; resumes if ``sampler`` is an
    :class:`EpochSampler`.
    """

    # On the class: Lightning may rebuild a loader from the arguments of DataLoader alone.
    _progress = (0, 0)  # epoch, batches handed out in that epoch
    _resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Place in the data, as plain numbers."""
        epoch, batches = self._progress
        return {"epoch": epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict`` in the next pass, if that pass runs over the same epoch."""
        self._resume = state_dict
        self._progress = (state_dict["epoch"], state_dict["batches"])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator on purpose: nothing below runs before the first batch is asked for. On a restart
        # Lightning calls iter() before it sets the epoch, when workers would already fetch in the order of
        # epoch 0.
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Trainer(overfit_batches=...) puts another in its place
            yield from super().__iter__()
            return
        first = self._take_first_batch(sampler.epoch)
        sampler.start = first * (self.batch_size or 1)
        for batches, batch in enumerate(super().__iter__(), start=first + 1):
            self._progress = (sampler.epoch, batches)
            yield batch

    def _take_first_batch(self, epoch: int) -> int:
        state, self._resume = self._resume, None
        # The state of a finished epoch says nothing about the next one.
        if state is None or state["epoch"] != epoch:
            return 0
        if state["order"] != self._order():
            raise ValueError(
                "a run resumed in the middle of an epoch must keep the number of rows, batch_size, number of "
                f"processes and seed; the checkpoint has {state['order']}, this run {self._order()}. Restore "
                "them, or resume from a checkpoint saved at the end of an epoch."
            )
        return int(state["batches"])

    def _order(self) -> dict[str, int | None]:
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            return {}
        rows = len(sampler.dataset)  # type: ignore[arg-type]
        processes, seed = sampler.num_replicas, sampler.seed
        return {"rows": rows, "batch_size": self.batch_size, "processes": processes, "seed": seed}


class TensorDataModule(pl.LightningDataModule):
    """Data module of a data set that fits in memory: variants load it, this class does the rest.

    With ``val_fraction=0`` training, validation and test all run over the whole data set, the protocol of
    deep clustering, where labels take no part in training. Otherwise a stratified part is held out for
    validation and test. Prediction always runs over the whole data set, in its order. Batches are dicts of
    ``x`` ``(B, F)`` float32, ``y`` ``(B,)`` int64 and ``index`` ``(B,)`` int64, the place of the row in the
    whole data set.

    Several processes share each epoch; where the rows do not divide evenly, a few are repeated, in training
    by :class:`EpochSampler` and in validation by Lightning.

    Args:
        batch_size: Rows per batch and process, at least 1.
        val_fraction: Part of each class that is held out, in [0, 1).
        seed: Seed of the split and of the training order; None takes that of ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for tensors in memory.

    Attributes:
        num_features: Number of features F.
        num_classes: Number of classes.
        feature_names: F names.
        class_names: Name of each class, in the order of the labels.

    Raises:
        ValueError: If an argument is out of its range.
    """

    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]

    def __init__(self, batch_size: int, val_fraction: float, seed: int | None, num_workers: int) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"val_fraction must be in [0, 1); got {val_fraction}. Use 0 to validate on the training set."
            )
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = resolve_seed(seed)
        self.num_workers = num_workers
        self._data: LabelledTensors | None = None
        self._train_rows = self._held_out_rows = torch.empty(0, dtype=torch.int64)

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return len(self.feature_names)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """Features ``(N, F)`` and labels ``(N,)`` int64 of the whole data set."""

    def transform(self, x: Tensor, train_rows: Tensor) -> Tensor:
        """Scale features ``(N, F)`` by statistics of the training rows; the identity unless overridden."""
        return x

    def setup(self, stage: str | None = None) -> None:
        """Load, split and scale the data, once."""
        if self._data is not None:
            return
        x, y = self.load()
        rows = torch.arange(len(y))
        held_out = stratified_mask(y, self.val_fraction, self.seed)
        self._train_rows = rows[~held_out]
        self._held_out_rows = rows[held_out] if self.val_fraction else rows
        self._data = LabelledTensors(self.transform(x, self._train_rows).float(), y, rows)

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled training rows; resumes in the middle of an epoch."""
        dataset = self._subset(self._train_rows)
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, num_replicas=processes, rank=rank, seed=self.seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Held-out rows in order, all rows if ``val_fraction`` is 0."""
        return self._in_order(self._held_out_rows)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The same rows as for validation."""
        return self._in_order(self._held_out_rows)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """All rows in order."""
        return self._in_order(torch.arange(len(self._require_data())))

    def _in_order(self, rows: Tensor) -> DataLoader[Batch]:
        return DataLoader(self._subset(rows), batch_size=self.batch_size, num_workers=self.num_workers)

    def _subset(self, rows: Tensor) -> LabelledTensors:
        data = self._require_data()
        return LabelledTensors(data.x[rows], data.y[rows], data.index[rows])

    def _require_data(self) -> LabelledTensors:
        if self._data is None:
            raise RuntimeError(f"{type(self).__name__} must be set up before it gives loaders; call setup() first.")
        return self._data


def stratified_mask(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Mark ``fraction`` of each class at random, rounded, and never a whole class; ``(N,)`` bool."""
    generator = np.random.default_rng(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in np.unique(y.numpy()):
        rows = torch.nonzero(y == int(label)).flatten()
        count = min(round(fraction * len(rows)), len(rows) - 1)
        mask[rows[generator.permutation(len(rows))[:count]]] = True
    return mask


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Raise a ValueError that names the argument unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}. Pass {minimum} or more.")
