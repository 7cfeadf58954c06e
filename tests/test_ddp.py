"""Two gloo processes train as one process does on the same global batches."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from ddcl_lightning import (
    Clustering,
    DDCLReadout,
    DDCLReadoutModule,
    Head,
    PCABackbone,
    Reconstruction,
    SequenceDecoder,
    Task,
)
from ddcl_lightning.callbacks import CollapseWarning, DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DebrisDataModule
from ddcl_lightning.heads import HierarchicalReadout, SoftVQ
from tests.processes import succeed_in_processes
from tests.tiny import quiet_trainer

# Centred embeddings give the bias of the encoder a gradient of zero, whose rounding Adam would blow up to whole steps.
ENCODER = {"encoder_optimizer": "SGD"}


class SaveState(pl.Callback):
    """Writes each process's weights where the test can find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = {**pl_module.state_dict(), "global_step": trainer.global_step}
        torch.save(state, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def clustering() -> tuple[Head, Task]:
    return DDCLReadout(4), Clustering(4)


def soft_codes() -> tuple[Head, Task]:
    """Their temperature, entropy bonus and codes depend on the tokens of all processes."""
    head = SoftVQ(4, num_heads=2, temperature=0.3, entropy_weight=0.1)
    return head, Reconstruction(SequenceDecoder(6, hidden_dim=8))


def hierarchy() -> tuple[Head, Task]:
    """Every level's temperature, and the idf of the first one's prototypes, are those of all processes."""
    head = HierarchicalReadout([4, 3], tokens=["all", "idf_mean"], embedding_scale="total", prototype_dim=3)
    return head, Clustering(4)


def train(folder: Path, processes: int, create: Callable[[], tuple[Head, Task]], **kwargs: Any) -> None:
    torch.manual_seed(0)
    module = DDCLReadoutModule(PCABackbone(6, 4, trainable=True), *create(), **ENCODER, **kwargs)
    callbacks = [
        TemperatureAnnealing(),
        KMeansInitialization(num_restarts=2, progress=False),
        DecompositionCheck(every_n_batches=1),
        CollapseWarning(every_n_batches=1),
        SaveState(folder),
    ]
    settings: dict[str, Any] = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, limit_val_batches=0, **settings)
    # 64 rows in batches of 32, or of 2 x 16: the sampler deals the same global batches.
    trainer.fit(module, datamodule=DebrisDataModule(batch_size=32 // processes, num_per_class=16, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("create", "kwargs"),
    [
        (clustering, {"gradient_clip_val": 1.0}),
        (clustering, {"prototype_optimizer": "TokenNormalized", "lr_prototypes": 0.2}),
        (soft_codes, {"prototype_optimizer": "TokenNormalized", "lr_prototypes": 0.2}),
        (hierarchy, {}),
    ],
    ids=["adam", "token_normalized", "soft_codes", "hierarchy"],
)
def test_two_processes_equal_one(
    tmp_path: Path, create: Callable[[], tuple[Head, Task]], kwargs: dict[str, Any]
) -> None:
    train(tmp_path, 1, create, **kwargs)
    succeed_in_processes(tmp_path, partial(train, tmp_path, 2, create, **kwargs))
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert alone["global_step"] == first["global_step"] == 6
    for name, value in alone.items():
        if name.endswith(".covariance.direction"):
            continue  # any of many where eigenvalues coincide, as those of whitened tokens
        if isinstance(value, torch.Tensor):
            assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
            torch.testing.assert_close(
                first[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
