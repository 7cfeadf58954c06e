"""A model meets data with other classes than it was trained on: a sentence, never results."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddcl_lightning import (
    Classification,
    Clustering,
    DDCLReadout,
    DDCLReadoutModule,
    Reconstruction,
    SequenceDecoder,
    Task,
)
from ddcl_lightning.explain import collect
from tests.tiny import LinearBackbone, loader, quiet_trainer

ANIMALS = ["cat", "dog", "emu", "fox"]
FRUIT = ["apple", "banana", "cherry", "date"]
REFUSED = r"must have the classes that the model was trained on, 4: 'cat', 'dog', 'emu', 'fox'; got "


class Named(pl.LightningDataModule):
    """Four blobs under names of one's choice, or under none."""

    def __init__(self, names: Any = None, number: Any = None) -> None:
        super().__init__()
        if names is not None:
            self.class_names = names
        if number is not None:
            self.num_classes = number

    def train_dataloader(self) -> "DataLoader[dict[str, torch.Tensor]]":
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def build(task: Task | None = None) -> DDCLReadoutModule:
    return DDCLReadoutModule(LinearBackbone(), DDCLReadout(4), task or Classification(4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("trained") / "animals.ckpt", Named(ANIMALS))


def save(path: Path, data: pl.LightningDataModule, task: Task | None = None) -> Path:
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(build(task), datamodule=data)
    trainer.save_checkpoint(path)
    return path


def modules() -> dict[str, Any]:
    return {"backbone": LinearBackbone(), "head": DDCLReadout(4), "task": Classification(4)}


def run(stage: str, module: DDCLReadoutModule, data: Any, path: Path | None = None) -> None:
    kwargs: dict[str, Any] = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"dataloaders": data}
    getattr(quiet_trainer(), stage)(module, ckpt_path=path, **kwargs)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("by_trainer", [True, False], ids=["ckpt_path", "load_from_checkpoint"])
@pytest.mark.parametrize(
    ("names", "got"),
    [
        (FRUIT, "4: 'apple', 'banana', 'cherry', 'date'"),
        (("dog", "cat", "emu", "fox"), "4: 'dog', 'cat', 'emu', 'fox'"),
        (np.array(ANIMALS[:2]), "2: 'cat', 'dog'"),
        ([*ANIMALS, "gnu"], "5: 'cat', 'dog', 'emu', 'fox', 'gnu'"),
    ],
    ids=["names", "order", "fewer", "more"],
)
def test_other_classes_are_refused(stage: str, by_trainer: bool, names: Any, got: str, checkpoint: Path) -> None:
    module = build() if by_trainer else DDCLReadoutModule.load_from_checkpoint(checkpoint, **modules())
    with pytest.raises(ValueError, match=REFUSED + got + r"\. A label is a place in that list"):
        run(stage, module, Named(names), checkpoint if by_trainer else None)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    "data",
    [Named(ANIMALS), Named(np.array(ANIMALS)), Named(), Named(names=()), Named(number=np.int64(4)), loader()],
    ids=["same", "array", "nothing", "unlabelled", "number", "loader"],
)
def test_the_same_classes_or_none_are_accepted(stage: str, data: Any, checkpoint: Path) -> None:
    run(stage, build(), data, checkpoint)


def test_number_alone_is_compared_where_there_are_no_names(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED + "3"):
        run("test", build(), Named(number=3), checkpoint)
    unnamed = save(tmp_path / "unnamed.ckpt", Named(number=4))
    run("test", build(), Named(FRUIT), unnamed)
    with pytest.raises(ValueError, match=r"was trained on, 4; got 2: 'apple', 'banana'"):
        run("test", build(), Named(FRUIT[:2]), unnamed)


def test_a_difference_beyond_what_is_listed_is_named(tmp_path: Path) -> None:
    names = [f"class {place}" for place in range(40)]
    path = save(tmp_path / "many.ckpt", Named(names), Classification(40))
    with pytest.raises(ValueError, match=r"\(class 30 was 'class 30', and is 'other'\)"):
        run("test", build(Classification(40)), Named([*names[:30], "other", *names[31:]]), path)


def test_a_trained_module_is_held_to_its_own_data_without_a_checkpoint() -> None:
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    module = build()
    trainer.fit(module, datamodule=Named(ANIMALS))
    with pytest.raises(ValueError, match=REFUSED):
        trainer.test(module, datamodule=Named(FRUIT))
    trainer.test(module, dataloaders=loader())  # the trainer still holds the other data module
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module.train(), datamodule=Named(FRUIT))
    with pytest.raises(ValueError, match="was trained on, 4: 'apple'"):
        trainer.test(module, datamodule=Named(ANIMALS))


def test_a_run_goes_on_with_the_classes_that_it_began_with(checkpoint: Path) -> None:
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    with pytest.raises(ValueError, match=REFUSED):
        trainer.fit(build(), datamodule=Named(FRUIT), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("task", "refused"),
    [(Reconstruction(SequenceDecoder(4)), False), (Clustering(), False), (Clustering(4), True)],
    ids=["reconstruction", "clustering", "clustering_with_classes"],
)
def test_a_task_without_classes_compares_nothing(task: Task, refused: bool, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", Named(ANIMALS), task)
    if refused:
        with pytest.raises(ValueError, match=REFUSED):
            run("test", build(task), Named(FRUIT), path)
    else:
        run("test", build(task), Named(FRUIT), path)


@pytest.mark.parametrize("value", [None, {"a": 1}, "cat", -3, [], True], ids=str)
def test_a_checkpoint_that_says_nothing_of_classes_loads(value: Any, checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    assert state.pop("ddcl_class_names") == ANIMALS
    if value is not None:
        state["ddcl_class_names"] = value
    torch.save(state, tmp_path / "old.ckpt")
    run("test", build(), Named(FRUIT), tmp_path / "old.ckpt")


def test_explain_refuses_other_classes(checkpoint: Path) -> None:
    module = DDCLReadoutModule.load_from_checkpoint(checkpoint, **modules())
    collect(module, Named(ANIMALS), inputs=1)
    with pytest.raises(ValueError, match=REFUSED):
        collect(module, Named(FRUIT), inputs=1)
