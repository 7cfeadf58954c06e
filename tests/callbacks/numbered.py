"""Rows that say which row of the user's file they are, predicted on one or two processes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from toys import QUIET

from ddcl_lightning.callbacks import AssignmentWriter
from ddcl_lightning.datamodules import TextDataModule


class Reader(BoringModel):
    """Predicts the number that the text itself names."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, torch.Tensor]:
        truth = torch.tensor([int(text.split()[-1]) for text in batch["text"]])
        return {"index": batch["index"], "truth": truth, "assignments": torch.eye(3)[truth % 3].unsqueeze(1)}


def numbered_table(rows: int = 40, gaps: tuple[int, ...] = (0, 7, 8, 39), first: int = 0) -> pd.DataFrame:
    """Texts that name their row, white space in the gaps, an id, a label, and splits that are mixed."""
    texts = ["  " if row in gaps else f"this is row {first + row}" for row in range(rows)]
    return pd.DataFrame(
        {
            "key": [f"k{first + row}" for row in range(rows)],
            "text": texts,
            "label": [("no", "yes")[row % 2] for row in range(rows)],
            "split": [("train", "train", "test", "train", "val")[row % 5] for row in range(rows)],
        }
    )


def predict(data: pl.LightningDataModule, path: Path, devices: int = 1, **options: Any) -> None:
    trainer = pl.Trainer(
        **{**QUIET, "devices": devices, "strategy": "ddp" if devices > 1 else "auto"},
        callbacks=[AssignmentWriter(str(path), **options)],
    )
    trainer.predict(Reader(), datamodule=data, return_predictions=False)


def predict_on_two(folder: Path) -> None:
    """What one of the two processes does."""
    predict(
        TextDataModule(folder / "a.csv", batch_size=3, val_fraction=0.0),
        folder / "two.csv",
        devices=2,
        columns=["key", "label"],
        dropped=True,
    )
