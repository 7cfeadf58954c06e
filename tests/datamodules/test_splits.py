"""Which rows each loader runs over."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch

from ddcl_lightning.datamodules import Loaded, SplitDataModule
from ddcl_lightning.datamodules._partition import stratified_mask, stratified_subset
from ddcl_lightning.datamodules._tensors import Features
from tests.datamodules.runs import indices

TRAIN, VAL, TEST = range(20), range(20, 26), range(26, 34)


class Toy(SplitDataModule):
    """20 training rows of two classes, and the splits asked for."""

    class_names = ("even", "odd")

    def __init__(self, num_val: int = 0, num_test: int = 0, num_train: int = 20, **options: Any) -> None:
        super().__init__(**{"batch_size": 4, "seed": 0} | options)
        self.sizes = num_train, num_val, num_test

    def load(self) -> Loaded:
        rows = torch.arange(sum(self.sizes))
        return Loaded(Features(rows.unsqueeze(1)), rows % 2, *self.sizes[1:])

    def example(self, index: int) -> str:
        return str(self._check_index(index))


def rows(**options: Any) -> tuple[list[int], list[int], list[int], list[int]]:
    """Rows of the train (sorted), val, test and predict loader."""
    data = Toy(**options)
    data.setup()
    loaders = data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
    val, test, predict = map(indices, loaders)
    return sorted(indices(data.train_dataloader())), val, test, predict


@pytest.mark.parametrize(
    ("options", "val", "test"),
    [
        ({"num_val": 6, "num_test": 8}, VAL, TEST),
        ({"num_val": 6}, VAL, VAL),
        ({"num_test": 8}, range(20, 28), range(20, 28)),
        ({}, TRAIN, TRAIN),
        ({"num_val": 6, "num_test": 8, "evaluate_on": "train"}, TRAIN, TRAIN),
        ({"num_val": 6, "num_test": 8, "evaluate_on": "all"}, range(34), range(34)),
    ],
)
def test_official_splits_are_used_where_the_data_have_them(options: dict[str, Any], val: range, test: range) -> None:
    total = 20 + options.get("num_val", 0) + options.get("num_test", 0)
    assert rows(**options) == ([*TRAIN], [*val], [*test], [*range(total)])


def test_fraction_is_held_out_of_the_training_split() -> None:
    train, val, test, predict = rows(num_test=8, val_fraction=0.2)
    assert len(val) == 4
    assert sum(row % 2 for row in val) == 2
    assert sorted(train + val) == [*TRAIN]
    assert test == [*range(20, 28)]
    assert predict == [*range(28)]
    train, val, test, _ = rows(val_fraction=0.2)
    assert val == test
    assert val != rows(val_fraction=0.2, seed=1)[1]


def test_fraction_beside_an_official_validation_split_is_announced_as_unused() -> None:
    with pytest.warns(UserWarning, match=r"val_fraction=0\.2 is not used: .* validation split of 6 rows"):
        train, val, _, _ = rows(num_val=6, val_fraction=0.2)
    assert (train, val) == ([*TRAIN], [*VAL])


def test_settings_can_be_chosen_beside_an_official_validation_split() -> None:
    options = {"num_val": 6, "val_fraction": 0.2, "evaluate_on": "held_out"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, val, test, predict = rows(**options)
    assert len(val) == 4
    assert sorted(train + val) == [*TRAIN]
    assert test == [*VAL]  # what the final figures are measured on
    assert predict == [*range(26)]
    assert rows(**options, num_test=8)[1:3] == (val, [*TEST])
    with pytest.raises(ValueError, match="val_fraction must be > 0 with evaluate_on='held_out'; got 0"):
        Toy(evaluate_on="held_out")


def test_limit_takes_a_share_of_each_class_and_leaves_evaluation_and_index_alone() -> None:
    train, val, test, predict = rows(num_val=6, num_test=8, limit=6)
    assert len(train) == 6
    assert sum(row % 2 for row in train) == 3
    assert (val, test) == ([*VAL], [*TEST])
    assert predict == [*train, *VAL, *TEST]
    assert train != rows(num_val=6, num_test=8, limit=6, seed=1)[0]
    assert rows(num_val=6, limit=100)[0] == [*TRAIN]
    limited, *evaluated = rows(limit=6)
    assert evaluated == [limited] * 3
    limited, held_out, *_ = rows(limit=6, val_fraction=0.2)
    assert held_out == rows(val_fraction=0.2)[1]
    assert not set(limited) & set(held_out)


def test_evaluation_has_its_own_batch_size() -> None:
    data = Toy(eval_batch_size=10)
    data.setup()
    assert [len(batch["y"]) for batch in data.val_dataloader()] == [10, 10]
    assert [len(batch["y"]) for batch in data.train_dataloader()] == [4] * 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_in_order(num_workers: int) -> None:
    data = Toy(num_test=8, num_workers=num_workers)
    data.setup()
    for place, batch in enumerate(data.predict_dataloader()):
        expected = torch.arange(4 * place, 4 * place + 4)
        assert batch["x"].equal(expected.float().unsqueeze(1))
        assert batch["y"].equal(expected % 2)
        assert batch["index"].equal(expected)
    sample = data.predict_dataloader().dataset[3]
    assert (sample["x"].item(), sample["y"].item(), sample["index"].item()) == (3, 1, 3)


def test_examples_need_setup_and_an_index_of_the_data_set() -> None:
    data = Toy(num_test=8)
    with pytest.raises(RuntimeError, match="Toy must be set up before it gives data; call setup"):
        data.example(0)
    data.setup()
    assert data.example(27) == "27"
    for index in (28, -1):
        with pytest.raises(IndexError, match=rf"number of a row, in \[0, 28\); got {index}"):
            data.example(index)


def test_set_up_loads_once() -> None:
    data = Toy()
    data.setup("fit")
    data.load = None  # type: ignore[method-assign, assignment]
    data.setup("validate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate_on": "val"}, "evaluate_on must be 'auto', 'held_out', 'train' or 'all'; got 'val'"),
        ({"evaluate_on": "train", "val_fraction": 0.1}, "val_fraction must be 0 with evaluate_on='train'; got 0.1"),
        ({"limit": 0}, "limit must be an integer of at least 1; got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer of at least 1; got 0"),
    ],
)
def test_splits_refuse_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Toy(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0, "num_test": 8}, "at least one training row; Toy found none"),
        ({"val_fraction": 0.01}, "val_fraction must hold out at least one row; 0.01 of each class of 20"),
    ],
)
def test_splits_without_rows_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Toy(**options).setup()


def test_split_is_stratified_seeded_and_spares_small_classes() -> None:
    y = torch.tensor([0] * 40 + [1] * 20 + [2])
    mask = stratified_mask(y, 0.25, seed=0)
    assert [int(mask[y == label].sum()) for label in range(3)] == [10, 5, 0]
    assert torch.equal(mask, stratified_mask(y, 0.25, seed=0))
    assert not torch.equal(mask, stratified_mask(y, 0.25, seed=1))
    assert stratified_mask(y, 0.99, seed=0).sum() == 39 + 19
    assert not stratified_mask(y, 0.0, seed=0).any()


def test_subsets_keep_the_shares_and_are_nested() -> None:
    y = torch.tensor([0] * 60 + [1] * 30 + [-1] * 10)
    subsets = [stratified_subset(y, size, seed=0) for size in (10, 50, 100, 1000)]
    assert [len(subset) for subset in subsets] == [10, 50, 100, 100]
    assert [int((y[subsets[1]] == label).sum()) for label in (0, 1, -1)] == [30, 15, 5]
    for smaller, larger in pairwise(subsets):
        assert set(smaller.tolist()) <= set(larger.tolist())
        assert smaller.equal(smaller.sort().values)
    assert not subsets[1].equal(stratified_subset(y, 50, seed=1))


def test_official_validation_without_a_fraction_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(num_val=6)
