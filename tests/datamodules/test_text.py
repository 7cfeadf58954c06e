"""Texts of a user's files: columns, splits, labels, and a run resumed in the middle of an epoch."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ddcl_lightning._utils.batch import index, labels, size, texts
from ddcl_lightning.datamodules import TextDataModule
from tests.datamodules.runs import indices, run, same
from tests.processes import succeed_in_processes

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


def save(path: Path, **columns: list[Any]) -> Path:
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def ready(path: Path, **options: Any) -> TextDataModule:
    data = TextDataModule(path, **options)
    data.setup()
    return data


@pytest.fixture
def split_file(tmp_path: Path) -> Path:
    return save(
        tmp_path / "all.csv",
        text=["t1", "v1", "r1", "r2", "t2", "v2", "r3", "r4"],
        label=["ham", "ham", "spam", "ham", "spam", "", "spam", "ham"],
        split=["test", "dev", "train", "Training", "TEST", "validation", "train", "train "],
    )


def test_batches_follow_the_convention(split_file: Path) -> None:
    data = ready(split_file, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert list(batch) == ["text", "y", "index"]
    assert size(batch) == 3
    assert texts(batch) == [data.example(row) for row in batch["index"].tolist()]
    y, position = labels(batch), index(batch)
    assert y is not None
    assert position is not None
    assert y.dtype == position.dtype == torch.int64
    assert data.val_dataloader().dataset[1] == {"text": "v2", "y": torch.tensor(-1), "index": torch.tensor(5)}


def test_column_of_splits_orders_the_data_set(split_file: Path) -> None:
    data = ready(split_file)
    assert (data.class_names, data.num_classes) == (("ham", "spam"), 2)
    (batch,) = data.predict_dataloader()
    assert batch["text"] == ["t1", "v1", "r1", "r2", "t2", "v2", "r3", "r4"]
    assert batch["y"].tolist() == [0, 0, 1, 0, 1, -1, 1, 0]
    assert indices(data.val_dataloader()) == [1, 5]
    assert indices(data.test_dataloader()) == [0, 4]


def test_splits_may_be_ignored_or_elsewhere(split_file: Path, tmp_path: Path) -> None:
    data = ready(split_file, split=None)
    assert indices(data.val_dataloader()) == [*range(8)]
    renamed = tmp_path / "renamed.csv"
    pd.read_csv(split_file, keep_default_na=False).rename(columns={"split": "part"}).to_csv(renamed, index=False)
    assert len(indices(ready(renamed).val_dataloader())) == 8
    assert indices(ready(renamed, split="part").val_dataloader()) == [1, 5]
    with pytest.raises(
        ValueError, match=r"column 'label' of .*all.csv must hold train, validation .* got 'ham'. Name another column"
    ):
        ready(split_file, split="label")


def test_files_of_splits_share_their_classes(tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", sentence=["a", "b"], target=["yes", "no"], split=["test", "?"])
    val = save(tmp_path / "val.csv", sentence=["c"], target=["yes"])
    test = save(tmp_path / "test.csv", target=["no"], sentence=["d"])
    columns = {"text": "sentence", "label": "target"}
    data = ready(train, val_path=val, test_path=test, **columns)
    (batch,) = data.predict_dataloader()
    assert batch["text"] == ["a", "b", "c", "d"]
    assert batch["y"].tolist() == [1, 0, 1, 0]
    assert (indices(data.val_dataloader()), indices(data.test_dataloader())) == ([2], [3])
    data = ready(train, test_path=test, **columns)
    assert (indices(data.val_dataloader()), indices(data.test_dataloader())) == ([2], [2])
    save(test, sentence=["d"], target=["maybe"])
    with pytest.raises(ValueError, match="only validation or test rows have maybe"):
        ready(train, test_path=test, **columns)


def test_texts_without_labels_have_no_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", text=["a", "b"])
    data = ready(path, label=None)
    assert data.class_names == ()
    assert data.num_classes == 0
    (batch,) = data.predict_dataloader()
    assert batch["y"].tolist() == [-1, -1]
    with pytest.raises(ValueError, match=r"which has text; got 'label'\. Pass label=None for unlabelled texts"):
        ready(path)


def test_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", text=["a", "", " \n\t", "b"], label=[0, 1, 1, 1])
    with pytest.warns(UserWarning, match=r"TextDataModule left out 2 of 4 texts, .* drop_empty=False keeps them"):
        data = ready(path)
    (batch,) = data.predict_dataloader()
    assert (batch["text"], batch["y"].tolist(), batch["index"].tolist()) == (["a", "b"], [0, 1], [0, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(indices(ready(path, drop_empty=False).predict_dataloader())) == 4


def test_unusable_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        ready(tmp_path / "a.csv")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": 3, "label": 0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts must be strings; row 2 of .*a.jsonl has 3 as 'text'. Correct or"):
        ready(path)
    path = save(tmp_path / "a.csv", text=[" "], label=[0])
    with pytest.raises(ValueError, match=r"texts must hold more than white space; .*a.csv has nothing else as 'text'"):
        ready(path)
    path = save(tmp_path / "b.csv", text=["a"], label=[0], split=["test"])
    with pytest.raises(ValueError, match="at least one training row"):
        ready(path)
    with pytest.raises(RuntimeError, match="must be set up before it knows its classes"):
        _ = TextDataModule(path).num_classes


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    return save(tmp_path / "long.csv", text=[f"text {row}" for row in range(22)], label=[row % 2 for row in range(22)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_the_middle_of_an_epoch_repeats_the_run(long_file: Path, tmp_path: Path, num_workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 6, "seed": 1, "num_workers": num_workers}
    whole = run(TextDataModule(long_file, **options), tmp_path / "saved").train
    first, second = ([text for batch in whole[start : start + 4] for text in batch["text"]] for start in (0, 4))
    assert sorted(first) == sorted(second)
    assert first != second
    for step in (1, 4, 6) if num_workers else range(1, 8):
        resumed = run(TextDataModule(long_file, **options), resume=tmp_path / "saved" / f"step={step}.ckpt").train
        assert same(resumed, whole[step:]), f"after step {step}"


@pytest.mark.slow
def test_two_processes_share_training_and_validation(long_file: Path, tmp_path: Path) -> None:
    data = TextDataModule(long_file, batch_size=3, val_fraction=0.3)
    settings = {"strategy": "ddp", "devices": 2, "limit_val_batches": 1.0, "max_epochs": 1}
    succeed_in_processes(tmp_path, partial(run, data, record=tmp_path, **settings))
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    texts = {
        split: [text for rank in by_rank for batch in rank[split] for text in batch["text"]]
        for split in ("train", "val")
    }
    assert len(texts["train"]) == 16
    assert len(texts["val"]) == 6
    assert sorted(texts["train"] + texts["val"]) == sorted(f"text {row}" for row in range(22))


@pytest.mark.shared_data
def test_real_file_by_its_columns(shared_file: Callable[[str], Path]) -> None:
    path = shared_file("20newsgroups_bydate_stripped.jsonl.gz")
    with pytest.warns(UserWarning, match="left out 515 of 18846 texts"):
        data = ready(path, label="group", limit=100)
    assert data.num_classes == 20
    assert data.class_names[0] == "alt.atheism"
    assert len(indices(data.train_dataloader())) == 100
    assert len(data.test_dataloader().dataset) == 7317  # type: ignore[arg-type]
