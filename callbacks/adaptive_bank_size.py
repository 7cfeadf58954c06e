"""A bank that finds its own number of prototypes."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import rebuild_ddp
from ddcl_lightning._utils.distributed import from_first_process
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning._utils.seeding import resolve_seed
from ddcl_lightning.callbacks._base import BankCallback, is_new_run, log_name
from ddcl_lightning.heads.base import Head
from ddcl_lightning.monitoring.token_sampling import collect_tokens
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import require_banks
from ddcl_lightning.nn.moving_bank import MovingBank
from ddcl_lightning.optim.resizing import Resize, SizeRules, plan_resize, resize_bank
from ddcl_lightning.optim.two_timescale import run_length


class AdaptiveBankSize(Callback):
    """Callback that splits, merges and prunes prototypes in training, so that a bank finds its K (section 8.7).

    At intervals it takes a sample of the tokens that reach the bank and

    - *prunes* a prototype that held less than ``prune_fraction / K`` of them at ``patience`` checks in a row;
    - *merges* prototypes that coincide, closer than ``merge_distance * sqrt(T)``;
    - *splits* a prototype where T is below its own critical temperature (4 lambda_max of the covariance of its
      tokens, 2 with detached assignments), so that its halves will not fall together again, and where two clusters
      fit its tokens significantly better than one Gaussian (:func:`~ddcl_lightning.functional.split_test`). The first
      alone is deterministic annealing: it goes on splitting for as long as T falls. The second ends it.

    The test asks whether tokens are one Gaussian: a long or flat distribution is a reason to split too, and clusters
    that overlap to one bell stay together; many alike may pass for one, so a start with 4 can end better than one with
    2. A split is not undone for being needless, so start with few. With ``significance=None`` the last temperature sets
    K.

    A change comes right after an optimizer step. The parameter stays the same object; both halves of a prototype take
    over its rows of the optimizers' state (Adam, SGD, RMSprop, ...). Checkpoints load at the size that they were saved
    with, under plain DDP all processes change alike, and ``CollapseWarning`` starts its history anew. Each check takes
    one forward pass over the training data, up to the bank. Frozen prototypes (``requires_grad_(False)``, or the
    module's ``freeze_prototypes_steps``) keep their number.

    Args:
        rules: Smallest and largest K, the significance of the test and the thresholds above
            (:class:`~ddcl_lightning.SizeRules`); by default from 2 to 64 prototypes.
        frequency: Epochs or steps between checks, at least 1.
        interval: ``"epoch"`` or ``"step"`` (a batch after which several optimizers step counts as one).
        duration: Epochs or steps after which the size stays, > 0; by default 80 % of the run, so that what has split
            last can settle.
        banks: Which banks, by the pattern of their names, as in ``TemperatureAnnealing``.
        max_tokens: Size of the sample.
        seed: Seed of sample and test; by default that of ``seed_everything``, or 0.

    Attributes:
        history: ``(global_step, K)`` at the start and after every change, by bank.

    Raises:
        ValueError: If an argument is out of its range; before training, if a bank has several heads (they share K),
            moves inside of a quantizer or lies in a head whose shapes depend on K, if the strategy is neither a single
            device nor DDP, if weights are averaged, or if no bank has such a name.
    """

    @typed
    def __init__(
        self,
        rules: SizeRules | None = None,
        frequency: int = 1,
        interval: Literal["epoch", "step"] = "epoch",
        duration: float | None = None,
        banks: str = "*",
        max_tokens: int = 16_384,
        seed: int | None = None,
    ) -> None:
        if frequency < 1:
            raise ValueError(f"frequency must be at least 1 {interval}; got {frequency}. Pass 1 or more.")
        if interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step'; got {interval!r}. Choose one of them.")
        if duration is not None and not duration > 0:
            raise ValueError(f"duration must be > 0 {interval}s; got {duration}. Leave it out to follow the whole run.")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {max_tokens}. Pass 1 or more.")
        self.rules = rules or SizeRules()
        self.frequency, self.interval, self.duration, self.banks = frequency, interval, duration, banks
        self.max_tokens, self.seed = max_tokens, resolve_seed(seed)
        self._banks: dict[str, PrototypeBank] = {}
        self._step_before = 0
        self._forget()

    def _forget(self) -> None:
        self.history: dict[str, list[tuple[int, int]]] = {}
        self._idle: dict[str, list[int]] = {}  # checks in a row for which each prototype was idle
        self._end: float | None = None
        self._steps = 0

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint, different for callbacks with different ``banks``."""
        return super().state_key if self.banks == "*" else self._generate_state_key(banks=self.banks)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop the history of an earlier run of the trainer, unless this one continues it."""
        if is_new_run(trainer, stage):
            self._forget()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the banks, and refuse what cannot change its size."""
        self._banks = require_banks(pl_module, type(self).__name__, self.banks)
        if self._banks and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"strategy {type(trainer.strategy).__name__} does not let a parameter change its shape, which "
                "AdaptiveBankSize needs; use a single device or strategy='ddp'."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) and self._banks:
                raise ValueError(
                    f"{type(callback).__name__} averages weights of one shape, which AdaptiveBankSize changes. Remove "
                    "one of them, or average in a second run that starts from the checkpoint of the first."
                )
        for name, bank in self._banks.items():
            self._require_free_size(pl_module, name, bank)
            self.history.setdefault(name, [(trainer.global_step, bank.num_prototypes)])

    def _require_free_size(self, module: pl.LightningModule, name: str, bank: PrototypeBank) -> None:
        if isinstance(bank, MovingBank):
            raise ValueError(
                f"a bank that changes its size must be moved by an optimizer; got {name!r}, codes that a quantizer "
                "moves inside and whose number is an argument of it. Narrow banks of AdaptiveBankSize, or build the "
                "quantizer with code_update='optimizer'."
            )
        if bank.num_heads > 1:
            raise ValueError(
                "num_heads must be 1 for a bank that changes its size, since all heads share one K; got "
                f"{bank.num_heads} in {name!r}. Use several layers of one head."
            )
        if not self.rules.min_prototypes <= bank.num_prototypes <= self.rules.max_prototypes:
            raise ValueError(
                f"num_prototypes must start between min_prototypes = {self.rules.min_prototypes} and max_prototypes = "
                f"{self.rules.max_prototypes}; got {bank.num_prototypes} in {name!r}. Change num_prototypes, or widen "
                "the bounds."
            )
        path = name.split(".")
        for depth in range(len(path)):
            owner = module.get_submodule(".".join(path[:depth]))
            reason = owner.fixed_bank_size() if isinstance(owner, Head) else None
            if reason is not None:
                raise ValueError(
                    f"the number of prototypes of {name!r} must stay as built: {reason}. Remove AdaptiveBankSize, or "
                    "narrow its banks."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the end of the changes where the run starts; a resumed run keeps that of the first."""
        if self._end is None:
            self._end = 0.8 * run_length(trainer, self.interval) if self.duration is None else self.duration

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the optimizer step at which the batch starts."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the sizes of the banks after every ``frequency`` steps."""
        if trainer.global_step > self._step_before:
            self._steps += 1
            if self.interval == "step":
                self._check(trainer, pl_module, self._steps)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the sizes of the banks after every ``frequency`` epochs, and log K."""
        if self.interval == "epoch":
            self._check(trainer, pl_module, trainer.current_epoch + 1)
        for name, bank in self._banks.items():
            pl_module.log(log_name(name, "num_prototypes"), float(bank.num_prototypes), sync_dist=True)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, position: int) -> None:
        assert self._end is not None
        if position % self.frequency or position > self._end:
            return
        changed = [name for name, bank in self._banks.items() if self._resize(trainer, module, name, bank)]
        if changed:
            rebuild_ddp(trainer)

    def _resize(self, trainer: pl.Trainer, module: pl.LightningModule, name: str, bank: PrototypeBank) -> bool:
        """Look at one bank; whether it has changed. One that is frozen, for now or for good, has not."""
        held = getattr(module, "prototypes_held", None)  # any LightningModule may hold the bank
        if not bank.prototypes.requires_grad or (held is not None and held()):
            return False
        plan = self._plan(trainer, module, name, bank)
        self._idle[name] = plan.idle
        if not plan.changes:
            return False
        before = bank.num_prototypes
        resize_bank(bank, plan, trainer.optimizers)
        self.history[name].append((trainer.global_step, bank.num_prototypes))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BankCallback):
                callback.bank_resized(name)
        shown = "; ".join(plan.changes[:4]) + ("; ..." if len(plan.changes) > 4 else "")
        rank_zero_info(
            f"AdaptiveBankSize: {name} from {before} to {bank.num_prototypes} prototypes at step "
            f"{trainer.global_step}: {shown}."
        )
        return True

    def _plan(self, trainer: pl.Trainer, module: pl.LightningModule, name: str, bank: PrototypeBank) -> Resize:
        """Decided on one process."""
        tokens = collect_tokens(trainer, module, name, bank, max_tokens=self.max_tokens, seed=self.seed)

        def decide() -> Resize:
            return plan_resize(
                tokens[0],
                bank.prototypes[0].detach(),
                float(bank.temperature[0]),
                self.rules,
                self._idle.get(name, [0] * bank.num_prototypes),
                detach_assignments=bank.detach_assignments,
                seed=self.seed,
            )

        return from_first_process(decide, f"the size of bank {name!r} cannot be judged")

    def state_dict(self) -> dict[str, Any]:
        """Sizes so far, idle prototypes and the end of the changes: a resumed run decides as the uninterrupted one."""
        history = {name: [list(point) for point in points] for name, points in self.history.items()}
        end = None if self._end is None or math.isinf(self._end) else self._end
        return {"history": history, "idle": dict(self._idle), "end": end, "steps": self._steps}

    @restores(history=Mapping, idle=Mapping, end=(int, float, type(None)), steps=int)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore sizes, idle counts and the end of the changes."""
        self.history = {name: [(step, size) for step, size in points] for name, points in state_dict["history"].items()}
        self._idle, self._end = dict(state_dict["idle"]), state_dict["end"]
        self._steps = state_dict["steps"]
