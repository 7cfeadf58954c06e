"""Samples of batches in a form for a person to read."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from ddcl_lightning._utils.batch import Batch, class_labels, index, size
from ddcl_lightning.explain.explanation import Image, Sample

MAX_SIDE = 160  # pixels of an inlined image
MAX_TEXT = 20_000  # characters kept of a text


def positions(batch: Batch, counted: int) -> tuple[list[int], bool]:
    """Places of a batch's samples in the data set, and whether they come from the batch.

    Args:
        batch: As the data loader yields it.
        counted: Samples before it, to count on from where the batch has no ``index``.
    """
    numbers = index(batch)
    if numbers is None:
        return list(range(counted, counted + size(batch))), False
    return [int(place) for place in numbers.flatten().tolist()], True


def take(batch: Batch, row: int) -> Batch:
    """The batch that holds one sample only."""
    count = size(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[row : row + 1] if value.dim() and len(value) == count else value
        if isinstance(value, (list, tuple)) and len(value) == count:
            return type(value)(value[row : row + 1])
        return value

    if isinstance(batch, dict):
        return {key: cut(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(cut(value) for value in batch)
    return cut(batch)


class Album:
    """Source of samples as a person sees them: the batch's text, the data module's ``example`` or an image.

    Args:
        datamodule: May offer ``example(index) -> str | uint8 array`` and ``class_names``.
    """

    def __init__(self, datamodule: pl.LightningDataModule) -> None:
        self._example = getattr(datamodule, "example", None)
        self._names = getattr(datamodule, "class_names", None) or ()

    def class_name(self, label: int) -> str | None:
        """Name of a class, its number where it has no name, None below zero."""
        if label < 0:
            return None
        return str(self._names[label]) if label < len(self._names) else str(label)

    def sample(self, batch: Batch, row: int, place: int, known: bool) -> Sample:
        """One row of a batch.

        Args:
            batch: As the data loader yields it.
            row: In [0, B).
            place: The sample's place in the data set.
            known: Whether the batch said so; a counted place must not be looked up in a shuffled data set.
        """
        return Sample(place, self._content(batch, row, place, known), self.class_name(int(class_labels(batch)[row])))

    def _content(self, batch: Batch, row: int, place: int, known: bool) -> str | Image | None:
        text = batch.get("text") if isinstance(batch, dict) else None
        if text is not None:
            return str(text[row])[:MAX_TEXT]
        if self._example is not None and known:
            content = self._example(place)
            return content[:MAX_TEXT] if isinstance(content, str) else thumbnail(np.asarray(content))
        x = batch.get("x") if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] in (1, 3):
            return thumbnail(to_image(x[row]))
        return None


def to_image(x: Tensor) -> Image:
    """``(C, H, W)`` with one or three channels as ``(H, W)`` or ``(H, W, 3)`` uint8.

    Values in [0, 1] are shown as they are; others (a normalized image) are stretched between their extremes.
    """
    value = x.detach().to("cpu", torch.float32)
    low, high = float(value.min()), float(value.max())
    if not (low >= 0 and high <= 1):
        value = (value - low) / max(high - low, 1e-12)
    pixels: Image = (value * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def thumbnail(image: "np.ndarray[Any, Any]") -> Image:
    """An image ``(H, W)`` or ``(H, W, 3)`` uint8, made smaller by averaging where it is larger than needed.

    Raises:
        ValueError: If it is no such array.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(
            "example(index) of the data module must return a str or a uint8 array (H, W) or (H, W, 3); got "
            f"{image.dtype} of shape {image.shape}. Convert it there."
        )
    longest = max(image.shape[:2])
    if longest <= MAX_SIDE:
        return np.ascontiguousarray(image)
    height, width = (max(1, round(side * MAX_SIDE / longest)) for side in image.shape[:2])
    planes = torch.from_numpy(np.ascontiguousarray(image)).float().reshape(*image.shape[:2], -1).permute(2, 0, 1)
    small = torch.nn.functional.adaptive_avg_pool2d(planes, (height, width)).round().to(torch.uint8)
    pixels: Image = small.permute(1, 2, 0).contiguous().numpy()
    return pixels[..., 0] if image.ndim == 2 else pixels
