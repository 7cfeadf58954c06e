"""CIFAR-10: 32 x 32 colour images in ten classes."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ddcl_lightning.datamodules._images import ImageFetch, JpegStore, PixelStore
from ddcl_lightning.datamodules._optional import require
from ddcl_lightning.datamodules._partition import Loaded
from ddcl_lightning.datamodules._storage import why_unreadable
from ddcl_lightning.datamodules._torchvision import TorchvisionDataModule

FOLDER = "cifar-10-batches-py"
ARRAYS = ("jpeg_train", "offset_train", "y_train", "jpeg_test", "offset_test", "y_test", "classes")
SIDE = 32


class CIFAR10DataModule(TorchvisionDataModule):
    """Photographs of animals and vehicles (Krizhevsky, 2009): 50,000 to train on and 10,000 to test on.

    The test images serve as validation too. ``path`` is the folder ``cifar-10-batches-py``, the one above it, or an
    ``.npz`` file of JPEG images: bytes ``offset_train[i]`` to ``offset_train[i + 1]`` of ``jpeg_train`` are training
    image i and ``y_train[i]`` its label; the same for ``_test``; ``classes`` are the ten names. These are decoded when
    first asked for.

    The arguments are those of :class:`~ddcl_lightning.datamodules.TorchvisionDataModule`.
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    torchvision_name = "CIFAR10"
    contents = f"the folder {FOLDER} or an .npz file of JPEG images"

    def is_in(self, folder: Path) -> bool:
        """True if ``folder`` is the folder of batches, the one above it, or a file."""
        return folder.is_file() or (self._above(folder) / FOLDER).is_dir()

    def load(self) -> Loaded:
        """The images of both splits."""
        source = self.source()
        if source.is_file():
            return self._load_jpeg(source)
        folder = self._above(source)
        datasets = require("torchvision.datasets", "vision")
        try:
            splits = [datasets.CIFAR10(str(folder), train=train) for train in (True, False)]
        except (OSError, RuntimeError):
            raise ValueError(f"{folder / FOLDER} is incomplete or damaged. Remove it and download it again.") from None
        images = torch.from_numpy(np.concatenate([split.data for split in splits])).movedim(-1, 1).contiguous()
        y = torch.tensor([label for split in splits for label in split.targets])
        return Loaded(ImageFetch(PixelStore(images), self.image_size), y, num_test=len(splits[1].targets))

    def _load_jpeg(self, path: Path) -> Loaded:
        try:
            # Opened here: NumPy leaves a torn file open.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ARRAYS}
        except (KeyError, ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(
                f"path must be an .npz file with {', '.join(ARRAYS)}; {path} is not ({why_unreadable(path, error)}). "
                f"Write it anew, or give the folder {FOLDER}."
            ) from None
        names = tuple(map(str, arrays["classes"]))
        if names != self.class_names:
            raise ValueError(
                f"classes of {path} must be {', '.join(self.class_names)}; got {', '.join(names)}. Write the file anew."
            )
        splits = ("train", "test")
        for split in splits:
            images, labels = len(arrays[f"offset_{split}"]) - 1, len(arrays[f"y_{split}"])
            given = arrays[f"y_{split}"]
            if given.dtype.kind not in "iu" and not (given.dtype.kind == "f" and np.array_equal(given, given.round())):
                raise ValueError(
                    f"y_{split} of {path} must be whole numbers in [0, {len(self.class_names)}); got {given.dtype} "
                    f"such as {given.ravel()[:3].tolist()}. Write the file anew."
                )
            if images != labels or arrays[f"offset_{split}"][-1] != len(arrays[f"jpeg_{split}"]):
                raise ValueError(f"offset_{split} of {path} does not fit to y_{split} and jpeg_{split}.")
        encoded = np.concatenate([arrays[f"jpeg_{split}"] for split in splits])
        offsets = np.concatenate([arrays["offset_train"][:-1], arrays["offset_test"] + len(arrays["jpeg_train"])])
        y = torch.from_numpy(np.concatenate([arrays[f"y_{split}"] for split in splits]).astype(np.int64))
        store = JpegStore(encoded, offsets, SIDE)
        return Loaded(ImageFetch(store, self.image_size), y, num_test=len(arrays["y_test"]))

    @staticmethod
    def _above(folder: Path) -> Path:
        return folder.parent if folder.name == FOLDER else folder
