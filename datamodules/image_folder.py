"""A user's own images, in one folder or in a folder for each class."""

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from sklearn.datasets import load_digits

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._augment import Augmentation
from ddcl_lightning.datamodules._images import FileStore, ImageDataModule, ImageFetch, PixelStore
from ddcl_lightning.datamodules._optional import require
from ddcl_lightning.datamodules._origin import Origin
from ddcl_lightning.datamodules._partition import SPLIT_NAMES, SPLITS, EvaluateOn, Loaded, Split
from ddcl_lightning.datamodules._splits import NO_PATH, check_at_least
from ddcl_lightning.datamodules._storage import View


class ImageFolderDataModule(ImageDataModule):
    """Image files of one folder without labels, or in a folder for each class.

    A folder of images is a data set without labels. Folders in it are classes, as torchvision's ``ImageFolder`` reads
    them: ``path/cat/1.png, path/dog/2.jpg, ...``, or the same below ``path/train`` (``training``), ``path/val``
    (``validation``, ``valid``, ``dev``) and ``path/test``, of which the first must be there. Classes are the folders of
    the training split in alphabetical order. Files are decoded whenever a batch needs them, in colour; what
    has a name that begins with a dot (``._1.png``, ``.ipynb_checkpoints``) is left out. ``index`` counts the files in
    this order, training first; predictions say ``file`` (below ``path``) besides. Memory holds the paths, and the
    images themselves where they are small in all.

    Args:
        path: The folder; None takes the digits of scikit-learn, to try it.
        labelled: Whether folders are classes; by default they are, unless there are none. False takes all images below
            ``path``, however deep, without labels.
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

    @typed
    def __init__(
        self,
        path: str | Path | None = None,
        labelled: bool | None = None,
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
        self.path = None if path is None else Path(path).expanduser()
        self.labelled = labelled
        self.row_columns = () if path is None else ("file",)
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
        if self.path is None:
            return self._sample()
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"path must be a folder of images or of image folders; got {self.path}. Correct it."
            )
        if not self._has_classes(self.path):
            self._class_names = ()
            files = [(path, -1) for path in _images_below(self.path, deep=self.labelled is False)]
            return self._loaded(self.path, files)
        folders = self._split_folders(self.path)
        self._class_names = tuple(class_folders(folders["train"]))
        if not self._class_names:
            raise ValueError(f"path must hold images, or a folder for each class; {folders['train']} has none.")
        by_split = {split: self._files(folder) for split, folder in folders.items()}
        samples = [sample for split in SPLITS for sample in by_split.get(split, [])]
        num_val, num_test = (len(by_split.get(split, [])) for split in SPLITS[1:])
        return self._loaded(self.path, samples, num_val, num_test)

    def _loaded(self, folder: Path, samples: list[tuple[str, int]], num_val: int = 0, num_test: int = 0) -> Loaded:
        # Workers would each keep the images that they have decoded.
        store = FileStore([Path(path) for path, _ in samples], self.size, keep=self.num_workers == 0)
        y = torch.tensor([label for _, label in samples], dtype=torch.int64)
        names = View(len(samples), _Names(store, folder))
        origin = Origin(torch.arange(len(samples)), {"file": names})
        return Loaded(ImageFetch(store, self.image_size), y, num_val, num_test, origin)

    def _sample(self) -> Loaded:
        """The digits of scikit-learn, with their labels."""
        rank_zero_info(NO_PATH)
        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy((pixels * (255 / 16)).round()).byte().view(-1, 1, 8, 8)
        self._class_names = tuple(str(digit) for digit in range(10))
        return Loaded(ImageFetch(PixelStore(images), self.image_size), torch.from_numpy(digits).long())

    def _has_classes(self, folder: Path) -> bool:
        """True if the folders in it are classes or splits."""
        if self.labelled is not None:
            return self.labelled
        folders, images = class_folders(folder), any(_is_image(entry) for entry in folder.iterdir())
        if folders and images:
            raise ValueError(
                f"path must hold images, or a folder for each class; {folder} has both ({folders[0]!r} is a folder). "
                "Pass labelled=False for all images below it, without labels, or move what does not belong there."
            )
        return not images

    def _split_folders(self, path: Path) -> dict[Split, Path]:
        names = [name for name in SPLIT_NAMES if (path / name).is_dir()]
        folders = {SPLIT_NAMES[name]: path / name for name in names}
        if names and ("train" not in folders or len(folders) < len(names)):
            raise ValueError(
                "path must hold classes, or one folder train with at most one for validation and one for test; "
                f"{path} has {', '.join(names)}. Rename them."
            )
        return folders or {"train": path}

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


class _Names:
    """Function from the place of a file to its path below a folder."""

    def __init__(self, store: FileStore, folder: Path) -> None:
        self.store, self.folder = store, folder

    def __call__(self, place: int) -> str:
        return Path(self.store.name(place)).relative_to(self.folder).as_posix()


def _images_below(folder: Path, deep: bool) -> list[str]:
    """Image files of a folder, or also of the folders in it, in alphabetical order.

    Raises:
        ValueError: If there are none; says what there is.
    """
    entries = folder.rglob("*") if deep else folder.iterdir()
    visible = [entry for entry in entries if not any(name[0] == "." for name in entry.relative_to(folder).parts)]
    images = sorted(str(entry) for entry in visible if _is_image(entry))
    if not images:
        others = [entry.name for entry in sorted(visible)[:3]]
        has = f"{len(visible)} others ({', '.join(others)})" if others else "nothing"
        raise ValueError(
            f"path must hold images ({', '.join(_extensions())}); {folder} has {has}. Name the folder that has them."
        )
    return images


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _extensions() and not path.name.startswith(".") and path.is_file()


def _extensions() -> tuple[str, ...]:
    extensions: tuple[str, ...] = require("torchvision.datasets.folder", "vision").IMG_EXTENSIONS
    return extensions


def class_folders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, in alphabetical order."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
