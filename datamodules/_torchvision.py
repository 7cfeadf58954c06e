"""The base of the image data sets that torchvision can download."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._augment import Augmentation
from ddcl_lightning.datamodules._images import ImageDataModule
from ddcl_lightning.datamodules._optional import cache_folder, downloading, require, unavailable
from ddcl_lightning.datamodules._partition import EvaluateOn


class TorchvisionDataModule(ImageDataModule):
    """A well-known image data set with a training and a test split, from local files or downloaded by torchvision.

    Args:
        path: Where the data are; each data set says in which form. By default they are looked for in ``root``.
        download: Download what is not in ``root``, through torchvision.
        root: Folder of downloads; by default ``~/.cache/ddcl_lightning``. Unused with ``path``.
        image_size: Height and width of ``x``, at least 1; by default those of the data set.
        augment: ``"none"``, ``"flip"`` or ``"crop_flip"``, on training images; see
            :class:`~ddcl_lightning.datamodules.ImageDataModule`.
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split for validation, in [0, 1).
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for the arguments around it.
        limit: Train on at most this many images, every class keeping its share.
        seed: Seed of split, limit, order and augmentation; by default that of ``seed_everything``.
        num_workers: Worker processes per loader, at least 0.

    Raises:
        ValueError: If an argument is out of its range; at set-up, if a file is broken.
        FileNotFoundError: At set-up, if ``path`` has no such data.
        ConnectionError: If they are neither in ``root`` nor can be downloaded.
        ImportError: If torchvision is needed and missing.
    """

    torchvision_name: ClassVar[str]  # its class in torchvision.datasets
    contents: ClassVar[str]  # what a folder must hold

    @typed
    def __init__(
        self,
        path: str | Path | None = None,
        download: bool = True,
        root: str | Path | None = None,
        image_size: int | None = None,
        augment: Augmentation = "none",
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            augment=augment,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        self.path = None if path is None else Path(path).expanduser()
        self.download = download
        self.root = cache_folder() if root is None else Path(root).expanduser()

    @abstractmethod
    def is_in(self, folder: Path) -> bool:
        """True if the data are in a folder."""

    def prepare_data(self) -> None:
        """Download the data, unless they are on this machine already."""
        if self.path is None and self.download and not self.is_in(self.root):
            dataset = getattr(require("torchvision.datasets", "vision"), self.torchvision_name)
            with downloading(self.torchvision_name, self._remedy()):
                dataset(str(self.root), download=True)

    def source(self) -> Path:
        """``path``, or else ``root``, if the data are there."""
        if self.path is not None and not self.is_in(self.path):
            raise FileNotFoundError(
                f"path must lead to {self.contents}; got {self.path}. Correct it, or leave it out to download the data."
            )
        if self.path is None and not self.is_in(self.root):
            raise ConnectionError(unavailable(self.torchvision_name, "nothing was downloaded", self._remedy()))
        return self.path or self.root

    def _remedy(self) -> str:
        return (
            f"Put {self.contents} into {self.root}, or pass where they are as path; prepare_data() with download=True "
            "fetches them once there is a network."
        )
