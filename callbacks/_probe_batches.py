"""What a callback has to know of the training data, and how it calls a module with some of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.compat import to_device, train_batches
from ddcl_lightning.tasks.readout_module import ReadoutModule

PROBE_SAMPLES = 512


def is_ours(module: pl.LightningModule) -> bool:
    """True if the forward pass of the module takes a batch and does nothing else."""
    return isinstance(module, ReadoutModule)


def forward_batch(module: pl.LightningModule, batch: Batch) -> Any:
    return module(batch)


def call_all(
    trainer: pl.Trainer, module: pl.LightningModule, forward: Callable[..., Any], batches: Iterable[Batch]
) -> None:
    with trainer.precision_plugin.forward_context():
        for batch in batches:
            forward(module, to_device(trainer, batch))


def is_read_once(loaders: Any) -> bool:
    """True if a loader's data are a stream."""
    streams: list[bool] = []
    apply_to_collection(loaders, DataLoader, lambda each: streams.append(isinstance(each.dataset, IterableDataset)))
    return any(streams)


def is_shuffled(loader: Any) -> bool:
    """True if the training data come in a random order."""
    sampler = getattr(loader, "sampler", None)
    return isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) or bool(
        getattr(sampler, "shuffle", False)
    )


def first_batches(trainer: pl.Trainer) -> list[Batch]:
    """The first batches of a pass over the training data of this process, of some 512 samples."""
    batches: list[Batch] = []
    samples = 0
    for batch in train_batches(trainer, seed=0):  # a resumed run takes the same ones
        batches.append(batch)
        samples += size_of(batch)
        if samples >= PROBE_SAMPLES:
            break
    return batches


def size_of(batch: Any) -> int:
    """Samples of a batch of any structure: the length of its first tensor or list."""
    if isinstance(batch, (Tensor, str)):
        return len(batch) if isinstance(batch, Tensor) and batch.dim() else 1
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, Sequence) and len(values):
        return len(values) if isinstance(values[0], (str, int, float)) else size_of(values[0])
    return 1
