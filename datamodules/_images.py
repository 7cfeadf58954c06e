"""The base of the image data modules, and where their images come from: pixels, JPEG bytes in memory, or files."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._augment import Augmentation, RandomImages
from ddcl_lightning.datamodules._loading import Augment, Batch
from ddcl_lightning.datamodules._optional import require
from ddcl_lightning.datamodules._partition import EvaluateOn
from ddcl_lightning.datamodules._splits import SplitDataModule, check_at_least, check_choice
from ddcl_lightning.datamodules._storage import KEPT_BYTES


class ImageStore(Protocol):
    """Source of the images of a data set."""

    def pixels(self, rows: Tensor) -> Tensor:
        """Images of the rows ``(B,)``: ``(B, C, H, W)`` uint8."""


class PixelStore:
    """Images decoded in memory.

    Args:
        images: ``(N, C, H, W)`` uint8.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def pixels(self, rows: Tensor) -> Tensor:
        """Images of the rows."""
        return self.images[rows]


class JpegStore:
    """Encoded colour images of one size in memory, each decoded when it is first needed.

    Args:
        encoded: All files one after the other, uint8.
        offsets: Image i is bytes ``offsets[i]`` to ``offsets[i + 1]``, ``(N + 1,)``.
        side: Height and width.
    """

    def __init__(self, encoded: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], side: int) -> None:
        self.encoded, self.offsets = encoded, offsets
        count = len(offsets) - 1
        # Zeros that nobody has written to take no memory yet.
        self.images = np.zeros((count, side, side, 3), dtype=np.uint8)
        self.decoded = np.zeros(count, dtype=bool)

    def pixels(self, rows: Tensor) -> Tensor:
        """Images of the rows."""
        places = rows.numpy()
        for row in places[~self.decoded[places]].tolist():
            start, end = self.offsets[row : row + 2]
            image = np.asarray(_decode(io.BytesIO(self.encoded[start:end].tobytes()), f"image {row}"))
            if image.shape != self.images.shape[1:]:
                raise ValueError(f"images must be {self.images.shape[1:]} in shape; image {row} is {image.shape}.")
            self.images[row] = image
            self.decoded[row] = True
        return _channels_first(self.images[places])


class FileStore:
    """Image files, decoded as they are needed; resized to the shorter side, then cropped at the centre.

    Args:
        paths: N files.
        size: Height and width of what is left.
        keep: Whether to keep what was decoded, where all of it takes at most ``KEPT_BYTES``.
    """

    def __init__(self, paths: Sequence[Path], size: int, keep: bool = False) -> None:
        # One array and not N objects, whose reference counts would copy them into every worker.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.size = size
        kept = len(paths) if keep and len(paths) * size * size * 3 <= KEPT_BYTES else 0
        # Zeros that nobody has written to take no memory yet.
        self._images = np.zeros((kept, size, size, 3), dtype=np.uint8)
        self._decoded = np.zeros(kept, dtype=bool)

    def pixels(self, rows: Tensor) -> Tensor:
        """Images of the rows."""
        places = rows.numpy()
        if not len(self._decoded):
            return _channels_first(np.stack([self._read(place) for place in places.tolist()]))
        for place in places[~self._decoded[places]].tolist():
            self._images[place] = self._read(place)
            self._decoded[place] = True
        return _channels_first(self._images[places])

    def name(self, place: int) -> str:
        """Path of a file."""
        return os.fsdecode(self.paths[place])

    def _read(self, place: int) -> npt.NDArray[np.uint8]:
        transforms = require("torchvision.transforms.functional", "vision")
        path = self.name(place)
        image = transforms.resize(_decode(path, path, self.size), self.size)
        return np.asarray(transforms.center_crop(image, [self.size, self.size]))


class ImageFetch:
    """Function from row numbers to images as floats in [0, 1].

    Args:
        store: The images.
        size: Resize them to this height and width (bilinear, antialiased); None leaves them.
    """

    def __init__(self, store: ImageStore, size: int | None) -> None:
        self.store = store
        self.size = size

    def __call__(self, rows: Tensor) -> Batch:
        """``x`` of the rows, ``(B, C, H, W)`` float32."""
        x = self.store.pixels(rows).float().div_(255)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return {"x": x}


class ImageDataModule(SplitDataModule):
    """Data module of images: variants load an :class:`ImageFetch`, this class and its base do the rest.

    Batches hold ``x`` ``(B, C, H, W)`` float32 in [0, 1]; normalization is left to the backbone.

    Args:
        image_size: Height and width of ``x``, at least 1; None keeps those of the images.
        augment: What happens to training images: nothing, ``"flip"`` (mirrored left to right in half of the draws) or
            ``"crop_flip"`` (also moved by up to an eighth of the side, filled with black). Drawn for each image from
            seed, epoch and index, so a resumed run sees the same ones.
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: Rows per batch of all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split for validation, in [0, 1).
        evaluate_on: Rows of validation and test, see :class:`~ddcl_lightning.datamodules.SplitDataModule`.
        limit: Train on at most this many rows, every class keeping its share; None takes all.
        seed: Seed of split, limit, order and augmentation; None takes that of ``seed_everything``.
        num_workers: Worker processes per loader, at least 0.
    """

    @typed
    def __init__(
        self,
        *,
        image_size: int | None,
        augment: Augmentation,
        batch_size: int,
        eval_batch_size: int | None,
        val_fraction: float,
        evaluate_on: EvaluateOn,
        limit: int | None,
        seed: int | None,
        num_workers: int,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        if image_size is not None:
            check_at_least("image_size", image_size, 1)
        check_choice("augment", augment, ("none", "flip", "crop_flip"))
        self.image_size = image_size
        self.augment = augment

    def augmentation(self) -> Augment | None:
        """Random flips and crops, or None with ``augment="none"``."""
        return None if self.augment == "none" else RandomImages(self.seed, crop=self.augment == "crop_flip")

    def example(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index`` before augmentation, ``(H, W)`` if it is grey, else ``(H, W, 3)``."""
        fetch = self._require_setup()[0].fetch
        assert isinstance(fetch, ImageFetch)
        pixels: npt.NDArray[np.uint8] = fetch.store.pixels(torch.tensor([self._check_index(index)]))[0].numpy()
        return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)


def _decode(source: Any, name: str, size: int | None = None) -> Any:
    """Image in colour; a JPEG that is several times the size is decoded at a part of its own, which is faster."""
    image_class = require("PIL.Image", "vision")
    try:
        with image_class.open(source) as image:
            if size is not None and image.format == "JPEG" and min(image.size) >= 4 * size:
                image.draft("RGB", (2 * size, 2 * size))
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"images must have 8 or 16 bits per channel; {name} has 32, whose range is not known. Convert it."
                )
            if image.mode.startswith("I;16"):  # convert() would cut everything above 255 to white
                image = image_class.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, image_class.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"images must be readable; {name} is not ({error}). Repair or remove it.") from None


def _channels_first(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).movedim(-1, 1).contiguous()
