"""Loaders over rows in memory, whose training order survives a restart in the middle of an epoch.

Lightning restores the number of batches seen, not the place in the data: without more, a run resumed in the
middle of an epoch sees its first batches again. It does restore loaders that have ``state_dict`` and
``load_state_dict``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = dict[str, Any]
Fetch = Callable[[Tensor], Batch]  # rows (B,) of the whole data set -> their inputs
Augment = Callable[[Batch, Tensor], Batch]  # a batch and the epoch of each row (B,)

GROUPED_BATCHES = 50  # wide enough for little padding, narrow enough that batches differ from epoch to epoch


class Rows(Dataset[Batch]):
    """Some rows of a data set, fetched a whole batch at a time; loaders take :func:`as_is` to collate it.

    The number of a row counts on through the epochs, ``epoch * len(self) + place``: the random augmentation of a
    training row is then a function of this number alone, in any worker process and after any restart.

    Args:
        fetch: Gives the inputs of rows of the whole data set.
        y: Labels of the whole data set, ``(N,)`` int64.
        rows: The rows that belong to this part, ``(M,)`` int64.
        augment: Random augmentation of a batch, or None.
        numbers: Number of each row of the whole data set, ``(N,)`` int64; by default its place.
    """

    def __init__(
        self, fetch: Fetch, y: Tensor, rows: Tensor, augment: Augment | None = None, numbers: Tensor | None = None
    ) -> None:
        self.fetch = fetch
        self.y = y
        self.rows = rows
        self.augment = augment
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Batch:
        return {key: values[0] for key, values in self.__getitems__([number]).items()}

    def __getitems__(self, numbers: list[int]) -> Batch:
        counted = torch.tensor(numbers)
        index = self.rows[counted % len(self)]
        number = index if self.numbers is None else self.numbers[index]
        batch = {**self.fetch(index), "y": self.y[index], "index": number}
        return batch if self.augment is None else self.augment(batch, counted // len(self))


def as_is(batch: Any) -> Batch:
    """Collate function for :class:`Rows`, whose items are batches already."""
    return dict(batch)


class EpochSampler(DistributedSampler[int]):
    """Shuffled order that depends on the seed and the epoch alone, split over processes.

    A :class:`~torch.utils.data.DistributedSampler`, so that Lightning sets the epoch and does not replace it.
    Gives the numbers that :class:`Rows` takes, and places in any other data set.

    Every process gets its share of each batch of the joint order, so that several processes see together what one
    sees with batches as large as theirs together. Each row comes once; where the last joint batch has fewer rows than
    there are processes, some of them are repeated, since every process has to take the step.

    Given lengths, it puts rows of similar length into one batch, for less padding: each stretch of
    ``GROUPED_BATCHES`` batches of the shuffled order is sorted by length and cut into batches, and all batches of
    the epoch are shuffled again, alike on every process. Rows that do not fill a batch come last, as they were drawn.

    Args:
        dataset: Data set to sample from, of known length.
        num_replicas: Number of processes.
        rank: This process, in [0, num_replicas).
        seed: Seed of the order, the same in all processes.
        batch_size: Rows per batch and process, at least 1.
        lengths: Length of each row, ``(N,)``; None groups nothing.

    Attributes:
        start: Rows of this process to leave out at the beginning of the next pass.

    Raises:
        ValueError: If there is not one length per row.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int,
        rank: int,
        seed: int,
        batch_size: int = 1,
        lengths: Tensor | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.start = 0
        self.num_rows = len(dataset)  # type: ignore[arg-type]
        self.num_samples = len(deal(torch.arange(self.num_rows), batch_size, num_replicas, rank))
        if lengths is not None and lengths.shape != (self.num_rows,):
            raise ValueError(
                f"lengths must hold one length per row, shape ({self.num_rows},); got {tuple(lengths.shape)}. "
                "Pass the lengths of this part of the data."
            )
        self.batch_size, self.lengths = batch_size, lengths

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        if self.lengths is not None:
            order = self._grouped(order, self.lengths)
        order = deal(order, self.batch_size, self.num_replicas, self.rank)
        if isinstance(self.dataset, Rows):
            order += self.epoch * self.num_rows
        return iter(order[self.start :].tolist())

    def _grouped(self, order: Tensor, lengths: Tensor) -> Tensor:
        """Rows ``(N,)`` in joint batches of similar length."""
        size = self.batch_size * self.num_replicas
        whole = len(order) - len(order) % size
        pools = torch.split(order[:whole], size * GROUPED_BATCHES)
        ordered = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
        batches = torch.cat([*ordered, order[:0]]).view(-1, size)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = batches[torch.randperm(len(batches), generator=generator)]
        return torch.cat([shuffled.flatten(), order[whole:]])


def deal(order: Tensor, batch_size: int, processes: int, rank: int) -> Tensor:
    """The part of one process of rows ``(N,)`` in order: every ``processes``-th of each joint batch.

    All processes get the same number of batches. Their last one may be smaller by a row; it repeats a row where there
    are fewer than processes.
    """
    own = order[rank::processes]
    last = len(order) % (batch_size * processes)
    if rank >= last > 0:
        own = torch.cat([own, order[len(order) - last + rank % last][None]])
    return own


class InOrderSampler(DistributedSampler[int]):
    """Rows in order, each once, split over processes as :class:`EpochSampler` does: for evaluation.

    Args:
        dataset: Data set to sample from, of known length.
        batch_size: Rows per batch and process.
        num_replicas: Number of processes.
        rank: This process, in [0, num_replicas).
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self._order = deal(torch.arange(len(dataset)), batch_size, num_replicas, rank)  # type: ignore[arg-type]
        self.num_samples = len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.tolist())


def even_batch_size(rows: int, batch_size: int, processes: int) -> int:
    """Largest batch size up to ``batch_size`` at which all processes have equally many batches and no row repeats.

    It is ``batch_size`` if there is no such size (fewer rows than processes, or batches of a row or two).
    """
    for size in range(batch_size, 0, -1):
        if not 0 < rows % (size * processes) < processes:
            return size
    return batch_size


class ResumableDataLoader(DataLoader[Batch]):
    """Data loader that continues where its ``state_dict`` was taken, without loading the batches before.

    Its state is the epoch and the number of batches returned, so that batches which workers have fetched ahead do
    not count. ``len()`` stays that of a full epoch, which is how Lightning finds the end of a resumed one.
    Takes the arguments of :class:`~torch.utils.data.DataLoader`; resumes if ``sampler`` is an
    :class:`EpochSampler`.
    """

    # On the class: Lightning may rebuild a loader from the arguments of DataLoader alone.
    _progress = (0, 0)  # epoch, batches returned in that epoch
    _resume: dict[str, Any] | None = None
    _own_generator = False

    def state_dict(self) -> dict[str, Any]:
        """Place in the data, as plain numbers."""
        epoch, batches = self._progress
        return {"epoch": epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict`` in the next pass, if that pass runs over the same epoch."""
        self._resume = state_dict
        self._progress = (state_dict["epoch"], state_dict["batches"])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator on purpose: nothing below runs before the first batch is needed. On a restart
        # Lightning calls iter() before it sets the epoch, when workers would already fetch in the order of
        # epoch 0.
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Trainer(overfit_batches=...) uses another one
            yield from super().__iter__()
            return
        first = self._take_first_batch(sampler.epoch)
        sampler.start = first * (self.batch_size or 1)
        if self.generator is None or self._own_generator:
            # Beginning a pass draws the workers' seed. From the global generator, a resumed run would draw once more.
            self.generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
            self._own_generator = True
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
        processes, seed = sampler.num_replicas, sampler.seed
        return {"rows": sampler.num_rows, "batch_size": self.batch_size, "processes": processes, "seed": seed}
