"""A temperature that falls, on the scale of the data."""

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ddcl_lightning.bank import PrototypeBank
from ddcl_lightning.callbacks._base import log_name
from ddcl_lightning.collect import collect_tokens, execution_order
from ddcl_lightning.functional import critical_temperature
from ddcl_lightning.probe import require_banks

Schedule = Literal["exponential", "linear", "cosine"]
REFERENCE_TOKENS = 16_384  # enough for a covariance of a few thousand dimensions


class TemperatureAnnealing(Callback):
    """Lowers the temperature of every bank from ``start`` to ``end``.

    A temperature means something only against the spread of the tokens. By default both ends are fractions of the
    critical temperature ``T_c = 4 lambda_max(Cov(z))`` (``2 lambda_max`` with detached assignments), measured per
    head on the tokens that reach the bank when training starts: above 1 the bank collapses towards the mean, whatever
    the learning rates; far below it assignments are hard. Learning rates or data in other units change nothing.

    Args:
        start: First temperature, > 0.
        end: Last temperature, > 0 and at most ``start``; the floor ``T_min`` of the exponential schedule.
        unit: ``"critical"``: fractions of T_c. ``"absolute"``: squared distances.
        schedule: ``"exponential"`` (``max(end, start exp(-e / tau))``, the paper's), ``"linear"``, ``"cosine"``, or a callable
            from the position e (in epochs or steps) to a temperature in the same unit, which must not increase.
        per: Count e in ``"epoch"`` s or in optimizer ``"step"`` s.
        tau: Time constant of the exponential schedule; by default such that it reaches ``end`` after 80 % of
            ``duration``.
        duration: Epochs or steps until ``end``; by default the length of the run.

    Raises:
        ValueError: If the schedule increases or an argument is out of its range; at the start of training, if the
            length of the run is needed and unknown.
    """

    def __init__(
        self,
        start: float = 0.1,
        end: float = 0.005,
        unit: Literal["critical", "absolute"] = "critical",
        schedule: Schedule | Callable[[float], float] = "exponential",
        per: Literal["epoch", "step"] = "epoch",
        tau: float | None = None,
        duration: float | None = None,
    ) -> None:
        for name, value in (("start", start), ("end", end)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite temperature > 0; got {value}.")
        if end > start:
            raise ValueError(
                f"the temperature must not increase (Theorem 3 and deterministic annealing both need it to fall); got "
                f"start = {start} and end = {end}. Swap them."
            )
        if unit not in ("critical", "absolute"):
            raise ValueError(f"unit must be 'critical' or 'absolute'; got {unit!r}.")
        if per not in ("epoch", "step"):
            raise ValueError(f"per must be 'epoch' or 'step'; got {per!r}.")
        if not callable(schedule) and schedule not in ("exponential", "linear", "cosine"):
            raise ValueError(f"schedule must be 'exponential', 'linear', 'cosine' or a callable; got {schedule!r}.")
        if tau is not None and (schedule != "exponential" or not tau > 0):
            raise ValueError(f"tau must be > 0 and belongs to schedule='exponential'; got {tau} with {schedule!r}.")
        if duration is not None and not duration > 0:
            raise ValueError(f"duration must be > 0 {per}s; got {duration}.")
        self.start, self.end, self.unit, self.schedule = start, end, unit, schedule
        self.per, self.tau, self.duration = per, tau, duration
        self._references: dict[str, list[float]] = {}  # T_c of each head, by bank
        self._length: float | None = None
        self._last = math.inf

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without banks and a callable that increases, before anything runs."""
        if stage != "fit":
            return
        require_banks(pl_module, type(self).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the critical temperature of banks that nobody has measured, and set the temperature."""
        banks = require_banks(pl_module, type(self).__name__)
        if self._length is None:
            self._length = self._run_length(trainer)
            self._refuse_increase()
        missing = [name for name in banks if name not in self._references]
        if missing and self.unit == "critical":
            for name in execution_order(trainer, pl_module, banks):
                if name in missing:
                    tokens = collect_tokens(trainer, pl_module, name, banks[name], max_tokens=REFERENCE_TOKENS)
                    self.set_reference(trainer, name, banks[name], tokens)
        self._apply(trainer, banks)

    def set_reference(self, trainer: pl.Trainer, name: str, bank: PrototypeBank, tokens: Tensor) -> None:
        """Take T_c of a bank from a sample of its tokens, ``(H, N, d)``, and set its temperature."""
        if self.unit == "critical":
            critical = critical_temperature(tokens, detach_assignments=bank.detach_assignments)
            if not bool((critical > 0).all()):
                raise ValueError(
                    f"the tokens that reach bank {name!r} have no variance, so no temperature is critical. Check the "
                    "encoder: it maps everything to one point."
                )
            self._references[name] = critical.tolist()
        if self._length is None:
            self._length = self._run_length(trainer)
        self._set(name, bank, self.value(self._position(trainer)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the temperature of the epoch."""
        if self.per == "epoch":
            self._apply(trainer, require_banks(pl_module, type(self).__name__))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature of the step."""
        banks = require_banks(pl_module, type(self).__name__)
        if self.per == "step":
            self._apply(trainer, banks)
        if batch_idx % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            for name, bank in banks.items():
                pl_module.log(log_name(name, "temperature"), bank.temperature.mean())

    def value(self, position: float) -> float:
        """Temperature at a position (epochs or steps from the start), in the callback's unit."""
        if callable(self.schedule):
            return float(self.schedule(position))
        length = self.duration if self.duration is not None else self._length
        if self.schedule == "exponential":
            tau = self.tau
            if tau is None:
                assert length is not None
                if self.end == self.start:
                    return self.start
                tau = 0.8 * length / math.log(self.start / self.end)
            return max(self.end, self.start * math.exp(-position / tau))
        assert length is not None
        progress = min(1.0, position / max(length - 1, 1e-12))
        share = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.end + (self.start - self.end) * share

    def _apply(self, trainer: pl.Trainer, banks: dict[str, PrototypeBank]) -> None:
        value = self.value(self._position(trainer))
        if value > self._last * (1 + 1e-9):
            raise ValueError(
                f"the temperature must not increase; the schedule went from {self._last:.6g} to {value:.6g} at "
                f"{self.per} {self._position(trainer):g}."
            )
        self._last = value
        for name, bank in banks.items():
            self._set(name, bank, value)

    def _set(self, name: str, bank: PrototypeBank, value: float) -> None:
        if self.unit == "absolute":
            bank.set_temperature(value)
        elif name in self._references:
            bank.set_temperature(value * torch.tensor(self._references[name]))

    def _position(self, trainer: pl.Trainer) -> float:
        return float(trainer.current_epoch if self.per == "epoch" else trainer.global_step)

    def _needs_length(self) -> bool:
        free = self.schedule == "exponential" and self.tau is not None
        return self.duration is None and not free and not callable(self.schedule)

    def _run_length(self, trainer: pl.Trainer) -> float:
        steps = trainer.estimated_stepping_batches
        per_epoch = max(1.0, float(trainer.num_training_batches))
        length = float(steps) if self.per == "step" else math.ceil(steps / per_epoch)
        if not math.isfinite(length) and self._needs_length():
            raise ValueError(
                "the length of the run is unknown, so the temperature schedule has no end. Set max_epochs or max_steps, or "
                "give TemperatureAnnealing a duration (or a tau)."
            )
        return length

    def _refuse_increase(self) -> None:
        """A callable is tried at every position that the run can reach, up to a bound."""
        assert self._length is not None
        reach = self.duration or self._length
        count = int(min(reach, 100_000)) + 1 if math.isfinite(reach) else 1000
        previous = math.inf
        for position in range(count):
            value = self.value(position)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"schedule must give finite temperatures > 0; got {value} at {self.per} {position}.")
            if value > previous * (1 + 1e-9):
                raise ValueError(
                    f"schedule must not increase; it goes from {previous:.6g} to {value:.6g} at {self.per} {position}."
                )
            previous = value

    def state_dict(self) -> dict[str, Any]:
        """Critical temperatures and the length of the run, so that a resumed schedule is the same one."""
        return {"references": self._references, "length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._references, self._length = dict(state_dict["references"]), state_dict["length"]
