"""The LightningModule: any backbone, any head, any task, stepped on two time scales."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.arguments import as_plain, typed
from ddcl_lightning._utils.batch import Batch, index
from ddcl_lightning._utils.distributed import batch_weight, mean_over_processes, world_size
from ddcl_lightning._utils.training_data import TrainingBatches
from ddcl_lightning.backbones.base import Backbone
from ddcl_lightning.callbacks._compatibility import refuse_callbacks, refuse_idle_averages, require_output_folders
from ddcl_lightning.checkpoints.load_checks import check_loading, loading
from ddcl_lightning.checkpoints.reading import NUM_OPTIMIZER_TENSORS, num_optimizer_tensors
from ddcl_lightning.heads.base import Head
from ddcl_lightning.heads.contracts import check_built, check_columns, check_dimension, check_plug_in
from ddcl_lightning.metrics.evaluation_pass import EvaluationPass
from ddcl_lightning.metrics.stages import StageMetrics, check_new
from ddcl_lightning.nn.discovery import find_banks, prototypes_of
from ddcl_lightning.nn.guarded_state import require_finite
from ddcl_lightning.optim.added_groups import adopt_groups, release_restored
from ddcl_lightning.optim.factory import OptimizerConfig
from ddcl_lightning.optim.schedule import LRSchedule, Shape
from ddcl_lightning.optim.two_optimizers import TwoOptimizerModule, require_precision
from ddcl_lightning.optim.two_timescale import parameter_ids, run_length
from ddcl_lightning.tasks.base import Task, check_updates, update_stage
from ddcl_lightning.tasks.class_names import ClassNames

if TYPE_CHECKING:
    from typing_extensions import Self


class DDCLReadoutModule(ClassNames, TwoOptimizerModule):
    """Trains a backbone, a readout head and a task with two optimizers and one backward pass.

    The prototypes are the fast subsystem and the encoder the slow one: ``rho`` is the ratio of their rates, and the
    encoder's rate is derived from it, so that the encoder cannot be the faster one by accident. What
    belongs to the task (a classifier, a decoder) steps with the encoder's optimizer at its own rate.

    rho < 1 slows a collapse down; it does not prevent it (``docs/stability.md``). An encoder that trains on the
    quantization loss alone lowers it by shrinking its embeddings at any ratio, so such a head bounds their scale unless
    told otherwise.

    Args:
        backbone: Batch to tokens.
        head: Tokens to readout.
        task: Readout and batch to losses and metrics.
        lr_prototypes: Rate of the prototypes, > 0.
        rho: ``lr_encoder / lr_prototypes`` in [0, 1); at most 0.1 is the rule of thumb. 0 freezes the encoder.
        lr_task: Rate of the task's parameters, > 0; by default ``lr_prototypes``.
        prototype_optimizer: ``"Adam"``, ``"SGD"``, any other class of ``torch.optim``, a dotted path to one, or
            ``"TokenNormalized"`` (:class:`~ddcl_lightning.TokenNormalized`); or an
            :class:`~ddcl_lightning.OptimizerConfig` with its name and arguments other than ``lr``. Prototypes get no
            weight decay unless these say so.
        encoder_optimizer: The same for encoder and task.
        lr_schedule: ``"constant"``, ``"linear"`` or ``"cosine"``, or an :class:`~ddcl_lightning.LRSchedule` with a
            warm-up: one factor for all rates, but that of ``"TokenNormalized"``, which has no reason to shrink.
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
        prototype_optimizer: str | OptimizerConfig = "Adam",
        encoder_optimizer: str | OptimizerConfig = "Adam",
        lr_schedule: Shape | LRSchedule = "constant",
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        allow_unstable: bool = False,
        check_finite: bool = True,
        freeze_prototypes_steps: int = 0,
    ) -> None:
        super().__init__(
            lr_prototypes=lr_prototypes,
            rho=rho,
            lr_task=lr_task,
            prototype_optimizer=OptimizerConfig.of(prototype_optimizer),
            encoder_optimizer=OptimizerConfig.of(encoder_optimizer),
            lr_schedule=LRSchedule.of(lr_schedule),
            gradient_clip_val=gradient_clip_val,
            accumulate_grad_batches=accumulate_grad_batches,
            allow_unstable=allow_unstable,
            freeze_prototypes_steps=freeze_prototypes_steps,
        )
        # Under the CLI these are the config's plain data; outside of it objects must not be pickled into checkpoints.
        modules = () if compat.given_by_cli() else ("backbone", "head", "task")
        prototype_optimizer, encoder_optimizer = as_plain(prototype_optimizer), as_plain(encoder_optimizer)
        lr_schedule = as_plain(lr_schedule)
        self.save_hyperparameters(ignore=modules)
        self.check_finite = check_finite

        for plug_in in (backbone, head, task):
            check_plug_in(plug_in)
        self.backbone, self.head, self.task = backbone, head, task
        embed_dim = check_dimension(backbone, "embed_dim", "the dimension of its tokens", "__init__()")
        head.build(embed_dim)
        check_built(head, embed_dim)
        task.build(head)
        if rho == 0:
            placed = parameter_ids(prototypes_of(find_banks(backbone).values()))
            for parameter in [*backbone.parameters(), *head.embedding_parameters()]:
                if id(parameter) not in placed:
                    parameter.requires_grad_(False)
        if task.unsupervised and self.parameter_groups()["encoder"]:
            head.bound_scale()
        metrics = {"train": task.train_metrics(), "val": task.metrics(), "test": task.metrics()}
        stages = {stage: StageMetrics(stage, of_stage) for stage, of_stage in metrics.items()}
        check_new(stages.values())
        check_updates(task, stages)
        self._pass: EvaluationPass | None = None
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
            ValueError: If an argument is unknown, missing or of another type, the file is no checkpoint or one of
                another model than the arguments make, or its hyperparameters name what
                :mod:`~ddcl_lightning.checkpoints.trust` does not allow.
        """
        check_loading(cls, checkpoint_path, kwargs, hparams_file=hparams_file, weights_only=weights_only)
        with loading(cls, checkpoint_path, kwargs):
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )

    # Steps --------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One backward pass; every ``accumulate_grad_batches`` batches, one step of every optimizer."""
        readout = self(batch)
        losses = self.losses(readout, batch)
        loss = losses["loss"]
        if self.check_finite and not bool(torch.isfinite(loss)):
            values = {name: float(value.detach()) for name, value in losses.items()}
            raise FloatingPointError(
                f"the training loss is not finite at step {self.trainer.global_step}: {values}. Check the data for "
                "NaN, lower lr_prototypes or rho, set gradient_clip_val, or raise the temperature."
            )
        size = readout.pooled.shape[0]
        scale = batch_weight(size, loss.device) / self.window_size(batch_idx)
        # The backward pass of what ran under autocast belongs outside of it.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss * scale)
        self._log_step({**readout.signals, **losses}, size)
        self._metrics("train").reserve([*readout.signals, *losses])
        update_stage(self.task, self._metrics("train"), readout, batch)
        if self.steps_after(batch_idx):
            self.step_optimizers()
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
        return {**columns, **check_columns(self.task, self.task.predict(readout, batch), len(readout.pooled))}

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
        require_precision(self.trainer.precision)
        if stage == "fit":
            refuse_callbacks(self.trainer, self)
            require_output_folders(self.trainer)
            self._refuse_limits()

    def _refuse_limits(self) -> None:
        limit = self.trainer.limit_train_batches
        if limit == 0:
            raise ValueError("limit_train_batches must be > 0 to fit; got 0. Use validate, test or predict instead.")
        if self.trainer.val_check_interval == 0:
            raise ValueError("val_check_interval must be > 0; got 0. To validate never, set limit_val_batches=0.")
        every = self.trainer.check_val_every_n_epoch
        if every is not None and every < 1:
            raise ValueError(
                f"check_val_every_n_epoch must be at least 1; got {every}. To validate never, set limit_val_batches=0."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how many tensors the optimizers hold, which a run that goes on from the file must find there."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint[NUM_OPTIMIZER_TENSORS] = num_optimizer_tensors(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise for weights that are NaN or infinite."""
        super().on_load_checkpoint(checkpoint)
        require_finite(checkpoint.get("state_dict", {}), dict(self.named_parameters()))

    def on_fit_start(self) -> None:
        """Prepare the backbone with the training data: fit it, or encode the data ahead."""
        super().on_fit_start()
        # Assignments far from a prototype underflow into denormal numbers, which a CPU multiplies ten times slower.
        torch.set_flush_denormal(True)
        compat.accept_checkpoints_after_steps()
        if not all(parameter.requires_grad for parameter in self.backbone.parameters()):
            compat.accept_frozen_modules_in_eval_mode()
        # A resumed run restores the place in the data later on, into loaders that were not set up before.
        if self.trainer.ckpt_path is None:
            batches = TrainingBatches(self.trainer)
            self.backbone.prepare(batches)
            for copy in compat.averaged_copies(self.trainer) if batches.used else ():  # made before it was ready
                copy.backbone.load_state_dict(self.backbone.state_dict())  # type: ignore[union-attr]

    def on_fit_end(self) -> None:
        """Restore the treatment of denormal numbers of the process."""
        torch.set_flush_denormal(False)

    def on_train_start(self) -> None:
        """Set the number of steps that the learning rate schedule runs over."""
        self._total_steps = run_length(self.trainer, interval="step")
        self.lr_schedule.require_length(self._total_steps)  # refuse early
        refuse_idle_averages(self.trainer)
        if release_restored(self.trainer.optimizers, self._configured):
            compat.rebuild_ddp(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Add parameter groups of callbacks to the schedule, before their first backward pass."""
        if adopt_groups(self.trainer.optimizers, self, self.schedule_factor()):
            compat.rebuild_ddp(self.trainer)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role, see :class:`ReadoutModule`; without an encoder where ``rho`` is 0."""
        groups = super().parameter_groups()
        return groups if self.rho > 0 else {**groups, "encoder": []}

    # Evaluation ---------------------------------------------------------------------------------

    def _evaluate(self, stage: str, batch: Batch, loader: int) -> None:
        readout = self(batch)
        losses = self.losses(readout, batch)
        assert self._pass is not None
        for metrics in self._pass.add(losses, readout.pooled.shape[0], loader):
            update_stage(self.task, metrics, readout, batch)

    def _metrics(self, stage: str) -> StageMetrics:
        held = self.stage_metrics[f"{stage}_metrics"]
        assert isinstance(held, StageMetrics)
        return held

    def _log_values(self, stage: str, counted: EvaluationPass | StageMetrics) -> None:
        values = counted.compute(lambda has_data: self.trainer.strategy.reduce_boolean_decision(has_data, all=False))
        # Equal on all processes already, which Lightning cannot know.
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(named, add_dataloader_idx=False, sync_dist=True)
