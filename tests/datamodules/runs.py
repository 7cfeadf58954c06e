"""Training runs that keep every batch they see, and tiny data for them."""

import gzip
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ddcl_lightning.datamodules import SplitDataModule

Batches = list[dict[str, Any]]


class Model(pl.LightningModule):
    """Takes any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Recorder(Callback):
    """Keeps the batches; writes them out per process if given a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.train: Batches = []
        self.val: Batches = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.train.append(batch)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.val.append(batch)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.folder:
            torch.save({"train": self.train, "val": self.val}, self.folder / f"{trainer.global_rank}.pt")


def run(data: SplitDataModule, checkpoints: Path | None = None, resume: Path | None = None, **options: Any) -> Recorder:
    """Two epochs over the training batches, saving a checkpoint after every step if told where."""
    recorder = Recorder(options.pop("record", None))
    saving = [ModelCheckpoint(checkpoints, "{step}", save_top_k=-1, every_n_train_steps=1)] if checkpoints else []
    options = {"max_epochs": 2, "limit_val_batches": 0, "accelerator": "cpu", "num_sanity_val_steps": 0} | options
    trainer = pl.Trainer(
        callbacks=[recorder, *saving],
        logger=False,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Model(), datamodule=data, ckpt_path=resume)
    return recorder


def same(first: Batches, second: Batches) -> bool:
    """Whether two runs saw the same, bit for bit."""
    return len(first) == len(second) and all(
        a.keys() == b.keys()
        and all(a[key].equal(b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a)
        for a, b in zip(first, second, strict=True)
    )


def indices(loader: "DataLoader[Any]") -> list[int]:
    """The ``index`` of every row that a loader gives."""
    return [row for batch in loader for row in batch["index"].tolist()]


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write bytes in MNIST's format, gzipped if the name ends so."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def tiny_mnist(folder: Path, suffix: str = ".gz", train: int = 22, test: int = 8, side: int = 28) -> Path:
    """The four files of MNIST with random pixels; labels count through the ten classes."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (size, side, side))
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(size) % 10)
    return folder
