"""What holds for every data module: importable without extras, constructible from a config, splits that are apart."""

import ast
import inspect
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from registry import classes, make, needed

from ddcl_lightning import SplitDataModule, TensorDataModule, datamodules

CONCRETE = classes(SplitDataModule)
COMMON = ["batch_size", "eval_batch_size", "val_fraction", "evaluate_on", "limit", "seed", "num_workers"]


def test_all_of_them_are_found() -> None:
    """Also one of another package."""
    assert {"DigitsDataModule", "StripedDataModule"} <= {module.__name__ for module in CONCRETE}


@pytest.mark.parametrize("module", CONCRETE, ids=lambda module: module.__name__)
def test_a_config_can_construct_it(module: type[SplitDataModule]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    given = {"batch_size": 3, "eval_batch_size": 7, "limit": 5, "evaluate_on": "train", "seed": 1, "num_workers": 0}
    options = {**given, "val_fraction": 0.0}
    config = {"class_path": f"{module.__module__}.{module.__name__}", "init_args": options | needed(module)}
    data = parser.instantiate(parser.parse_object({"data": config})).data
    assert type(data) is module
    assert {name: getattr(data, name) for name in given} == given
    with pytest.raises((jsonargparse.ArgumentError, ValueError), match="evaluate_on"):
        parser.instantiate(
            parser.parse_object({"data": {**config, "init_args": {**needed(module), "evaluate_on": "x"}}})
        )
    names = [name for name in inspect.signature(module).parameters if name in COMMON]
    assert names == COMMON, "the common arguments, in their order"


WITHOUT_FILES = [module for module in CONCRETE if issubclass(module, TensorDataModule)]


@pytest.mark.parametrize("module", WITHOUT_FILES, ids=lambda module: module.__name__)
def test_splits_batches_and_examples(module: type[TensorDataModule]) -> None:
    data = make(module, batch_size=16, val_fraction=0.25, limit=100, seed=0)
    data.setup()
    assert data.num_classes == len(data.class_names) > 1
    train, validation = (
        [row for batch in loader for row in batch["index"].tolist()]
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(train) == len(set(train)) <= 100
    assert set(train).isdisjoint(validation)
    batch = next(iter(data.train_dataloader()))
    assert batch["x"].shape[0] == batch["y"].shape[0] == 16
    assert batch["x"].is_floating_point()
    assert bool(((batch["y"] >= -1) & (batch["y"] < data.num_classes)).all())
    assert len(data.example(train[0])) > 0
    again = make(module, batch_size=16, val_fraction=0.25, limit=100, seed=0)
    again.setup()
    assert [row for batch in again.train_dataloader() for row in batch["index"].tolist()] == train
    samples = [next(iter(each.val_dataloader()))["x"] for each in (data, again)]
    assert torch.equal(*samples), "tensors() gives other values at every call"
    other = make(module, batch_size=16, val_fraction=0.25, limit=100, seed=1)
    other.setup()
    assert [row for batch in other.val_dataloader() for row in batch["index"].tolist()] != validation


@pytest.mark.parametrize("file", sorted(Path(datamodules.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_importing_needs_no_extra(file: Path) -> None:
    # By its source: Lightning imports some of them by itself where they are installed.
    optional = {"torchvision", "datasets", "huggingface_hub", "pyarrow", "PIL"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not optional & {name.partition(".")[0] for name in names}
