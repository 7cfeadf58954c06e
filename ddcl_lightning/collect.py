"""Running the real forward pass of any LightningModule up to a bank, to sample the tokens that reach it."""

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import nn
from tqdm.auto import tqdm

from ddcl_lightning.bank import PrototypeBank
from ddcl_lightning.compat import silent_logging, to_device, train_batches
from ddcl_lightning.distributed import is_first_process
from ddcl_lightning.probe import bank_inputs
from ddcl_lightning.reservoir import Reservoir
from ddcl_lightning.scale import EmbeddingScale


class _Reached(Exception):
    """Ends a training step at the bank whose tokens are wanted."""


def execution_order(trainer: pl.Trainer, module: pl.LightningModule, banks: Mapping[str, PrototypeBank]) -> list[str]:
    """Names of the banks in the order in which a training step first calls them.

    Raises:
        ValueError: If the loader is empty or the training step calls none of them.
    """
    order: dict[str, None] = {}

    def note(name: str) -> None:
        order.setdefault(name)
        if len(order) == len(banks):
            raise _Reached

    handles = [bank.register_forward_hook(lambda *_, name=name: note(name)) for name, bank in banks.items()]
    try:
        for batch in train_batches(trainer):
            _run_step(trainer, module, batch, update_scales=False)
            break
        else:
            raise ValueError("the training data loader is empty. Check the data set and drop_last.")
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError(
            f"the training step of {type(module).__name__} called none of its prototype banks {list(banks)}, "
            "so there are no tokens to start them from."
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
) -> torch.Tensor:
    """A uniform sample of the valid tokens that reach a bank in one pass over the training data.

    Modules run in evaluation mode (no dropout), except embedding scales, which learn their statistics on the way.

    Args:
        trainer: A trainer inside ``fit``.
        module: The module, on its device.
        name: Name of the bank, for the progress bar and errors.
        bank: The bank.
        max_tokens: Size of the sample over all processes.
        seed: Seed of the sample.
        progress: Show a bar over batches on the first process.

    Returns:
        ``(H, M, d)`` float32 on the CPU, the same on every process, in canonical order.

    Raises:
        ValueError: If no valid token reached the bank.
    """
    reservoir = Reservoir(max_tokens, seed)

    def stop_at_bank(called: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tokens, mask = bank_inputs(bank, args, kwargs)
        heads, flat_mask = bank.split_heads(tokens, mask)
        valid = heads if flat_mask is None else heads[:, flat_mask[0]]
        reservoir.add(valid.transpose(0, 1).float())
        raise _Reached

    total = trainer.num_training_batches
    handle = bank.register_forward_pre_hook(stop_at_bank, with_kwargs=True)
    try:
        batches = tqdm(
            train_batches(trainer),
            desc=f"tokens of {name}",
            total=int(total) if total != float("inf") else None,
            disable=not (progress and is_first_process()),
            leave=False,
        )
        for batch in batches:
            _run_step(trainer, module, batch, update_scales=True)
    finally:
        handle.remove()
    return reservoir.gather().transpose(0, 1).contiguous()


def _run_step(trainer: pl.Trainer, module: pl.LightningModule, batch: object, *, update_scales: bool) -> None:
    """One training step without gradients that a hook may end early."""
    was_training = {child: child.training for child in module.modules()}
    module.eval()
    if update_scales:
        for child in module.modules():
            if isinstance(child, EmbeddingScale):
                child.train()
    try:
        with torch.no_grad(), silent_logging(module), trainer.precision_plugin.train_step_context():
            module.training_step(to_device(trainer, batch), 0)
    except _Reached:
        pass
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        # A manual step went past the last bank to its backward pass, which has no graph here.
    finally:
        for child, training in was_training.items():
            child.training = training
