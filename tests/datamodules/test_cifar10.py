"""CIFAR-10 from an .npz file of JPEG images and from torchvision's folder."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddcl_lightning.datamodules import CIFAR10DataModule
from ddcl_lightning.datamodules._images import ImageFetch, JpegStore
from tests.datamodules.runs import indices

torchvision_datasets = pytest.importorskip("torchvision.datasets")


def write(path: Path, **changes: Any) -> Path:
    """Twelve grey training images, their level ten times their place, and four test images."""
    arrays: dict[str, Any] = {"classes": np.array(CIFAR10DataModule.class_names)}
    for split, levels in (("train", range(0, 120, 10)), ("test", range(120, 160, 10))):
        files = []
        for level in levels:
            buffer = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        arrays[f"jpeg_{split}"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"offset_{split}"] = np.cumsum([0, *map(len, files)])
        arrays[f"y_{split}"] = (np.array(levels) // 10 % 10).astype(np.uint8)
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **arrays)
    return path


def decoded(data: CIFAR10DataModule) -> int:
    fetch = data._require_setup()[0].fetch
    assert isinstance(fetch, ImageFetch)
    assert isinstance(fetch.store, JpegStore)
    return int(fetch.store.decoded.sum())


def test_npz_is_decoded_as_far_as_it_is_used(tmp_path: Path) -> None:
    data = CIFAR10DataModule(write(tmp_path / "a.npz"), limit=5, val_fraction=0.0)
    data.prepare_data()
    data.setup()
    assert decoded(data) == 0
    (batch,) = data.train_dataloader()
    assert batch["x"].shape == (5, 3, 32, 32)
    assert batch["y"].equal(batch["index"] % 10)
    levels = batch["x"].mean((1, 2, 3)) * 255
    torch.testing.assert_close(levels, batch["index"] * 10.0, atol=1.5, rtol=0)
    assert decoded(data) == 5
    assert indices(data.val_dataloader()) == indices(data.test_dataloader()) == [12, 13, 14, 15]
    assert data.example(15).shape == (32, 32, 3)
    assert abs(int(data.example(15).mean()) - 150) <= 1
    assert data.example(15).dtype == np.uint8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"path must be an \.npz file with jpeg_train, .*; .*a\.npz is not .*y_test"),
        ({"classes": np.array(["cat"])}, r"classes of .*a\.npz must be airplane, .* truck; got cat"),
        ({"y_train": np.zeros(3, np.uint8)}, r"offset_train of .*a\.npz does not fit to y_train and jpeg_train"),
        ({"jpeg_test": np.zeros(3, np.uint8)}, r"offset_test of .*a\.npz does not fit"),
    ],
)
def test_broken_npz_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(write(tmp_path / "a.npz", **changes)).setup()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("text")
    with pytest.raises(
        ValueError, match=r"path must be an \.npz file .* \(it is a file of another kind under that name\)"
    ):
        CIFAR10DataModule(path).setup()
    with pytest.raises(FileNotFoundError, match=r"path must lead to the folder cifar-10-batches-py or an \.npz file"):
        CIFAR10DataModule(tmp_path).setup()
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is incomplete or damaged. Remove it and download"):
        CIFAR10DataModule(tmp_path).setup()
    with pytest.raises(ConnectionError, match=r"CIFAR10 is not on this machine, and nothing was downloaded. Put the"):
        CIFAR10DataModule(root=tmp_path / "elsewhere").setup()


@pytest.mark.parametrize("given", ["", "cifar-10-batches-py"])
def test_folder_is_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    class Fake:
        def __init__(self, root: str, train: bool) -> None:
            assert root == str(tmp_path)
            self.targets = [1, 2, 1] if train else [1]
            self.data = np.full((len(self.targets), 32, 32, 3), (10, 20, 30) if train else 200, np.uint8)

    monkeypatch.setattr(torchvision_datasets, "CIFAR10", Fake)
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = CIFAR10DataModule(tmp_path / given)
    data.prepare_data()
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch["y"].tolist() == [1, 2, 1, 1]
    assert (batch["x"][0].mean((1, 2)) * 255).round().tolist() == [10, 20, 30]
    assert (data.example(3) == 200).all()


@pytest.mark.shared_data
def test_the_real_npz_gives_balanced_batches(shared_file: Callable[[str], Path]) -> None:
    data = CIFAR10DataModule(shared_file("cifar10_jpeg_full_60k.npz"), limit=200, augment="crop_flip")
    data.setup()
    batches = [*data.train_dataloader()]
    assert sum(len(batch["y"]) for batch in batches) == 200
    assert torch.cat([batch["y"] for batch in batches]).bincount().tolist() == [20] * 10
    assert decoded(data) == 200
    assert len(data.test_dataloader().dataset) == 10_000  # type: ignore[arg-type]
    assert data.example(59_999).shape == (32, 32, 3)
