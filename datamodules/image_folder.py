"""A user's own images, a folder for each class."""

from pathlib import Path

import torch

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._augment import Augmentation
from ddcl_lightning.datamodules._images import FileStore, ImageDataModule, ImageFetch
from ddcl_lightning.datamodules._optional import require
from ddcl_lightning.datamodules._origin import Origin
from ddcl_lightning.datamodules._partition import SPLIT_NAMES, SPLITS, EvaluateOn, Loaded, Split
from ddcl_lightning.datamodules._splits import check_at_least


class ImageFolderDataModule(ImageDataModule):
    """Image files in a folder for each class, as torchvision's ``ImageFolder`` reads them.

    ``path/cat/1.png, path/dog/2.jpg, ...``, or the same below ``path/train`` (``training``), ``path/val``
    (``validation``, ``valid``, ``dev``) and ``path/test``, of which the first must be there. Classes are the
    folders of the training split in alphabetical order. Files are decoded whenever a batch needs them, in colour; what
    has a name that begins with a dot (``._1.png``, ``.ipynb_checkpoints``) is left out. ``index`` counts the files in
    this order, training first; predictions say ``file`` (below ``path``) besides.

    Args:
        path: The folder.
        image_size: The shorter side is resized to this many pixels, at least 1, and the square at the centre kept.
        augment: ``"none"``, ``"flip"`` or ``"crop_flip"``, on training images.
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split for validation, in [0, 1).
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for the arguments around it.
        limit: Train on at most this many images, every class keeping its share.
        seed: Seed of split, limit, order and augmentation; by default that of ``seed_everything``.
        num_workers: Worker processes per loader, at least 0; one per core keeps decoding from holding training up.

    Raises:
        ValueError: If an argument is out of its range; later, if a class is empty, only in another split than
            ``train``, or a file cannot be decoded.
        FileNotFoundError: At set-up, if there is no such folder.
        ImportError: If torchvision is missing.
    """

    row_columns = ("file",)

    @typed
    def __init__(
        self,
        path: str | Path,
        image_size: int = 224,
        augment: Augmentation = "none",
        batch_size: int = 32,
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
        check_at_least("image_size", image_size, 1)
        self.path = Path(path).expanduser()
        self.size = image_size
        self._class_names: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the training split's folders, known after setup."""
        if self._class_names is None:
            raise RuntimeError("ImageFolderDataModule must be set up before it knows its classes; call setup() first.")
        return self._class_names

    def load(self) -> Loaded:
        """The paths of all files."""
        folders = self._split_folders()
        self._class_names = tuple(class_folders(folders["train"]))
        if not self._class_names:
            raise ValueError(f"path must hold a folder for each class; {folders['train']} has none.")
        files = {split: self._files(folder) for split, folder in folders.items()}
        samples = [sample for split in SPLITS for sample in files.get(split, [])]
        store = FileStore([Path(path) for path, _ in samples], self.size)
        y = torch.tensor([label for _, label in samples])
        names = [Path(path).relative_to(self.path).as_posix() for path, _ in samples]
        origin = Origin(torch.arange(len(samples)), {"file": names})
        num_val, num_test = (len(files.get(split, [])) for split in SPLITS[1:])
        return Loaded(ImageFetch(store, self.image_size), y, num_val, num_test, origin)

    def _split_folders(self) -> dict[Split, Path]:
        if not self.path.is_dir():
            raise FileNotFoundError(f"path must be a folder of image folders; got {self.path}. Correct the path.")
        names = [name for name in SPLIT_NAMES if (self.path / name).is_dir()]
        folders = {SPLIT_NAMES[name]: self.path / name for name in names}
        if names and ("train" not in folders or len(folders) < len(names)):
            raise ValueError(
                "path must hold classes, or one folder train with at most one for validation and one for test; "
                f"{self.path} has {', '.join(names)}. Rename them."
            )
        return folders or {"train": self.path}

    def _files(self, folder: Path) -> list[tuple[str, int]]:
        """Files of a split in torchvision's order, with the number of their class."""
        datasets = require("torchvision.datasets.folder", "vision")
        unknown = [name for name in class_folders(folder) if name not in self.class_names]
        if unknown:
            raise ValueError(
                f"every class must have training images; {folder} has {', '.join(unknown)}, and training only "
                f"{', '.join(self.class_names)}. Move or remove it."
            )
        if not class_folders(folder):
            raise ValueError(f"every split must hold a folder for each class; {folder} has none. Fill or remove it.")
        numbers = {name: number for number, name in enumerate(self.class_names) if (folder / name).is_dir()}
        try:
            samples: list[tuple[str, int]] = datasets.make_dataset(
                str(folder),
                numbers,
                is_valid_file=lambda path: (
                    datasets.is_image_file(path)
                    and not any(component.startswith(".") for component in Path(path).relative_to(folder).parts)
                ),
            )
        except FileNotFoundError as error:
            reason = str(error).splitlines()[0].rstrip(". ")
            raise ValueError(
                f"every class folder must hold an image; in {folder}: {reason} ({', '.join(datasets.IMG_EXTENSIONS)}). "
                "Fill or remove it."
            ) from None
        return samples


def class_folders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, in alphabetical order."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
