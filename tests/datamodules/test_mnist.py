"""MNIST and Fashion-MNIST from files, and without a network."""

import socket
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddcl_lightning.datamodules import FashionMNISTDataModule, MNISTDataModule
from ddcl_lightning.datamodules import _optional as optional
from ddcl_lightning.datamodules.mnist import FILES, read_idx
from tests.datamodules.runs import indices, tiny_mnist, write_idx

torchvision_datasets = pytest.importorskip("torchvision.datasets")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "raw", "FashionMNIST/raw"])
def test_files_are_found_in_every_layout(tmp_path: Path, suffix: str, place: str) -> None:
    tiny_mnist(tmp_path / place, suffix)
    data = FashionMNISTDataModule(tmp_path)
    data.prepare_data()
    data.setup()
    assert data.num_classes == 10
    assert data.class_names[9] == "Ankle boot"
    batch = next(iter(data.train_dataloader()))
    assert batch["x"].shape == (22, 1, 28, 28)
    assert batch["x"].dtype == torch.float32
    assert batch["y"].equal(batch["index"] % 10)
    row = int(batch["index"][0])
    example = data.example(row)
    assert (example.shape, example.dtype) == ((28, 28), np.uint8)
    assert np.array_equal(batch["x"][0, 0].numpy() * 255, example)
    assert indices(data.val_dataloader()) == indices(data.test_dataloader()) == [*range(22, 30)]
    assert next(iter(data.test_dataloader()))["y"].tolist() == [*range(8)]


def test_images_are_those_of_torchvision(tmp_path: Path) -> None:
    tiny_mnist(tmp_path / "MNIST" / "raw", "")
    data = MNISTDataModule(tmp_path, image_size=32)
    data.setup()
    reference = torchvision_datasets.MNIST(str(tmp_path), train=True)
    assert all(np.array_equal(data.example(row), reference.data[row]) for row in range(22))
    assert next(iter(data.val_dataloader()))["x"].shape == (8, 1, 32, 32)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_idx(path, np.zeros((2, 3)))
    assert read_idx(path).shape == (2, 3)
    for data in (path.read_bytes()[:-1], b"", b"\0\0\x08", b"\0\0\x08\x02", b"\0\0\x0d\x01\0\0\0\0"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"idx files must hold unsigned bytes of the size they announce; .*a does"):
            read_idx(path)
    path = tmp_path / "a.gz"
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"idx files must be readable; .*a\.gz is not .* Download it again"):
        read_idx(path)
    tiny_mnist(tmp_path)
    write_idx(tmp_path / f"{FILES[3]}.gz", np.zeros(3))
    with pytest.raises(ValueError, match="the files of MNIST hold 30 images but 25 labels"):
        MNISTDataModule(tmp_path).setup()


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    tiny_mnist(tmp_path)
    (tmp_path / f"{FILES[0]}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"path must lead to {FILES[0]}, .*; got {tmp_path}. Correct it, or"):
        MNISTDataModule(tmp_path).setup()


def test_download_happens_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(root: str, download: bool) -> None:
        calls.append((root, download, socket.getdefaulttimeout()))
        tiny_mnist(Path(root) / "MNIST" / "raw", "")

    monkeypatch.setattr(torchvision_datasets, "MNIST", download)
    data = MNISTDataModule(root=tmp_path)
    data.prepare_data()
    data.prepare_data()
    data.setup()
    assert calls == [(str(tmp_path), True, optional.TIMEOUT_SECONDS)]
    assert socket.getdefaulttimeout() is None
    assert len(indices(data.predict_dataloader())) == 30


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no network"), RuntimeError("Error downloading\nTried one, got:\n<no network>\n")],
)
def test_without_a_network_one_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision_datasets, "FashionMNIST", download)
    data = FashionMNISTDataModule(root=tmp_path)
    with pytest.raises(ConnectionError, match=r"^FashionMNIST is not .* \(<.*no network>\)\. Put train") as caught:
        data.prepare_data()
    assert caught.value.__suppress_context__
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ConnectionError, match=r"FashionMNIST is not on this machine, and nothing was downloaded. Put"):
        data.setup()
    FashionMNISTDataModule(root=tmp_path, download=False).prepare_data()


def test_downloads_go_into_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MNISTDataModule().root == tmp_path / ".cache" / "ddcl_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert MNISTDataModule().root == tmp_path / "elsewhere" / "ddcl_lightning"


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"needs torchvision, .* pip install 'ddcl-lightning\[vision\]'"):
        MNISTDataModule(root=tmp_path).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "mixup"}, "augment must be 'none', 'flip' or 'crop_flip'; got 'mixup'"),
        ({"image_size": 0}, "image_size must be an integer of at least 1; got 0"),
    ],
)
def test_mnist_refuses_augmentations_and_sizes_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**options)
