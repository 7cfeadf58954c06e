"""Small foreign projects that the callbacks are attached to."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ddcl_lightning import DDCLAttention, Temperature

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def blobs(size: int = 96, dim: int = 4, clusters: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Well-separated clusters ``(N, d)`` and their labels ``(N,)``."""
    generator = torch.Generator().manual_seed(seed)
    centers = 5 * torch.randn(clusters, dim, generator=generator)
    labels = torch.arange(size) % clusters
    return centers[labels] + 0.3 * torch.randn(size, dim, generator=generator), labels


def loader(size: int = 96, dim: int = 4, batch_size: int = 16, shuffle: bool = True, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*blobs(size, dim)), batch_size=batch_size, shuffle=shuffle, **kwargs)


def fit(
    module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None, ckpt_path: Any = None, **kwargs: Any
) -> pl.Trainer:
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 2, **kwargs})
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def read_layer(module: Any, batch: Any) -> Any:
    """The call of a probe: what the layer of a project makes of a batch; of our own module, its forward pass."""
    return module.layer(module.tokens(batch)) if hasattr(module, "layer") else module(batch)


class Project(pl.LightningModule):
    """Automatic optimization, tuple batches; the encoder starts as the identity so that tokens are known."""

    def __init__(self, dim: int = 4, lr: float = 1e-3, dropout: float = 0.0, **layer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(dim, dim)
        nn.init.eye_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)
        self.dropout = nn.Dropout(dropout)
        self.layer = DDCLAttention(dim, **{"num_prototypes": 4, **layer})
        self.lr = lr
        self.losses: list[float] = []

    def tokens(self, batch: Any) -> Tensor:
        return self.dropout(self.encoder(batch[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(self.tokens(batch)).terms.loss.sum()
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Transformed(Project):
    """Doubles its inputs in a transfer hook, and names no batch_idx."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class Masked(Project):
    """Every sample is a sequence of three tokens, the last of which is padding with wild values."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.tokens(batch)
        sequence = torch.stack([x, x + 1, torch.full_like(x, 1e6)], 1)
        mask = torch.tensor([True, True, False]).expand(len(x), 3)
        return self.layer(sequence, mask=mask).terms.loss.sum()


class SeveralLoaders(Project):
    """A dict of loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(super(SeveralLoaders, self).training_step(batch[key], batch_idx) for key in ("a", "b"))


class TwoOptimizers(Project):
    """Manual optimization of two optimizers, each toggled."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.layer(self.tokens(batch)).terms.loss.sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        fast = torch.optim.SGD(self.layer.parameters(), lr=1e-2)
        return [fast, torch.optim.SGD(self.encoder.parameters(), lr=1e-3)]


class LateLayer(Project):
    """Builds its layer in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            self.layer = DDCLAttention(4, 4)


class TwoLevels(Project):
    """The second bank, registered first, reads the soft centroids of the first."""

    def __init__(self, top: Temperature | None = None, **layer: Any) -> None:
        super().__init__(**layer)
        self.top = DDCLAttention(4, num_prototypes=2, **({"temperature": top} if top is not None else {}))
        layer = self.layer
        del self.layer
        self.layer = layer  # registration order is not execution order

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first = self.layer(self.tokens(batch))
        second = self.top(first.centroids.detach())
        return first.terms.loss.sum() + second.terms.loss.sum()


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        x, y = blobs()
        number = 0
        while self.size is None or number < self.size:
            yield x[number % len(x)], y[number % len(x)]
            number += 1


PROJECTS = {
    "automatic": (Project, lambda: loader()),
    "dropout": (lambda: Project(dropout=0.5), lambda: loader()),
    "transformed": (Transformed, lambda: loader()),
    "masked": (Masked, lambda: loader()),
    "several_loaders": (SeveralLoaders, lambda: {"a": loader(), "b": loader(size=48)}),
    "two_optimizers": (TwoOptimizers, lambda: loader()),
    "late_layer": (LateLayer, lambda: loader()),
    "two_levels": (TwoLevels, lambda: loader()),
    "two_heads": (lambda: Project(num_heads=2), lambda: loader()),
    "bounded": (lambda: Project(embedding_scale="per_dimension"), lambda: loader()),
}
