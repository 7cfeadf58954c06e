"""Which of Lightning's own callbacks do not go together with two manual optimizers, and what does the same instead."""

import math
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.distributed import require_places
from ddcl_lightning.backbones.lsa import LSABackbone
from ddcl_lightning.backbones.pca import PCABackbone
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.optim.schedule import LRSchedule
from ddcl_lightning.optim.token_normalized import TokenNormalized
from ddcl_lightning.optim.two_timescale import run_length

if TYPE_CHECKING:
    from ddcl_lightning.module import DDCLReadoutModule

DEFAULT_FOLDER = " (by default below trainer.default_root_dir)"
MAX_TRIED = 100_000  # steps at which an average is asked whether it would be updated

# These need what manual optimization has not: a single optimizer, or Lightning's own accumulation and schedulers.
REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "the module accumulates gradients itself; set its accumulate_grad_batches instead, "
    "one number for the whole run",
    LearningRateFinder: "it varies the rate of a single optimizer, and this module has two; compare a few values of "
    "lr_prototypes instead (0.001, 0.003, 0.01, 0.03); the encoder's rate follows by rho",
    StochasticWeightAveraging: "it changes rates by a scheduler, which manual optimization never steps; use "
    "WeightAveraging (the same average) or EMAWeightAveraging, and the module's lr_schedule",
}


def require_output_folders(trainer: pl.Trainer) -> None:
    """Raise before a fit that could not write what its callbacks or its profiler write in the end.

    Raises:
        ValueError: Naming the folder and whose it is.
    """
    writers = [*compat.callbacks_of(trainer), trainer.profiler]  # type: ignore[attr-defined]
    folders = {
        f"dirpath of {type(writer).__name__}{DEFAULT_FOLDER if isinstance(writer, ModelCheckpoint) else ''}": getattr(
            writer, "dirpath", None
        )
        for writer in writers
    }
    require_places({argument: str(folder) for argument, folder in folders.items() if folder})


def refuse_callbacks(trainer: pl.Trainer, module: "DDCLReadoutModule") -> None:
    """Raise before a fit whose callbacks would do something else than they promise.

    Raises:
        ValueError: Naming the callback, the reason and the way out.
    """
    from ddcl_lightning.callbacks.adaptive_bank_size import AdaptiveBankSize

    resized = any(isinstance(callback, AdaptiveBankSize) for callback in compat.callbacks_of(trainer))
    for callback in compat.callbacks_of(trainer):
        name = type(callback).__name__
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise ValueError(f"{name} does not work with {type(module).__name__}: {reason}.")
        if isinstance(callback, WeightAveraging) and resized:
            raise ValueError(
                f"{name} averages weights of one shape, and AdaptiveBankSize changes the number of prototypes; use one "
                "of the two. A run of its own can average what AdaptiveBankSize has arrived at."
            )
        if isinstance(callback, SpikeDetection):
            compat.let_spike_detection_resume(callback)
        if isinstance(callback, BatchSizeFinder) and _is_unfitted(module):
            raise ValueError(
                f"{name} tries batches before the backbone has been fitted to the data, and this "
                f"{type(module.backbone).__name__} is not; call backbone.fit(x) on a sample first, or set the batch "
                "size yourself."
            )
        if isinstance(callback, ModelPruning):
            _refuse_pruned_prototypes(callback)
        if isinstance(callback, BaseFinetuning):
            _refuse_tokens_from_cache(callback, module)
        if isinstance(callback, BackboneFinetuning):
            _refuse_finetuning(callback, trainer, module)


def _is_unfitted(module: "DDCLReadoutModule") -> bool:
    return isinstance(module.backbone, (LSABackbone, PCABackbone)) and not bool(module.backbone.fitted)


def refuse_idle_averages(trainer: pl.Trainer) -> None:
    """Raise at the start of training if an average would never be updated, and so undo all training when it ends.

    Raises:
        ValueError: Naming the callback and what to lower.
    """
    steps, epochs = run_length(trainer, "step"), run_length(trainer, "epoch")
    if not math.isfinite(steps) or steps > MAX_TRIED or not math.isfinite(epochs):
        return
    for callback in compat.callbacks_of(trainer):
        if not isinstance(callback, WeightAveraging):
            continue
        if any(callback.should_update(step_idx=step) for step in range(int(steps))):
            continue
        if any(callback.should_update(epoch_idx=epoch) for epoch in range(int(epochs))):
            continue
        raise ValueError(
            f"{type(callback).__name__} would update its average at none of the {int(steps)} steps of this run, whose "
            "end would bring back the weights that training started from. Let it start earlier "
            "(update_starting_at_step, update_starting_at_epoch, should_update)."
        )


def _refuse_pruned_prototypes(callback: ModelPruning) -> None:
    if any(isinstance(pruned, PrototypeBank) for pruned in compat.pruned_modules(callback)):
        raise ValueError(
            f"{type(callback).__name__} must not prune prototypes: a coordinate set to zero is another place, not one "
            "prototype less. Name other modules in parameters_to_prune; AdaptiveBankSize removes prototypes."
        )


def _refuse_tokens_from_cache(callback: BaseFinetuning, module: "DDCLReadoutModule") -> None:
    if any(getattr(layer, "cache_dir", None) is not None for layer in module.backbone.modules()):
        raise ValueError(
            f"{type(callback).__name__} trains the encoder, whose cached tokens would stay what they were; leave out "
            "the backbone's cache_dir."
        )


def _refuse_finetuning(callback: BackboneFinetuning, trainer: pl.Trainer, module: "DDCLReadoutModule") -> None:
    """It adds the backbone to every optimizer, at a rate of its own which it raises from epoch to epoch."""
    name = type(callback).__name__
    if module.rho == 0:
        raise ValueError(f"{name} trains the encoder, which rho = 0 freezes for the whole run; give rho a value > 0.")
    groups = module.parameter_groups()  # the callback has frozen the backbone already
    if groups["encoder"] or groups["task"] or not groups["prototypes"]:
        raise ValueError(
            f"{name} adds the backbone to every optimizer, and would step it twice: here other parameters than the "
            "prototypes train too, in the second optimizer. Write a BaseFinetuning whose finetune_function calls "
            "unfreeze_and_add_param_group only where optimizer is pl_module.trainer.optimizers[-1], at a rate lr of "
            "rho times that of the prototypes."
        )
    if module.prototype_optimizer.optimizer_class is TokenNormalized:
        raise ValueError(
            f"{name} would add the encoder to TokenNormalized, which moves prototypes only; use another "
            "prototype_optimizer, such as 'Adam'."
        )
    if module.lr_schedule != LRSchedule():
        raise ValueError(
            f"{name} sets the encoder's rate anew at every epoch, beside the schedule of the prototypes', so that "
            "their ratio would drift; use lr_schedule='constant'."
        )
    rate = callback.backbone_initial_lr
    rate = callback.backbone_initial_ratio_lr * module.lr_prototypes if rate is None else rate
    last = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else 0
    for epoch in range(callback.unfreeze_backbone_at_epoch, max(last, callback.unfreeze_backbone_at_epoch + 1)):
        if epoch > callback.unfreeze_backbone_at_epoch:
            rate *= callback.lambda_func(epoch + 1)
        if rate >= module.lr_prototypes and not module.allow_unstable:
            raise ValueError(
                f"{name} would raise the encoder's rate to that of the prototypes in epoch {epoch}, but rho must stay "
                "< 1 without allow_unstable; give it a lambda_func that grows less, such as lambda epoch: 1.0, or a "
                "smaller backbone_initial_ratio_lr."
            )
