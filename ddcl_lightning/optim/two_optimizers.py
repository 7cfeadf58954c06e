"""Manual stepping with two optimizers: prototypes at their rate, everything else at rho times that or its own."""

import math
from abc import abstractmethod

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer

from ddcl_lightning._utils import compat
from ddcl_lightning.optim.factory import OptimizerConfig, OptimizerSpec
from ddcl_lightning.optim.schedule import LRSchedule
from ddcl_lightning.optim.token_normalized import TokenNormalized
from ddcl_lightning.optim.two_timescale import check_ratio, live_ratio, parameter_ids


class TwoOptimizerModule(pl.LightningModule):
    """A LightningModule that steps its prototypes and the rest with an optimizer each, after one backward pass.

    Subclasses say what belongs where (``parameter_groups``), and call ``step_optimizers`` from their training step.
    The ratio of the rates is checked before every step, whoever has changed them.

    Args:
        lr_prototypes: Rate of the prototypes, > 0.
        rho: Rate of the encoder over that of the prototypes, in [0, 1), or more where ``allow_unstable``.
        lr_task: Rate of what is neither, > 0; by default ``lr_prototypes``.
        prototype_optimizer: Optimizer of the prototypes.
        encoder_optimizer: Optimizer of encoder and task.
        lr_schedule: One factor for all rates, but that of :class:`TokenNormalized`.
        gradient_clip_val: Largest norm of all gradients together, > 0; None does not clip.
        accumulate_grad_batches: Batches per optimizer step, at least 1.
        allow_unstable: Accept rho >= 1, with a warning.
        freeze_prototypes_steps: Optimizer steps, at least 0, in which prototypes stay where they are.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        lr_prototypes: float,
        rho: float,
        lr_task: float | None,
        prototype_optimizer: OptimizerConfig,
        encoder_optimizer: OptimizerConfig,
        lr_schedule: LRSchedule,
        gradient_clip_val: float | None,
        accumulate_grad_batches: int,
        allow_unstable: bool,
        freeze_prototypes_steps: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, value in (("lr_prototypes", lr_prototypes), ("lr_task", lr_task)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and > 0; got {value}. Pass a positive rate.")
        check_ratio(rho, allow_unstable=allow_unstable)
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(
                f"gradient_clip_val must be > 0, or None not to clip; got {gradient_clip_val}. Leave it out, or pass a "
                "norm such as 1.0."
            )
        if accumulate_grad_batches < 1:
            raise ValueError(
                f"accumulate_grad_batches must be at least 1; got {accumulate_grad_batches}. Pass 1 or more."
            )
        if freeze_prototypes_steps < 0:
            raise ValueError(
                f"freeze_prototypes_steps must be at least 0 steps; got {freeze_prototypes_steps}. Pass 0 or more."
            )
        if rho >= 1:
            pl.utilities.rank_zero_warn(
                f"rho = {rho} >= 1: prototypes lag behind the encoder, and where nothing bounds the scale of the "
                "embeddings and the encoder has no loss of its own, they collapse sooner."
            )
        self.lr_prototypes, self.rho, self.allow_unstable = lr_prototypes, rho, allow_unstable
        self.lr_task = lr_prototypes if lr_task is None else lr_task
        self.prototype_optimizer = OptimizerSpec("prototype_optimizer", prototype_optimizer, weight_decay=0.0)
        self.encoder_optimizer = OptimizerSpec("encoder_optimizer", encoder_optimizer)
        if self.encoder_optimizer.optimizer_class is TokenNormalized:
            raise ValueError("encoder_optimizer must step along gradients; TokenNormalized moves prototypes only.")
        self.lr_schedule, self.gradient_clip_val = lr_schedule, gradient_clip_val
        self.accumulate_grad_batches, self.freeze_prototypes_steps = accumulate_grad_batches, freeze_prototypes_steps
        self._configured: set[int] = set()  # parameters in the optimizers from the start
        self._total_steps = math.inf

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role: ``prototypes``, ``encoder`` and ``task``."""

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

    def steps_after(self, batch_idx: int) -> bool:
        """True if the optimizers step after a batch: the last one of its accumulation window or of the epoch."""
        return (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch

    def window_size(self, batch_idx: int) -> int:
        """Batches in the accumulation window of a batch; the last one of an epoch may be shorter."""
        size, batches = self.accumulate_grad_batches, self.trainer.num_training_batches
        if not math.isfinite(batches):
            return size
        start = batch_idx - batch_idx % size
        return int(min(size, batches - start))

    def step_optimizers(self) -> None:
        """One step of every optimizer, counted as one, with the rates of the schedule and clipped gradients."""
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

    def schedule_factor(self) -> float:
        """Factor of the schedule at the step that comes next."""
        return self.lr_schedule.factor(self.trainer.global_step, self._total_steps)

    def prototypes_held(self) -> bool:
        """True in the first steps, in which prototypes stay where they are."""
        return self.trainer.global_step < self.freeze_prototypes_steps

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
        factor = self.schedule_factor()
        for optimizer in optimizers:
            follows = not isinstance(optimizer.optimizer, TokenNormalized)
            for group in optimizer.param_groups:
                if group["lr"] != group["set_lr"] and group["set_lr"] > 0:
                    group["base_lr"] *= group["lr"] / group["set_lr"]  # it was rescaled: keep the factor
                group["lr"] = group["set_lr"] = group["base_lr"] * (factor if follows else 1.0)
                self.log(f"lr/{group['name']}", group["lr"])

    def _gradient_parameters(self, optimizers: list[LightningOptimizer]) -> list[nn.Parameter]:
        """Parameters that step along their gradients; the token-normalized step does not use them."""
        return [
            parameter
            for optimizer in optimizers
            if not isinstance(optimizer.optimizer, TokenNormalized)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]


def require_precision(precision: str | int | None) -> None:
    """Refuse half precision, whose gradients are rescaled.

    A trainer on a CPU never has it: Lightning takes ``"bf16-mixed"`` in its place, with a warning.

    Args:
        precision: As a trainer takes it.

    Raises:
        ValueError: If it is fp16.
    """
    if str(precision) in ("16", "16-mixed", "16-true", "transformer-engine-float16"):
        raise ValueError(
            f"precision must not be fp16, which rescales the gradients of the two optimizers differently and changes "
            f"rho; got {precision!r}. Use precision='bf16-mixed' or '32-true'."
        )
