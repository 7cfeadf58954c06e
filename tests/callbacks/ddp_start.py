"""Trains the two-level toy on 1 or 2 processes and saves the prototypes it starts and ends with."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from toys import QUIET, TwoLevels, loader

from ddcl_lightning.callbacks import (
    CollapseWarning,
    DecompositionCheck,
    KMeansInitialization,
    PrototypeFigures,
    TemperatureAnnealing,
)


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
    module = TwoLevels(lr=1e-2)
    callbacks = [
        TemperatureAnnealing(),
        KMeansInitialization(),
        DecompositionCheck(every_n_batches=1),
        CollapseWarning(every_n_batches=1),
        PrototypeFigures(every_n_epochs=1),
        Save(Path(folder) / str(devices)),
    ]
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_epochs=2,
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(module, loader(batch_size=16 // devices))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
