"""A user's folders of images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddcl_lightning.datamodules import ImageFolderDataModule
from tests.datamodules.runs import indices

torchvision_datasets = pytest.importorskip("torchvision.datasets")


def fill(folder: Path, **counts: int) -> Path:
    """Images of class folders, whose grey level is 20 times their place in the class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for place in range(count):
            image = Image.fromarray(np.full((12, 16, 3), 20 * place, np.uint8))
            image.save(folder / name / f"{place}.{'png' if place % 2 else 'jpg'}")
    return folder


def ready(path: Path, **options: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(path, **{"image_size": 8} | options)
    data.setup()
    return data


def test_classes_are_folders_in_the_order_of_torchvision(tmp_path: Path) -> None:
    fill(tmp_path, dog=3, cat=2)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    fill(tmp_path / ".thumbnails", cat=1)
    data = ready(tmp_path)
    assert data.class_names == ("cat", "dog")
    (batch,) = data.predict_dataloader()
    assert batch["x"].shape == (5, 3, 8, 8)
    assert batch["y"].tolist() == [0, 0, 1, 1, 1]
    assert (batch["x"].mean((1, 2, 3)) * 255 / 20).round().tolist() == [0, 1, 0, 1, 2]
    assert data.example(4).shape == (8, 8, 3)
    assert (data.example(3) == 20).all()
    assert indices(data.val_dataloader()) == [*range(5)]
    assert len(indices(ready(tmp_path, limit=3, num_workers=2).train_dataloader())) == 3


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    """Those of macOS look like images and are none; those of Jupyter are images a second time."""
    folder = fill(tmp_path / ".data", cat=2) / "cat"
    (folder / "._0.jpg").write_bytes(b"Mac OS X")
    fill(folder, **{".ipynb_checkpoints": 2})
    (batch,) = ready(tmp_path / ".data").predict_dataloader()
    assert batch["y"].tolist() == [0, 0]


def test_folders_of_splits(tmp_path: Path) -> None:
    fill(tmp_path / "train", cat=2, dog=2)
    fill(tmp_path / "valid", dog=1)
    fill(tmp_path / "test", dog=2, cat=1)
    data = ready(tmp_path)
    (batch,) = data.predict_dataloader()
    assert batch["y"].tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert (indices(data.val_dataloader()), indices(data.test_dataloader())) == ([4], [5, 6, 7])


def test_the_pixels_are_those_of_torchvision(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    from torchvision import transforms

    usual = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.ToTensor()])
    reference = torchvision_datasets.ImageFolder(str(tmp_path), usual)[0][0]
    (batch,) = ready(tmp_path).predict_dataloader()
    assert batch["x"][0].equal(reference)


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be a folder of images or of image folders; got .*nowhere"):
        ready(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"path must hold images, or a folder for each class; .* has none"):
        ready(tmp_path)
    fill(tmp_path / "a", cat=1, dog=0)
    with pytest.raises(
        ValueError, match=r"every class folder must hold an image; .* dog \(\.jpg.*\)\. Fill or"
    ) as caught:
        ready(tmp_path / "a")
    assert "\n" not in str(caught.value)
    fill(tmp_path / "b" / "train", cat=1)
    fill(tmp_path / "b" / "test", bird=1)
    with pytest.raises(ValueError, match=r"must have training images; .*test has bird, and training only cat"):
        ready(tmp_path / "b")
    fill(tmp_path / "c" / "val", cat=1)
    with pytest.raises(ValueError, match=r"path must hold classes, or one folder train .* has val. Rename them"):
        ready(tmp_path / "c")
    fill(tmp_path / "c" / "dev", cat=1)
    fill(tmp_path / "c" / "train", cat=1)
    with pytest.raises(ValueError, match=r"has train, val, dev. Rename them"):
        ready(tmp_path / "c")
    fill(tmp_path / "d" / "train", cat=1)
    (tmp_path / "d" / "val").mkdir()
    with pytest.raises(ValueError, match=r"every split must hold a folder for each class; .*val has none\. Fill"):
        ready(tmp_path / "d")
    with pytest.raises(RuntimeError, match="must be set up before it knows its classes"):
        _ = ImageFolderDataModule(tmp_path).class_names
    with pytest.raises(ValueError, match="image_size must be an integer; got None"):
        ImageFolderDataModule(tmp_path, image_size=None)  # type: ignore[arg-type]
