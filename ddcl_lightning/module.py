"""The LightningModule: any backbone, any head, any task, stepped on two time scales."""

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.arguments import nearest, typed
from ddcl_lightning._utils.batch import Batch, index
from ddcl_lightning._utils.distributed import batch_weight, mean_over_processes, world_size
from ddcl_lightning.backbones.base import Backbone
from ddcl_lightning.callbacks._compatibility import refuse_callbacks, refuse_idle_averages
from ddcl_lightning.checkpoints.trust import check_hyper_parameters, stored_hyper_parameters
from ddcl_lightning.heads.base import Head
from ddcl_lightning.metrics.evaluation_pass import EvaluationPass
from ddcl_lightning.metrics.stages import StageMetrics, check_new
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.guarded_state import require_finite
from ddcl_lightning.optim.added_groups import adopt_groups, release_restored
from ddcl_lightning.optim.factory import OptimizerSpec
from ddcl_lightning.optim.token_normalized import TokenNormalized
from ddcl_lightning.optim.two_timescale import (
    LRSchedule,
    check_ratio,
    check_schedule,
    live_ratio,
    lr_factor,
    parameter_ids,
    run_length,
)
from ddcl_lightning.tasks.base import Task
from ddcl_lightning.tasks.readout_module import ReadoutModule

if TYPE_CHECKING:
    from typing_extensions import Self


class DDCLReadoutModule(ReadoutModule):
    """Trains a backbone, a readout head and a task with two optimizers and one backward pass.

    The prototypes are the fast subsystem and the encoder the slow one (Theorem 1): ``rho`` is the ratio of their
    rates, and the encoder's rate is derived from it, so an unstable pair cannot be written by accident. What
    belongs to the task (a classifier, a decoder) steps with the encoder's optimizer at its own rate.

    rho < 1 slows a collapse down; it does not prevent it. An encoder that trains on the quantisation loss
    alone lowers it by shrinking its embeddings at any ratio, so such a head bounds their scale unless told otherwise.

    Args:
        backbone: Batch to tokens.
        head: Tokens to readout.
        task: Readout and batch to losses and metrics.
        lr_prototypes: Rate of the prototypes, > 0.
        rho: ``lr_encoder / lr_prototypes`` in [0, 1); at most 0.1 is the rule of thumb. 0 freezes the encoder.
        lr_task: Rate of the task's parameters, > 0; by default ``lr_prototypes``.
        prototype_optimizer: ``"Adam"``, ``"SGD"``, any other class of ``torch.optim``, a dotted path to one, or
            ``"TokenNormalized"`` (:class:`~ddcl_lightning.optim.token_normalized.TokenNormalized`).
        prototype_optimizer_args: Its arguments other than ``lr``. Prototypes get no weight decay unless it says so.
        encoder_optimizer: The same for encoder and task.
        encoder_optimizer_args: Its arguments other than ``lr``.
        lr_schedule: ``"constant"``, ``"linear"`` or ``"cosine"``: one factor for all rates, but that of
            ``"TokenNormalized"``: an EMA rate has no reason to shrink.
        warmup_steps: Steps of linear warm-up, likewise.
        gradient_clip_val: Largest norm of all gradients together, > 0; None does not clip. Joint, because clipping each
            optimizer on its own would change the ratio of their steps.
        accumulate_grad_batches: Batches per optimizer step, at least 1.
        allow_unstable: Accept rho >= 1, with a warning: for ablations.
        freeze_prototypes_steps: Optimizer steps, at least 0, at the start of the run in which prototypes stay where
            they are while the rest learns, as SwAV does. Those frozen by ``requires_grad_(False)`` stay for as long.
        check_finite: Stop at the first loss that is NaN or infinite. On a GPU it waits for each step's loss.

    Raises:
        ValueError: If an argument is out of its range, or ``lr`` is given twice.
        RuntimeError: During training, if the live ratio of the rates leaves [0, 1).
        FloatingPointError: During training, if the loss is not finite.
    """

    # Heads are swapped for ones without prototypes; callbacks for banks then stay idle.
    banks_optional = True

    @typed
    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        task: Task,
        lr_prototypes: float = 1e-2,
        rho: float = 0.1,
        lr_task: float | None = None,
        prototype_optimizer: str = "Adam",
        prototype_optimizer_args: dict[str, Any] | None = None,
        encoder_optimizer: str = "Adam",
        encoder_optimizer_args: dict[str, Any] | None = None,
        lr_schedule: LRSchedule = "constant",
        warmup_steps: int = 0,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        allow_unstable: bool = False,
        check_finite: bool = True,
        freeze_prototypes_steps: int = 0,
    ) -> None:
        super().__init__()
        # Under the CLI these are the config's plain data; outside of it modules must not be pickled into checkpoints.
        modules = () if compat.given_by_cli() else ("backbone", "head", "task")
        self.save_hyperparameters(ignore=modules)
        self.automatic_optimization = False

        for name, value in (("lr_prototypes", lr_prototypes), ("lr_task", lr_task)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and > 0; got {value}.")
        check_ratio(rho, allow_unstable=allow_unstable)
        check_schedule(lr_schedule, warmup_steps)
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"gradient_clip_val must be > 0, or None not to clip; got {gradient_clip_val}.")
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be at least 1; got {accumulate_grad_batches}.")
        if freeze_prototypes_steps < 0:
            raise ValueError(f"freeze_prototypes_steps must be at least 0 steps; got {freeze_prototypes_steps}.")
        self.freeze_prototypes_steps = freeze_prototypes_steps
        if rho >= 1:
            pl.utilities.rank_zero_warn(
                f"rho = {rho} >= 1 is outside of the stable range (Theorem 1): expect prototypes to lag the encoder."
            )
        self.lr_prototypes, self.rho = lr_prototypes, rho
        self.lr_task = lr_prototypes if lr_task is None else lr_task
        self.prototype_optimizer = OptimizerSpec(
            "prototype_optimizer", prototype_optimizer, prototype_optimizer_args, weight_decay=0.0
        )
        self.encoder_optimizer = OptimizerSpec("encoder_optimizer", encoder_optimizer, encoder_optimizer_args)
        if self.encoder_optimizer.optimizer_class is TokenNormalized:
            raise ValueError("encoder_optimizer must step along gradients; TokenNormalized moves prototypes only.")
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self.gradient_clip_val, self.accumulate_grad_batches = gradient_clip_val, accumulate_grad_batches
        self.allow_unstable, self.check_finite = allow_unstable, check_finite

        self.backbone, self.head, self.task = backbone, head, task
        head.build(backbone.embed_dim)
        task.build(head)
        if rho == 0:
            placed = parameter_ids(bank.prototypes for bank in find_banks(backbone).values())
            for parameter in [*backbone.parameters(), *head.embedding_parameters()]:
                if id(parameter) not in placed:
                    parameter.requires_grad_(False)
        if task.unsupervised and self.parameter_groups()["encoder"]:
            head.bound_scale()
        metrics = {"train": task.train_metrics(), "val": task.metrics(), "test": task.metrics()}
        stages = {stage: StageMetrics(stage, of_stage) for stage, of_stage in metrics.items()}
        check_new(stages.values())
        self._pass: EvaluationPass | None = None
        self._configured: set[int] = set()  # parameters in the optimizers from the start
        self.stage_metrics = nn.ModuleDict({f"{stage}_metrics": held for stage, held in stages.items()})

    @compat.restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> "Self":
        """Load a module as Lightning does, safe for files of others: no pickle runs, no module is imported by its name.

        Arguments of the class take the place of those in the file. A module that was built from objects, not by the
        command line, has no backbone, head and task in its file: pass them.

        Raises:
            ValueError: If an argument is unknown or missing, the file is no checkpoint, or its hyperparameters name
                what :mod:`~ddcl_lightning.checkpoints.trust` does not allow.
        """
        arguments = inspect.signature(cls).parameters
        known = [name for name, argument in arguments.items() if argument.kind is not argument.VAR_KEYWORD]
        strange = [name for name in kwargs if name not in known and len(known) == len(arguments)]
        if strange:
            raise ValueError(f"{cls.__name__} has no argument {strange[0]!r}{nearest(strange[0], known)}")
        if weights_only:
            stored = stored_hyper_parameters(checkpoint_path)
            given = {name: stored[name] for name in ("_class_path", *known) if name in stored and name not in kwargs}
            check_hyper_parameters(cls, given, str(checkpoint_path))
            missing = [
                name
                for name in known
                if arguments[name].default is inspect.Parameter.empty and name not in stored and name not in kwargs
            ]
            if missing and hparams_file is None and "_class_path" not in stored:
                raise ValueError(
                    f"{', '.join(missing)} must be passed: {str(checkpoint_path)!r} holds the weights of a module that "
                    f"was built from objects, not how to build these. Build them as for training: "
                    f"{cls.__name__}.load_from_checkpoint(path, {', '.join(f'{name}=...' for name in missing)})."
                )
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)

    # Steps --------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One backward pass; every ``accumulate_grad_batches`` batches, one step of every optimizer."""
        readout = self(batch)
        losses = self.task.losses(readout, batch)
        loss = losses["loss"]
        if self.check_finite and not bool(torch.isfinite(loss)):
            values = {name: float(value.detach()) for name, value in losses.items()}
            raise FloatingPointError(
                f"the training loss is not finite at step {self.trainer.global_step}: {values}. Check the data for "
                "NaN, lower lr_prototypes or rho, set gradient_clip_val, or raise the temperature."
            )
        size = readout.pooled.shape[0]
        scale = batch_weight(size, loss.device) / self._window_size(batch_idx)
        # The backward pass of what ran under autocast belongs outside of it.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss * scale)
        self._log_step({**readout.signals, **losses}, size)
        self._metrics("train").reserve([*readout.signals, *losses])
        self.task.update_train_metrics(self._metrics("train").by_name(), readout, batch)
        if (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            self._step_optimizers()
        return loss.detach()

    def _log_step(self, values: Mapping[str, Tensor], size: int) -> None:
        """Log a training batch: in several processes the mean over all, on the steps at which it is read."""
        logged: Mapping[str, Tensor | float] = {name: value.detach() for name, value in values.items()}
        if world_size() > 1:
            if not compat.is_logging_step(self.trainer):
                return
            logged = mean_over_processes(logged, size)
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, on_step=True)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keep the loggers' step equal to ``global_step``, and save the checkpoints that are due by the clock."""
        compat.align_logger_step(self.trainer)
        compat.save_by_time(self.trainer, outputs, batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and metrics on validation data."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and metrics on test data."""
        self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Assignments ``(B, H, K)``, the data set's ``index`` ``(B,)`` where known, and what the task adds."""
        readout = self(batch)
        columns: dict[str, Tensor] = {}
        position = index(batch)
        if position is not None:
            columns["index"] = position
        if readout.assignments is not None:
            columns["assignments"] = readout.assignments
        return {**columns, **self.task.predict(readout, batch)}

    def on_train_epoch_end(self) -> None:
        """Log the training metrics of the task, over the batches of the epoch that this run has trained on."""
        self._log_values("train", self._metrics("train"))

    def on_validation_epoch_start(self) -> None:
        """Reset the losses and metrics of validation, one set per loader where there are several."""
        self._pass = EvaluationPass(self._metrics("val"), len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Reset the losses and metrics of the test, one set per loader where there are several."""
        self._pass = EvaluationPass(self._metrics("test"), len(self.trainer.num_test_batches))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set; those without labels to compare with are left out."""
        assert self._pass is not None
        self._log_values("val", self._pass)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        assert self._pass is not None
        self._log_values("test", self._pass)

    # Set-up -------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Callbacks that every run needs: checkpoints from which it resumes exactly."""
        from ddcl_lightning.callbacks.exact_resume import ExactResume

        present = any(isinstance(callback, ExactResume) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if present else [ExactResume()]

    def setup(self, stage: str) -> None:
        """Raise for settings under which two manual optimizers do not work."""
        if isinstance(self.trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"strategy {type(self.trainer.strategy).__name__} does not work with two manual optimizers; use "
                "strategy='ddp', or attach the callbacks to a module with one optimizer and two_timescale_groups."
            )
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise ValueError(
                f"precision {self.trainer.precision!r} rescales the two optimizers' gradients differently, which "
                "changes rho; use precision='bf16-mixed' or '32-true'."
            )
        if stage == "fit":
            refuse_callbacks(self.trainer, self)
            self._refuse_limits()

    def _refuse_limits(self) -> None:
        limit = self.trainer.limit_train_batches
        if limit == 0:
            raise ValueError("limit_train_batches must be > 0 to fit; got 0. Use validate, test or predict instead.")
        every = self.trainer.check_val_every_n_epoch
        if every is not None and every < 1:
            raise ValueError(
                f"check_val_every_n_epoch must be at least 1; got {every}. To validate never, set limit_val_batches=0."
            )

    def _refuse_classes(self) -> None:
        """Say at once, and in the data's own names, that there are more classes than the task knows of."""
        data = getattr(self.trainer, "datamodule", None)
        classes, known = getattr(data, "num_classes", None), getattr(self.task, "num_classes", None)
        if isinstance(classes, int) and isinstance(known, int) and classes > known:
            names = getattr(data, "class_names", None) or ()
            listed = ": " + ", ".join(map(repr, names[:12])) + ", ..." * (len(names) > 12) if names else ""
            raise ValueError(
                f"num_classes of the task must be at least that of the data, {classes}{listed}; got {known}. Set it "
                "(--model.task.init_args.num_classes), or correct the labels."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise for weights that are NaN or infinite."""
        require_finite(checkpoint.get("state_dict", {}), dict(self.named_parameters()))

    def on_fit_start(self) -> None:
        """Prepare the backbone with the training data: fit it, or encode the data ahead."""
        # Assignments far from a prototype underflow into denormal numbers, which a CPU multiplies ten times slower.
        torch.set_flush_denormal(True)
        compat.accept_checkpoints_after_steps()
        if not all(parameter.requires_grad for parameter in self.backbone.parameters()):
            compat.accept_frozen_modules_in_eval_mode()
        self._refuse_classes()
        # A resumed run restores the place in the data later on, into loaders that were not set up before.
        if self.trainer.ckpt_path is None and self.backbone.needs_data():
            self.trainer.fit_loop.setup_data()  # the number of batches is not known before
            batches = (compat.to_device(self.trainer, batch) for batch in compat.train_batches(self.trainer))
            self.backbone.prepare(batches, self.trainer.num_training_batches)
            for copy in compat.averaged_copies(self.trainer):  # made before the backbone was ready
                copy.backbone.load_state_dict(self.backbone.state_dict())  # type: ignore[union-attr]

    def on_fit_end(self) -> None:
        """Restore the treatment of denormal numbers of the process."""
        torch.set_flush_denormal(False)

    def on_train_start(self) -> None:
        """Set the number of steps that the learning rate schedule runs over."""
        self._total_steps = run_length(self.trainer, interval="step")
        lr_factor(self.lr_schedule, self.warmup_steps, self._total_steps, self.warmup_steps)  # refuse early
        refuse_idle_averages(self.trainer)
        if release_restored(self.trainer.optimizers, self._configured):
            compat.rebuild_ddp(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Add parameter groups of callbacks to the schedule, before their first backward pass."""
        if adopt_groups(self.trainer.optimizers, self, self._factor()):
            compat.rebuild_ddp(self.trainer)

    # Optimizers ---------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role, see :class:`ReadoutModule`; without an encoder where ``rho`` is 0."""
        groups = super().parameter_groups()
        return groups if self.rho > 0 else {**groups, "encoder": []}

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer for the prototypes and one for encoder and task, where they have something to train."""
        groups = self.parameter_groups()
        self._require_disjoint(groups)
        optimizers: list[Optimizer] = []
        if groups["prototypes"]:
            fast = self.prototype_optimizer.create(
                [{"params": groups["prototypes"], "lr": self.lr_prototypes, "name": "prototypes"}]
            )
            if isinstance(fast, TokenNormalized):
                fast.watch(self)
            optimizers.append(fast)
        rates = {"encoder": self.rho * self.lr_prototypes, "task": self.lr_task}
        slow = [{"params": groups[name], "lr": rate, "name": name} for name, rate in rates.items() if groups[name]]
        if slow:
            optimizers.append(self.encoder_optimizer.create(slow))
        if not optimizers:
            raise ValueError(
                "nothing to train: the head has no prototypes, the encoder is frozen and the task has no parameters."
            )
        self._configured = set()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["base_lr"] = group["set_lr"] = group["lr"]
            self._configured |= parameter_ids(group["params"])
        return optimizers

    def _window_size(self, batch_idx: int) -> int:
        """Batches in the accumulation window of this batch; the last one of an epoch may be shorter."""
        size, batches = self.accumulate_grad_batches, self.trainer.num_training_batches
        if not math.isfinite(batches):
            return size
        start = batch_idx - batch_idx % size
        return int(min(size, batches - start))

    def _step_optimizers(self) -> None:
        wrapped = self.optimizers()
        optimizers: list[LightningOptimizer] = wrapped if isinstance(wrapped, list) else [wrapped]
        self._require_ratio(optimizers)
        self._apply_schedule(optimizers)
        self._hold_prototypes(optimizers)
        if self.gradient_clip_val is not None:
            # Gradients are not scaled here: precisions that scale them are refused in setup.
            nn.utils.clip_grad_norm_(self._gradient_parameters(optimizers), self.gradient_clip_val)
        compat.count_one_step(optimizers)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    def _factor(self) -> float:
        return lr_factor(self.lr_schedule, self.trainer.global_step, self._total_steps, self.warmup_steps)

    def _hold_prototypes(self, optimizers: list[LightningOptimizer]) -> None:
        """Let prototypes stay that are frozen, for now or for good."""
        held = self.prototypes_held()
        for optimizer in (optimizer.optimizer for optimizer in optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"] if group.get("name") == "prototypes" else ():
                    if held or not parameter.requires_grad:
                        parameter.grad = None
                        if isinstance(optimizer, TokenNormalized):
                            optimizer.forget(parameter)

    def prototypes_held(self) -> bool:
        """True in the first steps, in which prototypes stay where they are."""
        return self.trainer.global_step < self.freeze_prototypes_steps

    def _require_disjoint(self, groups: dict[str, list[nn.Parameter]]) -> None:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        roles: dict[int, str] = {}
        for role, parameters in groups.items():
            for key in parameter_ids(parameters):
                if roles.setdefault(key, role) != role:
                    raise ValueError(
                        f"parameter {names.get(key, 'without a name')!r} is in two optimizers, among {roles[key]} and "
                        f"{role}. Leave it out of one of prototype_parameters and embedding_parameters of the head."
                    )

    def _require_ratio(self, optimizers: list[LightningOptimizer]) -> None:
        """Check the ratio of the current rates, which callbacks may have changed."""
        groups = self.parameter_groups()
        fast, slow = parameter_ids(groups["prototypes"]), parameter_ids(groups["encoder"])
        ratio = live_ratio([optimizer.optimizer for optimizer in optimizers], fast, slow)
        if ratio is None:
            return
        if ratio >= 1 and not self.allow_unstable:
            raise RuntimeError(
                f"rho = lr_encoder / lr_prototypes reached {ratio:.3g} at step {self.trainer.global_step}, but must "
                "stay below 1: something changed the rates in the optimizers' param_groups. Change them by one "
                "factor, or use the module's lr_schedule."
            )
        self.log("rho", ratio)

    def _apply_schedule(self, optimizers: list[LightningOptimizer]) -> None:
        factor = self._factor()
        for optimizer in optimizers:
            follows = not isinstance(optimizer.optimizer, TokenNormalized)
            for group in optimizer.param_groups:
                if group["lr"] != group["set_lr"] and group["set_lr"] > 0:
                    group["base_lr"] *= group["lr"] / group["set_lr"]  # it was rescaled: keep the factor
                group["lr"] = group["set_lr"] = group["base_lr"] * (factor if follows else 1.0)
                self.log(f"lr/{group['name']}", group["lr"])

    def _gradient_parameters(self, optimizers: list[LightningOptimizer]) -> list[nn.Parameter]:
        """Parameters that step along their gradients; the token-normalised step does not use them."""
        return [
            parameter
            for optimizer in optimizers
            if not isinstance(optimizer.optimizer, TokenNormalized)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    # Evaluation ---------------------------------------------------------------------------------

    def _evaluate(self, stage: str, batch: Batch, loader: int) -> None:
        readout = self(batch)
        losses = self.task.losses(readout, batch)
        assert self._pass is not None
        for metrics in self._pass.add(losses, readout.pooled.shape[0], loader):
            self.task.update_metrics(metrics.by_name(), readout, batch)

    def _metrics(self, stage: str) -> StageMetrics:
        held = self.stage_metrics[f"{stage}_metrics"]
        assert isinstance(held, StageMetrics)
        return held

    def _log_values(self, stage: str, counted: EvaluationPass | StageMetrics) -> None:
        values = counted.compute(lambda has_data: self.trainer.strategy.reduce_boolean_decision(has_data, all=False))
        # Equal on all processes already, which Lightning cannot know.
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(named, add_dataloader_idx=False, sync_dist=True)
