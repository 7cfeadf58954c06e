"""Where images come from, and a run with augmentation that is resumed in the middle of an epoch."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddcl_lightning.datamodules import MNISTDataModule
from ddcl_lightning.datamodules._images import FileStore, ImageFetch, JpegStore, PixelStore
from tests.datamodules.runs import run, same, tiny_mnist

pytest.importorskip("torchvision")
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")

GRADIENT = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3) // 8


def encode(image: "np.ndarray[Any, Any]") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def jpegs(*images: "np.ndarray[Any, Any]") -> JpegStore:
    files = [encode(image) for image in images]
    offsets = np.cumsum([0, *map(len, files)])
    return JpegStore(np.frombuffer(b"".join(files), np.uint8), offsets, 32)


def test_pixels_become_floats_of_the_size_asked_for() -> None:
    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    fetch = ImageFetch(PixelStore(x), None)
    pixels = fetch(torch.tensor([3, 1]))["x"]
    assert pixels.equal(x[[3, 1]].float() / 255)
    resized = ImageFetch(PixelStore(x), 16)(torch.tensor([3, 1]))["x"]
    assert resized.shape == (2, 1, 16, 16)
    assert 0 <= resized.min() <= resized.max() <= 1
    torch.testing.assert_close(resized.mean((1, 2, 3)), pixels.mean((1, 2, 3)), atol=0.05, rtol=0)


def test_jpegs_are_decoded_when_asked_for_and_once() -> None:
    black = np.zeros_like(GRADIENT)
    store = jpegs(black, GRADIENT, black)
    pixels = store.pixels(torch.tensor([1, 0]))
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert store.decoded.tolist() == [True, True, False]
    with Image.open(io.BytesIO(encode(GRADIENT))) as image:
        assert np.array_equal(pixels[0].movedim(0, -1).numpy(), np.array(image))
    assert not pixels[1].any()
    store.encoded = np.empty(0, np.uint8)
    assert store.pixels(torch.tensor([1, 0])).equal(pixels)


def test_broken_images_are_named(tmp_path: Path) -> None:
    store = jpegs(GRADIENT, GRADIENT)
    store.encoded = np.zeros_like(store.encoded)
    with pytest.raises(ValueError, match=r"images must be readable; image 1 is not .*Repair or remove it"):
        store.pixels(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"images must be \(32, 32, 3\) in shape; image 0 is \(16, 32, 3\)"):
        jpegs(GRADIENT[:16]).pixels(torch.tensor([0]))
    path = tmp_path / "a.png"
    Image.fromarray(GRADIENT).save(path)
    data = path.read_bytes()
    chunk = data.index(b"IDAT")
    for content in (b"no image", b"", data[:-40], data[: chunk - 1] + b"\x0a" + data[chunk:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"images must be readable; .*a\.png is not"):
            FileStore([path], 8).pixels(torch.tensor([0]))


def test_images_of_more_bits_keep_their_range(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "a.png")
    (pixels,) = FileStore([tmp_path / "a.png"], 8).pixels(torch.tensor([0]))
    assert pixels.equal(torch.from_numpy(deep // 256).byte().expand(3, 8, 8))
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"must have 8 or 16 bits per channel; .*a\.tiff has 32.*Convert it"):
        FileStore([tmp_path / "a.tiff"], 8).pixels(torch.tensor([0]))


def test_files_are_resized_by_the_shorter_side_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 200  # the square in the middle
    Image.fromarray(wide).save(tmp_path / "wide ü.png")
    Image.fromarray(wide[:, :, 0]).rotate(90, expand=True).save(tmp_path / "high.png")  # grey
    pixels = FileStore([tmp_path / "wide ü.png", tmp_path / "high.png"], 5).pixels(torch.arange(2))
    assert pixels.shape == (2, 3, 5, 5)
    assert pixels[:, :, 1:-1, 1:-1].eq(200).all()


def test_fetches_pickle_for_worker_processes() -> None:
    fetch = pickle.loads(pickle.dumps(ImageFetch(jpegs(GRADIENT), 16)))
    assert fetch(torch.tensor([0]))["x"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("augment", "num_workers"), [("crop_flip", 0), ("crop_flip", 2), ("flip", 0)])
def test_resuming_in_the_middle_of_an_epoch_repeats_the_augmentation(
    tmp_path: Path, augment: Any, num_workers: int
) -> None:
    options: dict[str, Any] = {"path": tiny_mnist(tmp_path / "raw"), "batch_size": 6, "num_workers": num_workers}

    def data(**changes: Any) -> MNISTDataModule:
        return MNISTDataModule(**{**options, "augment": augment} | changes)

    whole = run(data(), tmp_path / "saved").train
    assert same(whole, run(data(num_workers=0)).train)
    for step in (1, 4, 6) if num_workers else range(1, 8):
        assert same(run(data(), resume=tmp_path / "saved" / f"step={step}.ckpt").train, whole[step:]), (
            f"after step {step}"
        )

    def by_row(batches: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
        return {row: x for batch in batches for row, x in zip(batch["index"].tolist(), batch["x"], strict=True)}

    first, second, plain = by_row(whole[:4]), by_row(whole[4:]), by_row(run(data(augment="none")).train)
    assert sum(first[row].equal(second[row]) for row in range(22)) < 20  # drawn anew in every epoch
    assert any(not first[row].equal(plain[row]) for row in range(22))
    other = by_row(run(data(seed=7)).train[:4])
    assert any(not first[row].equal(other[row]) for row in range(22))


def test_evaluation_is_not_augmented(tmp_path: Path) -> None:
    data = MNISTDataModule(tiny_mnist(tmp_path), augment="crop_flip", evaluate_on="train")
    data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        for batch in loader:
            for x, row in zip(batch["x"], batch["index"].tolist(), strict=True):
                assert np.array_equal(x[0].numpy() * 255, data.example(row))
