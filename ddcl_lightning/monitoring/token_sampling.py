"""Running the real forward pass of any LightningModule up to a bank, to sample the tokens that reach it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from tqdm.auto import tqdm

from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.compat import silent_logging, to_device, train_batches
from ddcl_lightning._utils.distributed import is_first_process
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.idf import PrototypeIDF
from ddcl_lightning.nn.observer import BankObserver
from ddcl_lightning.nn.scaling import EmbeddingScale
from ddcl_lightning.nn.settled_state import settle

# Their output in evaluation mode, before any training, is not what a bank will see.
BATCH_STATISTICS = (EmbeddingScale, PrototypeIDF, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Reached(BaseException):
    """Ends a training step at the bank whose tokens are wanted; no ``except Exception`` on the way may stop it."""


class _StopAtBank(BankObserver):
    """Takes the tokens of so many calls, and ends the step at the last one before anything is computed from them."""

    def __init__(self, reservoir: Reservoir) -> None:
        self.reservoir, self.calls_left = reservoir, 1

    def before(self, bank: PrototypeBank, tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.calls_left -= 1
        heads, flat_mask = bank.split_heads(tokens, mask)
        self.reservoir.add(heads.transpose(0, 1).float(), None if flat_mask is None else flat_mask[0])
        if self.calls_left <= 0:
            raise _Reached


def execution_order(trainer: pl.Trainer, module: pl.LightningModule, banks: Mapping[str, PrototypeBank]) -> list[str]:
    """Names of the banks in the order in which a training step first calls them.

    Banks that the first step does not call are left out, with a warning.

    Raises:
        ValueError: If the loader is empty or the training step calls none of them.
    """
    order: dict[str, None] = {}

    def note(name: str, record: BankRecord) -> None:
        order.setdefault(name)
        if len(order) == len(banks):
            raise _Reached

    with record_codebooks(banks, note), _without_trace(module):
        batch = next(train_batches(trainer), None)
        if batch is None:
            raise ValueError("the training data loader is empty. Check the data set and drop_last.")
        _run_step(trainer, module, batch, 0)
    missing = [name for name in banks if name not in order]
    if not order:
        raise ValueError(
            f"the training step of {type(module).__name__} called none of its prototype banks {missing} before its "
            "backward pass, so there are no tokens to start them from. Call them as modules, bank(tokens, mask)."
        )
    if missing:
        rank_zero_warn(
            f"the first training step of {type(module).__name__} did not call {', '.join(missing)} before its backward "
            "pass; what starts from the tokens of a bank leaves these as they are."
        )
    return list(order)


def collect_tokens(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    name: str,
    bank: PrototypeBank,
    *,
    max_tokens: int,
    seed: int = 0,
    progress: bool = False,
    calls: int | None = None,
) -> torch.Tensor:
    """A uniform sample of the valid tokens that reach a bank in one pass over the training data.

    Modules run in evaluation mode (no dropout), except those that normalize by the statistics of the batch, which run
    as they will in training. Weights, buffers, modes, the loaders and the random state stay as they were. A
    stream of unknown length is read until the sample is complete.

    Args:
        trainer: A trainer inside ``fit``.
        module: The module, on its device.
        name: Name of the bank, for the progress bar and errors.
        bank: The bank.
        max_tokens: Size of the sample over all processes.
        seed: Seed of the sample.
        progress: Show a bar over batches on the first process.
        calls: How many calls of the bank to sample in each step; by default one for each layer that shares it.

    Returns:
        ``(H, M, d)`` float32 on the CPU, the same on every process, in canonical order.

    Raises:
        ValueError: If no valid token reached the bank.
    """
    reservoir = Reservoir(max_tokens, seed)
    num_calls = calls_per_step(module, bank) if calls is None else calls
    sampler = _StopAtBank(reservoir)

    total = trainer.num_training_batches
    endless = math.isinf(total)
    bank.add_observer(sampler)
    try:
        with _without_trace(module):
            batches = tqdm(
                train_batches(trainer),
                desc=f"tokens of {name}",
                total=None if endless else int(total),
                disable=not (progress and is_first_process()),
                leave=False,
            )
            for number, batch in enumerate(batches):
                sampler.calls_left = num_calls
                _run_step(trainer, module, batch, number)
                settle(module)
                full = reservoir.num_rows >= reservoir.capacity
                if endless and trainer.strategy.reduce_boolean_decision(full, all=True):
                    break
    finally:
        bank.remove_observer(sampler)
    return reservoir.gather().transpose(0, 1).contiguous()


def calls_per_step(module: nn.Module, bank: PrototypeBank) -> int:
    """Number of layers inside of ``module`` that share a bank, at least 1; containers of such layers do not count."""
    parents = [parent for parent in module.modules() if any(child is bank for child in parent.children())]
    layers = [
        candidate
        for candidate in parents
        if not any(other in set(candidate.modules()) - {candidate} for other in parents)
    ]
    return max(1, len(layers))


@contextmanager
def _without_trace(module: pl.LightningModule) -> Iterator[None]:
    """Context manager for training steps without effect: no gradients, dropout or logging, all state restored after."""
    training = [child for child in module.modules() if child.training]
    trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}
    buffers = [
        (child, name, buffer, buffer.clone())
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
    ]
    try:
        # The batches restore the random state when they end, which may be before a step draws from it.
        with evaluating(module), torch.no_grad(), isolate_rng(), silent_logging(module):
            for child in training:
                if isinstance(child, BATCH_STATISTICS):
                    child.train()
            yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)  # a step that ended early may have left an optimizer toggled
        for child, name, buffer, value in buffers:
            setattr(child, name, buffer.copy_(value))


def _run_step(trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
    """One training step that a hook may end early."""
    batch = to_device(trainer, batch)
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    try:
        with trainer.precision_plugin.train_step_context():
            module.training_step(*((batch, batch_idx) if takes_index else (batch,)))
    except _Reached:
        pass
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        # A manual step went past the bank to its backward pass, which has no graph here.
