"""Data that need not fit in memory: what is held while they are read, and that it is what is in the file."""

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddcl_lightning.datamodules import FeaturesDataModule, ImageFolderDataModule, TextDataModule, _images, _storage
from ddcl_lightning.datamodules._parquet import ParquetColumn

MIB = 2**20
POOLS: list[Any] = []  # kept, for what was allocated in them is given back to them


def grown(action: Callable[[], Any]) -> int:
    """Most bytes that Python, NumPy and pyarrow held at once during an action, beyond those before."""
    arrow = pytest.importorskip("pyarrow")
    before, pool = arrow.default_memory_pool(), arrow.proxy_memory_pool(arrow.default_memory_pool())
    POOLS.append(pool)
    arrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        arrow.set_memory_pool(before)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a MiB be large."""
    monkeypatch.setattr(_storage, "KEPT_BYTES", MIB)
    monkeypatch.setattr(_storage, "CHUNK_BYTES", MIB // 4)
    monkeypatch.setattr(_images, "KEPT_BYTES", MIB // 16)


def parquet_file(path: Path, **columns: Any) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, row_group_size=5000)
    return path


def one_epoch(data: Any) -> int:
    data.setup()
    data.describe_rows(range(0, 2000, 20), [name for name in data.row_names if name not in ("label", "split")])
    return sum(len(batch["index"]) for batch in data.train_dataloader())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["npy", "lists", "columns"])
def test_vectors_are_read_in_pieces(form: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    x = np.random.default_rng(0).normal(size=(40_000, 256)).astype(np.float32)  # 40 MiB
    if form == "npy":
        np.save(tmp_path / "x.npy", x)
        path = tmp_path / "x.npy"
    elif form == "lists":
        lists = arrow.FixedSizeListArray.from_arrays(arrow.array(x.ravel()), 256)
        path = parquet_file(tmp_path / "x.parquet", key=[f"k{row}" for row in range(40_000)], vector=lists)
    else:
        path = parquet_file(tmp_path / "x.parquet", **{f"f{column}": x[:, column] for column in range(256)})
    data = FeaturesDataModule(path, standardize=form == "columns", seed=0)
    num_bytes = x.nbytes
    assert grown(lambda: one_epoch(data)) < num_bytes / 4
    batch = next(iter(data.train_dataloader()))
    expected = x[batch["index"].numpy()]
    if form == "columns":
        expected = (expected - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(batch["x"].numpy(), expected, rtol=1e-3, atol=1e-4)
    if form == "lists":
        assert data.describe_rows([17, 3], ["key"]) == {"key": ["k17", "k3"]}
        copied = pickle.loads(pickle.dumps(data.train_dataloader().dataset))
        assert torch.equal(copied[5]["x"], data.train_dataloader().dataset[5]["x"])


@pytest.mark.usefixtures("small")
def test_texts_are_read_in_pieces(tmp_path: Path) -> None:
    texts = [f"text {row} " + "é" * 2000 for row in range(20_000)]  # 80 MB as UTF-8, more as Python's
    splits = ["test" if row % 10 == 0 else "train" for row in range(20_000)]
    path = parquet_file(tmp_path / "x.parquet", body=texts, key=list(range(20_000)), split=splits)
    texts[7] = ""
    num_bytes = sum(len(text.encode()) for text in texts)
    data = TextDataModule(path, label=None, seed=0, id="key")
    assert grown(lambda: one_epoch(data)) < num_bytes / 4
    for loader in (data.train_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert [text.split()[1] for text in batch["text"]] == [str(row) for row in batch["index"].tolist()]
    assert len(data.test_dataloader().dataset) == 2000
    assert data.example(12).startswith("text 12 é")
    assert data.describe_rows([40, 41], ["key", "split"]) == {"key": [40, 41], "split": ["test", "train"]}
    dataset = data.predict_dataloader().dataset
    assert pickle.loads(pickle.dumps(dataset))[3]["text"] == dataset[3]["text"]


@pytest.mark.usefixtures("small")
def test_images_are_decoded_a_batch_at_a_time(tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (500, 400), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")  # 0.6 MB each
    data = ImageFolderDataModule(tmp_path, image_size=64, batch_size=4, seed=0)
    data.setup()
    assert grown(lambda: [batch["index"] for batch in data.train_dataloader()]) < 40 * 500 * 400 * 3 / 5
    batch = next(iter(data.predict_dataloader()))
    assert (batch["x"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3]


def test_temporary_files_go_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_storage, "KEPT_BYTES", 10)
    monkeypatch.setattr(_storage.tempfile, "tempdir", str(tmp_path))
    texts = _storage.store_texts(["one", "two", "three", "", "five", "sixteen"], "the texts")
    vectors = _storage.store_vectors(iter([np.ones((2, 3)), np.zeros((1, 3))]), (3, 3), "the vectors")  # type: ignore[list-item]
    assert list(texts) == ["one", "two", "three", "", "five", "sixteen"]
    assert texts[-1] == "sixteen"
    assert texts[1:3] == ["two", "three"]
    assert vectors.rows(slice(0, 3)).sum() == 6
    assert len(list(tmp_path.iterdir())) == 2
    del texts, vectors
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_storage, "KEPT_BYTES", 10)
    monkeypatch.setattr(_storage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 20}))
    with pytest.raises(ValueError, match=r"the vectors must fit into .* GiB are free\. Set TMPDIR to a larger disk"):
        _storage.store_vectors(iter([np.ones((3, 3))]), (3, 3), "the vectors")  # type: ignore[list-item]


def test_cells_of_a_column_come_in_any_order(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", a=list(range(12_000)))
    column = ParquetColumn(path, "a")
    assert len(column) == 12_000
    places = [0, 1, 4999, 5000, 11_999, 3, 2, 7000, -1, 6999]
    assert [column[place] for place in places] == [place % 12_000 for place in places]
    assert column[5:8] == [5, 6, 7]
    assert list(column) == list(range(12_000))
    assert pickle.loads(pickle.dumps(column))[9] == 9
