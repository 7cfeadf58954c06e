"""MNIST and Fashion-MNIST: 28 x 28 grey images in ten classes."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ddcl_lightning.datamodules._images import ImageFetch, PixelStore
from ddcl_lightning.datamodules._partition import Loaded
from ddcl_lightning.datamodules._torchvision import TorchvisionDataModule

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class MNISTDataModule(TorchvisionDataModule):
    """Handwritten digits: 60,000 to train on and 10,000 to test on, which serve as validation too.

    ``path`` is a folder with the files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
    ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, gzipped (``.gz``) or not, or torchvision's root folder
    above them. Mirrored digits are other signs, so leave ``augment`` at ``"none"`` or crop yourself.

    The arguments are those of :class:`~ddcl_lightning.datamodules.TorchvisionDataModule`.
    """

    class_names: tuple[str, ...] = tuple(str(digit) for digit in range(10))
    torchvision_name = "MNIST"
    contents = ", ".join(FILES) + " (gzipped or not)"

    def is_in(self, folder: Path) -> bool:
        """True if a folder has the four files."""
        return self._find(folder) is not None

    def load(self) -> Loaded:
        """The images of both splits."""
        files = self._find(self.source())
        assert files is not None
        train_x, train_y, test_x, test_y = (read_idx(file) for file in files)
        images = torch.from_numpy(np.concatenate([train_x, test_x])).unsqueeze(1)
        y = torch.from_numpy(np.concatenate([train_y, test_y]).astype(np.int64))
        if len(images) != len(y):
            raise ValueError(f"the files of {self.torchvision_name} hold {len(images)} images but {len(y)} labels.")
        return Loaded(ImageFetch(PixelStore(images), self.image_size), y, num_test=len(test_y))

    def _find(self, folder: Path) -> list[Path] | None:
        """The four files, wherever they are in ``folder``; None unless all are there."""
        for place in (folder, folder / "raw", folder / self.torchvision_name / "raw"):
            paths = [
                next((file for file in (place / name, place / f"{name}.gz") if file.is_file()), None) for name in FILES
            ]
            if all(paths):
                return [file for file in paths if file]
        return None


class FashionMNISTDataModule(MNISTDataModule):
    """Articles of clothing (Xiao, Rasul and Vollgraf, 2017): 60,000 to train on and 10,000 to test on.

    Files and arguments are those of :class:`MNISTDataModule`.
    """

    class_names: tuple[str, ...] = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    torchvision_name = "FashionMNIST"


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file of bytes, gzipped or not.

    The format, from MNIST's own page: two zeros, 8 for unsigned bytes, the number of dimensions, each dimension in
    four bytes, the most significant first, then the data.

    Raises:
        ValueError: If it is not one.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"idx files must be readable; {path} is not ({error}). Download it again.") from None
    dims = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = tuple(np.frombuffer(data, ">u4", count=dims, offset=4).tolist()) if len(data) >= 4 + 4 * dims else ()
    if not shape or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"idx files must hold unsigned bytes of the size they announce; {path} does not.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
