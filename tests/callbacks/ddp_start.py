"""Trains the two-level toy as one of 1 or 2 processes, saves the prototypes at start and end, and predicts."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import QUIET, TwoLevels, blobs, loader

from ddcl_lightning.callbacks import (
    AssignmentWriter,
    CollapseWarning,
    DecompositionCheck,
    KMeansInitialization,
    PrototypeFigures,
    TemperatureAnnealing,
)


class Predicting(TwoLevels):
    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        weights = self.layer(batch[0].unsqueeze(1), need_weights=True).weights
        return {"assignments": weights.mean(2), "label": batch[1]}


class Save(pl.Callback):
    def __init__(self, stem: Path) -> None:
        self.stem = stem

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, suffix: str) -> None:
        prototypes = {name: value.detach() for name, value in module.named_parameters() if "prototypes" in name}
        torch.save(prototypes, f"{self.stem}-{trainer.global_rank}{suffix}.pt")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.save(trainer, pl_module, "")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, pl_module, "-end")


def main(folder: str, devices: int) -> None:
    module = Predicting(lr=1e-2)
    callbacks = [
        TemperatureAnnealing(),
        KMeansInitialization(),
        DecompositionCheck(every_n_batches=1),
        CollapseWarning(every_n_batches=1),
        PrototypeFigures(every_n_epochs=1),
        Save(Path(folder) / str(devices)),
    ]
    kwargs = {
        **QUIET,
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "default_root_dir": folder,
    }
    pl.Trainer(callbacks=callbacks, max_epochs=2, **kwargs).fit(module, loader(batch_size=16 // devices))

    writer = AssignmentWriter(f"{folder}/{devices}.csv")
    data = DataLoader(TensorDataset(*blobs(size=41)), batch_size=8)  # does not divide by two
    trainer = pl.Trainer(callbacks=[writer], **kwargs)
    trainer.predict(module, data, return_predictions=False)
