"""Which rows of a data set are for training, validation, test and prediction."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddcl_lightning.datamodules._loading import Fetch
from ddcl_lightning.datamodules._origin import Origin

EvaluateOn = Literal["auto", "held_out", "train", "all"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), SPLITS[0]),
    **dict.fromkeys(("validation", "val", "valid", "dev"), SPLITS[1]),
    "test": SPLITS[2],
}


class Loaded(NamedTuple):
    """A whole data set of N rows: the training rows first, then validation, then test rows.

    Attributes:
        fetch: Gives the inputs of some rows, such as ``{"x": (B, F)}``; it must pickle, for worker processes.
        y: Labels, ``(N,)`` int64, -1 where unknown.
        num_val: Rows of the official validation split.
        num_test: Rows of the official test split.
        origin: The file that they come from; None where row and place are the same.
    """

    fetch: Fetch
    y: Tensor
    num_val: int = 0
    num_test: int = 0
    origin: Origin | None = None

    @property
    def numbers(self) -> Tensor:
        """Number of each row, ``(N,)`` int64."""
        return torch.arange(len(self.y)) if self.origin is None else self.origin.numbers


class Splits(NamedTuple):
    """Rows of the whole data set that each loader runs over, int64."""

    train: Tensor
    val: Tensor
    test: Tensor
    predict: Tensor


def partition(
    loaded: Loaded, name: str, *, val_fraction: float, evaluate_on: EvaluateOn, limit: int | None, seed: int
) -> Splits:
    """Rows for each of the loaders.

    Args:
        loaded: The whole data set.
        name: What the data module is called in errors.
        val_fraction: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for the others.
        evaluate_on: Which rows validation and test run over.
        limit: Training rows at most, or None.
        seed: Seed of what is held out and of what the limit takes.

    Raises:
        ValueError: If no row is left to train on, or the fraction holds out none.
    """
    first_test = len(loaded.y) - loaded.num_test
    first_val = first_test - loaded.num_val
    train, val, test = torch.arange(len(loaded.y)).tensor_split([first_val, first_test])
    if not len(train):
        raise ValueError(f"the data set must hold at least one training row; {name} found none. Move rows to it.")
    official = val
    if val_fraction and len(official) and evaluate_on != "held_out":
        rank_zero_warn(
            f"val_fraction={val_fraction} is not used: the data set has a validation split of {len(val)} "
            "rows. Set evaluate_on='held_out' to validate on a part of the training split instead."
        )
    elif val_fraction:
        held_out = stratified_mask(loaded.y[train], val_fraction, seed)
        if not held_out.any():
            raise ValueError(
                f"val_fraction must hold out at least one row; {val_fraction} of each class of {len(train)} "
                "training rows is none. Raise it, or use 0."
            )
        train, val = train[~held_out], train[held_out]
    if limit is not None:
        train = train[stratified_subset(loaded.y[train], limit, seed)]
    everything = torch.unique(torch.cat([train, val, official, test]))
    everything = everything[loaded.numbers[everything].argsort()]
    if evaluate_on == "train":
        return Splits(train, train, train, everything)
    if evaluate_on == "all":
        return Splits(train, everything, everything, everything)
    val = next(rows for rows in (val, test, train) if len(rows))
    test = next(rows for rows in (test, official, val) if len(rows))
    return Splits(train, val, test, everything)


def stratified_mask(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Mark ``fraction`` of each class at random, rounded, and never a whole class; ``(N,)`` bool."""
    generator = np.random.default_rng(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in np.unique(y.numpy()):
        rows = torch.nonzero(y == int(label)).flatten()
        count = min(round(fraction * len(rows)), len(rows) - 1)
        mask[rows[generator.permutation(len(rows))[:count]]] = True
    return mask


def stratified_subset(y: Tensor, size: int, seed: int) -> Tensor:
    """At most ``size`` random rows of ``y`` ``(N,)`` in which each class keeps its share, ascending, int64.

    Each class's rows are spread evenly over (0, 1) in random order, and the first ones are taken: so the subset of a
    smaller size is part of that of a larger one.
    """
    generator = np.random.default_rng(seed)
    place = torch.empty(len(y), dtype=torch.float64)
    for label in np.unique(y.numpy()):
        rows = torch.nonzero(y == int(label)).flatten()
        place[rows] = torch.from_numpy((generator.permutation(len(rows)) + 0.5) / len(rows))
    return place.argsort(stable=True)[:size].sort().values
