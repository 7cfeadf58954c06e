"""Every use of a private field of Lightning, and two of torch, in one place.

``tests/test_compat.py`` fails when one of them changes.
"""

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning, SpikeDetection, WeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ddcl_lightning._utils.batch import Batch

# Reads a checkpoint from wherever the trainer can: a path, an open file, a URL, what fsspec knows.
load_checkpoint = _load
# A class method that says so where it is called on an instance, as Lightning's own ``load_from_checkpoint`` does.
restricted_classmethod = _restricted_classmethod


def count_one_step(optimizers: Sequence[LightningOptimizer]) -> None:
    """Let only the first of several optimizers advance ``trainer.global_step``.

    Under manual optimization Lightning counts the step of every optimizer (its issue 17958), so with two of them
    ``max_steps``, checkpoint intervals and names run at double speed. It sets the counting hooks anew for each batch,
    so call this before every step.
    """
    for optimizer in optimizers[1:]:
        optimizer._on_before_step = do_nothing_closure
        optimizer._on_after_step = do_nothing_closure


def align_logger_step(trainer: pl.Trainer) -> None:
    """Make loggers count optimizer steps, as ``global_step`` does, where the module accumulates gradients itself.

    Call at the end of every training batch; Lightning adds one to the count right after.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = max(trainer.global_step - 1, 0)


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def current_datamodule(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """The data module of the stage in progress; ``trainer.datamodule`` stays that of an earlier one beside loaders."""
    selector = trainer._data_connector._datahook_selector
    return None if selector is None else selector.datamodule


def save_by_time(trainer: pl.Trainer, outputs: Any, batch: Batch, batch_idx: int) -> None:
    """Do what ``ModelCheckpoint(train_time_interval=...)`` leaves out, without a word, under manual optimization.

    Call at the end of every training batch. The callback looks at one thing in the module, and saves by the clock
    where that says automatic optimization.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            callback.on_train_batch_end(trainer, _Automatic, outputs, batch, batch_idx)  # type: ignore[arg-type]


class _Automatic:
    automatic_optimization = True


def averaged_copies(trainer: pl.Trainer) -> list[nn.Module]:
    """Copies of the module that ``WeightAveraging`` callbacks keep, and use in its place for validation."""
    averages = [callback._average_model for callback in callbacks_of(trainer) if isinstance(callback, WeightAveraging)]
    return [average.module for average in averages if average is not None]


def let_spike_detection_resume(callback: SpikeDetection) -> None:
    """Give the callback the field that its ``load_state_dict`` asks for, under a name that it has not."""
    if not hasattr(callback, "running"):
        callback.running = callback.running_mean  # type: ignore[attr-defined]


def pruned_modules(callback: ModelPruning) -> list[nn.Module]:
    """Modules of which a callback prunes parameters, once it is set up."""
    return [module for module, _ in callback._parameters_to_prune]


def is_logging_step(trainer: pl.Trainer) -> bool:
    """True if values logged in this training batch are read, by loggers or at the end of the epoch."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped
    due = bool(interval) and (steps + 1) % interval == 0
    return due or bool(trainer.is_last_batch) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def accept_checkpoints_after_steps() -> None:
    """Silence the advice to save weights from before the optimizer step in a manually optimized module.

    A checkpoint at step n holds the weights after n steps and the state of the optimizers that belongs to them.
    """
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def accept_frozen_modules_in_eval_mode() -> None:
    """Silence the warning that modules start training in evaluation mode: a frozen encoder stays in it on purpose."""
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")


def recomputing() -> bool:
    """True inside of a backward pass: activation checkpointing runs a forward again, which must not count twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def exporting() -> bool:
    """True inside of ``torch.export``, which takes no graph break."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler._is_compiling_flag  # torch 2.6: torch.compile leaves it alone, only export sets it


def given_by_cli() -> bool:
    """True while LightningCLI constructs a module, with the config's plain data as hyperparameters."""
    return _given_hyperparameters.get() is not None


def train_batches(trainer: pl.Trainer, seed: int | None = None) -> Iterator[Batch]:
    """One pass over the training batches of this process, before or between the batches of training.

    The trainer's own iterators, the state of its loaders and the global random state stay as they are. With a seed
    the pass is the same one in a run that was resumed.
    """
    trainer.fit_loop.setup_data()  # no effect where it has run; needed in on_fit_start
    loaders = apply_to_collection(trainer.train_dataloader, DataLoader, _independent_loader)
    states = _collect_rng_states()
    generators = [(generator, generator.get_state()) for generator in _generators(trainer.train_dataloader)]
    samplers = [(sampler, sampler.epoch) for sampler in _holders(trainer.train_dataloader) if hasattr(sampler, "epoch")]
    try:
        if seed is not None:
            _seed_all(seed, [generator for generator, _ in generators])
            for sampler, _ in samplers:
                sampler.epoch = 0
        for batch, batch_idx, _ in CombinedLoader(loaders, "max_size_cycle"):
            if batch_idx >= trainer.num_training_batches:
                return
            yield batch
    finally:  # also where the caller stops early; Lightning's own isolate_rng does not restore then
        _set_rng_states(states)
        for generator, state in generators:
            generator.set_state(state)
        for sampler, epoch in samplers:
            sampler.epoch = epoch


def _seed_all(seed: int, generators: Sequence[torch.Generator]) -> None:
    """Seed torch, numpy, Python and generators of the user's own, in silence."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - data sets draw from it
    random.seed(seed)
    for generator in generators:
        generator.manual_seed(seed)


def _holders(loaders: Any) -> list[Any]:
    """Loaders and their samplers: what decides the order of a pass."""
    holders: list[Any] = []
    apply_to_collection(
        loaders, DataLoader, lambda loader: holders.extend([loader, loader.sampler, loader.batch_sampler])
    )
    holders += [getattr(holder, "sampler", None) for holder in holders]
    return list({id(holder): holder for holder in holders}.values())


def _generators(loaders: Any) -> list[torch.Generator]:
    """Random generators of the loaders' own, whose state decides the order of the next pass."""
    generators = (getattr(holder, "generator", None) for holder in _holders(loaders))
    return list({id(generator): generator for generator in generators if generator is not None}.values())


def _independent_loader(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    """A copy with its own place in the data; a persistent worker pool belongs to the training loop."""
    clone = copy.copy(loader)
    clone._iterator = None
    clone.__dict__.pop("_resume", None)  # so does the place from which a ResumableDataLoader is to go on
    return clone


@contextmanager
def silent_logging(module: pl.LightningModule) -> Iterator[None]:
    """Make ``self.log`` and ``self.log_dict`` of a module do nothing: its training step runs outside of the loop."""
    module.__dict__["log"] = module.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]


def to_device(trainer: pl.Trainer, batch: Batch) -> Batch:
    """A batch on the module's device, through all of its transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def rebuild_ddp(trainer: pl.Trainer) -> None:
    """Wrap the module anew after a parameter has changed its shape; no effect outside of plain DDP.

    DistributedDataParallel sizes its buckets, and autograd its gradient accumulators, for the parameters that it was
    given. Every process has to call this at the same place, between steps.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    strategy.model._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    strategy.model = strategy.lightning_module
    gc.collect()  # the old reducer sits in cycles and keeps the accumulators of the old shapes
    strategy.configure_ddp()


def settle_progress(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Make the progress in a checkpoint say what is left of its epoch, so that a resumed run does all of it once.

    Lightning counts a batch as done after the hook in which most checkpoints are written. Resumed from there it leaves
    out the validation that was due, and after the last batch of an epoch the epoch's end too; under ``max_steps`` it
    ends an epoch twice. Call while the checkpoint is being written, in a hook of that name.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    progress = checkpoint["loops"]["fit_loop"]
    epochs, batches = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    validation = progress["epoch_loop.val_loop.batch_progress"]
    if epochs["current"]["ready"] == epochs["current"]["processed"]:  # the epoch is over
        _complete(epochs)
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        return
    if trainer.fit_loop._data_fetcher is None or not batches["current"]["ready"]:
        return
    validating = trainer.validating
    in_batch_end = batches["current"]["processed"] > batches["current"]["completed"]
    finished = batches["is_last_batch"] or batches["current"]["ready"] == trainer.num_training_batches
    due = validating or validation_is_due(trainer)
    stepped = progress["epoch_loop.state_dict"]
    if in_batch_end and (due or finished):
        _complete(batches)
        if not due and not epoch_loop._should_accumulate():
            stepped["_batches_that_stepped"] += 1
    elif due and not in_batch_end and not validating and not epoch_loop._should_accumulate():
        stepped["_batches_that_stepped"] -= 1  # a resumed run counts it again where it skips the validation
    counted = validation["current"]
    validated = validation["is_last_batch"] and counted["completed"] == counted["ready"] > 0
    if due and (in_batch_end or (validating and not validated)):
        # "In the middle of it, before the first batch": it starts anew.
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["current"] = dict.fromkeys(counted, 0)
        validation["is_last_batch"] = False


def validation_is_due(trainer: pl.Trainer) -> bool:
    """True if a validation follows the current training batch."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _complete(progress: dict[str, Any]) -> None:
    for counts in (progress["total"], progress["current"]):
        counts["completed"] = counts["processed"]


def resumes_inside_epoch(trainer: pl.Trainer) -> bool:
    """True in ``on_train_start`` of a run that goes on inside of an epoch of an earlier run."""
    return trainer.fit_loop.restarted_mid_epoch


def end_finished_epoch(trainer: pl.Trainer) -> bool:
    """Let a run that was resumed after the last batch of an epoch go on with the epoch's end, and with no batch.

    Call in ``on_train_start``. Lightning would ask a loader that has begun anew for one more where no validation is
    due.

    Returns:
        Whether it is such a run.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    batches = epoch_loop.batch_progress
    finished = batches.is_last_batch or batches.current.ready == trainer.num_training_batches
    if epoch_loop.restarting and batches.current.ready and finished and not validation_is_due(trainer):
        epoch_loop.val_loop._has_run = True
    return bool(epoch_loop.restarting and batches.current.ready and finished)


def epoch_metrics(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Values that the epoch has logged, for callbacks to read at its end; every process has to call it."""
    results = trainer._results
    if results is None or trainer.validating:
        return {}
    metrics = {**trainer.callback_metrics, **results.metrics(on_step=False)["callback"]}
    return {name: value.detach().cpu() for name, value in metrics.items() if isinstance(value, Tensor)}


def restore_metrics(trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> None:
    """Let callbacks read them at the end of an epoch of which a resumed run has no more batches."""
    trainer._logger_connector._callback_metrics.update(metrics)


def finds_last_checkpoint(trainer: pl.Trainer) -> bool:
    """True if Lightning resolves ``ckpt_path="last"`` to a file; otherwise it starts without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that warning
        path = trainer._checkpoint_connector._parse_ckpt_path(
            TrainerFn.FITTING, "last", model_provided=True, model_connected=False
        )
    return path is not None


def take_signals(trainer: pl.Trainer, agree: Callable[[], None]) -> None:
    """Leave SIGTERM to a handler of ours that is in place already; Lightning would start a collective inside its own.

    Call before the trainer registers its handlers, in ``setup``.

    Args:
        trainer: Of this process.
        agree: Called before every batch in place of Lightning's broadcast, where there are several processes.
    """
    trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = agree  # type: ignore[method-assign]


def return_signals(trainer: pl.Trainer) -> None:
    """Undo Lightning's handlers now, where ours are about to go: it would restore them after an exception."""
    trainer._signal_connector.teardown()


def request_stop(trainer: pl.Trainer) -> None:
    """Make Lightning raise its SIGTERMException as soon as the batch in progress, or its epoch, is over."""
    trainer._signal_connector.received_sigterm = True
