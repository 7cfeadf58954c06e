"""Small image sets for many short runs: digits, and Fashion-MNIST and CIFAR-10 at half their height and width."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ddcl_lightning.datamodules import CIFAR10DataModule, FashionMNISTDataModule

TRAIN, TEST, DIGITS_TEST = 2_400, 320, 360
FILES = {"fashion": FashionMNISTDataModule, "cifar": CIFAR10DataModule}


@dataclass(frozen=True)
class Data:
    """Training samples with labels, and held-out ones: the same for all seeds."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache
def load(name: str, path: Path | None = None) -> Data:
    """Rows ``(N, 64)`` of ``digits``, centered; or images ``(N, C, H, W)`` in [0, 1] of one of the other sets."""
    if name in ("digits", "digit-images"):
        loaded = load_digits()
        x, y = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
        x = x - x[train].mean(0) if name == "digits" else x.view(-1, 1, 8, 8)
        return Data(x[train], y[train], x[test], y[test])
    module = FILES[name](path=str(path), limit=TRAIN, batch_size=100, eval_batch_size=TEST, seed=0)
    module.setup("fit")
    test = next(iter(module.val_dataloader()))
    return Data(*_images(module), avg_pool2d(_scaled(test["x"]), 2), test["y"])


def _images(module: pl.LightningDataModule) -> tuple[Tensor, Tensor]:
    """All training images and their labels."""
    batches = list(module.train_dataloader())
    x = torch.cat([avg_pool2d(_scaled(batch["x"]), 2) for batch in batches])
    return x, torch.cat([batch["y"] for batch in batches])


def _scaled(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def batches(data: Data, size: int, seed: int, order: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without an end, each pass in a new order, or sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    by_class = torch.argsort(data.y, stable=True)
    while True:
        rows = by_class if order == "sorted" else torch.randperm(len(data.x), generator=generator)
        for first in range(0, len(rows) - size + 1, size):
            chosen = rows[first : first + size]
            yield data.x[chosen], data.y[chosen]


def changed(x: Tensor, shift: str) -> Tensor:
    """Samples after the data have changed: rows with another sign, or images inverted."""
    return -x if shift == "sign" else 1 - x
