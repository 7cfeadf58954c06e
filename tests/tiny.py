"""Small pieces that several tests put together."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, IdentityBackbone, Temperature
from ddcl_lightning.tasks import Task


def absolute(value: float | list[float] = 1.0) -> Temperature:
    """T itself, in units of squared distance."""
    return Temperature(value, unit="absolute")


class Blobs(Dataset[dict[str, Tensor]]):
    """Points around ``classes`` centres far apart, as dict batches."""

    def __init__(self, size: int = 64, dim: int = 4, classes: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(size) % classes
        centers = 5 * torch.randn(classes, dim, generator=generator)
        self.x = centers[self.y] + 0.3 * torch.randn(size, dim, generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.x[row], "y": self.y[row], "index": torch.tensor(row)}


def loader(batch_size: int = 16, **kwargs: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Blobs(**kwargs), batch_size=batch_size)


class LinearBackbone(IdentityBackbone):
    """A trainable encoder."""

    def __init__(self, in_features: int = 4, embed_dim: int = 3) -> None:
        super().__init__(in_features)
        self.linear = torch.nn.Linear(in_features, embed_dim)
        self.embed_dim = embed_dim

    def forward(self, batch: Any) -> Any:
        tokens = super().forward(batch)
        return tokens._replace(values=self.linear(tokens.values))


def clustering_module(
    task: Task | None = None, temperature: float | Temperature = 0.02, **kwargs: Any
) -> DDCLReadoutModule:
    return DDCLReadoutModule(LinearBackbone(), DDCLReadout(4, temperature=temperature), task or Clustering(4), **kwargs)


def quiet_trainer(**kwargs: Any) -> pl.Trainer:
    """A trainer on the CPU that prints and writes nothing unless told to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **kwargs})


def parameters_of(module: torch.nn.Module) -> Iterator[Tensor]:
    """Copies of all parameters."""
    for parameter in module.parameters():
        yield parameter.detach().clone()
