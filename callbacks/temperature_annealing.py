"""A temperature that falls, on the scale of the data."""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import averaged_copies
from ddcl_lightning._utils.distributed import inform
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._base import is_new_run, log_name
from ddcl_lightning.monitoring.token_sampling import collect_tokens, execution_order
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks, require_banks
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature
from ddcl_lightning.optim.two_timescale import run_length

Schedule = Literal["exponential", "linear", "cosine"]
REFERENCE_TOKENS = 16_384  # enough for a covariance of a few thousand dimensions
MAX_TRIED = 100_000  # positions at which a callable is tried before training; beyond, every step checks itself


class TemperatureAnnealing(Callback):
    """Callback that lowers the temperature of every bank from ``start`` to ``end``.

    Numbers are fractions of the critical temperature ``T_c = 4 lambda_max(Cov(z))`` (``2 lambda_max`` with detached
    assignments) of the tokens that reach each bank, head by head: above 1 the bank collapses towards the mean, whatever
    the learning rates; far below it assignments are hard. Data in other units change nothing. What a bank has not been
    initialized with is measured on a sample of its tokens when training starts.

    A copy of the module that ``WeightAveraging`` keeps gets the same temperature: its average would lag behind.

    Several callbacks, each for ``banks`` of its own, give several schedules; a list of ends gives every head its own.

    Args:
        start: First temperature, a number > 0, a list with one per head, or a :class:`~ddcl_lightning.Temperature` for
            banks whose temperature is absolute; not used by a callable.
        end: Last temperature, in the same unit, at most ``start``; ``T_min`` of the exponential schedule.
        schedule: ``"exponential"`` (``max(end, start exp(-e / tau))``, the paper's), ``"linear"``, ``"cosine"``, or a
            callable from the position e to a temperature in the same unit, which must not increase.
        interval: Count e in epochs (``"epoch"``) or in optimizer steps (``"step"``; a batch after which several
            optimizers step counts as one).
        tau: Time constant of the exponential schedule, in the unit of e; by default such that it reaches ``end`` after
            ``duration``.
        duration: Epochs or steps until ``end``; by default the length of the run, for the exponential schedule
            80 % of it.
        banks: Which banks, by the pattern of their names (``"*levels.1.*"``; ``*``, ``?`` and ``[...]`` as in file
            names).

    Raises:
        ValueError: If the schedule increases or an argument is out of its range; at the start of training, if no bank
            has such a name or another callback sets its temperature too, if a list has not one value per head, or if
            the length of the run is needed and unknown.
    """

    @typed
    def __init__(
        self,
        start: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        end: float | list[float] | Temperature = 0.005,
        schedule: Schedule | Callable[[float], float] = "exponential",
        interval: Literal["epoch", "step"] = "epoch",
        tau: float | None = None,
        duration: float | None = None,
        banks: str = "*",
    ) -> None:
        first_temperature, last_temperature = _temperature("start", start), _temperature("end", end)
        if first_temperature.unit != last_temperature.unit:
            raise ValueError(
                f"start and end must be temperatures of one unit; got {start} and {end}. Give both in the same unit."
            )
        self._unit = first_temperature.unit
        self._ends = _per_head(first_temperature.value, last_temperature.value)
        for first, last in self._ends:
            if last > first:
                raise ValueError(
                    f"the temperature must not increase (Theorem 3 and deterministic annealing both need it to fall); "
                    f"got start = {first} and end = {last}. Swap them."
                )
        if interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step'; got {interval!r}. Choose one of them.")
        if not callable(schedule) and schedule not in ("exponential", "linear", "cosine"):
            raise ValueError(
                f"schedule must be 'exponential', 'linear', 'cosine' or a callable; got {schedule!r}. Choose one of "
                "them."
            )
        if tau is not None and (schedule != "exponential" or not tau > 0):
            raise ValueError(
                f"tau must be > 0 and belongs to schedule='exponential'; got {tau} with {schedule!r}. Leave tau out, "
                "or set schedule='exponential'."
            )
        if duration is not None and not duration > 0:
            raise ValueError(f"duration must be > 0 {interval}s; got {duration}. Leave it out to follow the whole run.")
        self.start, self.end, self.schedule = start, end, schedule
        self.interval, self.tau, self.duration, self.banks = interval, tau, duration, banks
        self._banks: dict[str, PrototypeBank] = {}
        self._step_before = 0
        self._forget()

    def _forget(self) -> None:
        self._length: float | None = None
        self._steps = 0
        self._last = [math.inf] * len(self._ends)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint, different for callbacks with different ``banks``."""
        return super().state_key if self.banks == "*" else self._generate_state_key(banks=self.banks)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop the schedule of an earlier run of the trainer, unless this one continues it."""
        if is_new_run(trainer, stage):
            self._forget()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the banks, which the module may have built in its own ``setup`` or ``configure_model``."""
        banks = require_banks(pl_module, type(self).__name__, self.banks)
        self._banks = {name: bank for name, bank in banks.items() if bank.temperature_state.unit != "distortion"}
        if banks and not self._banks:
            inform(f"{type(self).__name__} stays idle: the temperature of {', '.join(banks)} follows its distortion.")
        for name, bank in self._banks.items():
            if len(self._ends) not in (1, bank.num_heads):
                raise ValueError(
                    f"start and end must be one temperature, or one per head, {bank.num_heads} for bank {name!r}; got "
                    f"{self.start} and {self.end}. Give one for each head."
                )
            unit = bank.temperature_state.unit
            if (unit == "absolute") != (self._unit == "absolute"):
                raise ValueError(
                    f"the temperature of bank {name!r} has the unit {unit!r}, the schedule {self._unit!r}; got start "
                    f"= {self.start}. A number is a fraction of the critical temperature; absolute ones are "
                    "Temperature(..., unit='absolute'), in bank and schedule alike."
                )
            others = [other for other in _annealings(trainer) if other is not self and fnmatchcase(name, other.banks)]
            if others:
                raise ValueError(
                    f"banks must differ between callbacks; bank {name!r} is matched by {self.banks!r} and by "
                    f"{others[0].banks!r}. Narrow one of them."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the tokens of banks that were not started from data, and set the temperature."""
        self._fix_length(trainer)
        self._apply(trainer)
        missing = [name for name, bank in self._banks.items() if not bank.temperature_state.is_measured]
        for name in execution_order(trainer, pl_module, self._banks) if missing else ():
            if name in missing:
                bank = self._banks[name]
                state = bank.temperature_state
                tokens = collect_tokens(trainer, pl_module, name, bank, max_tokens=REFERENCE_TOKENS)
                state.start(tokens, bank.prototypes)
                if not state.is_measured:
                    raise ValueError(
                        f"the tokens that reach bank {name!r} have no variance, so no temperature is critical. Check "
                        "the encoder: it maps everything to one point."
                    )

    def set_now(self, trainer: pl.Trainer, name: str, bank: PrototypeBank) -> None:
        """Set the temperature of a bank before training starts; one that is not among ``banks`` is left alone."""
        if name in self._banks:
            self._fix_length(trainer)
            self._set(bank, self._values(self._position(trainer)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the temperature of the epoch."""
        if self.interval == "epoch":
            self._apply(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature of the step."""
        self._step_before = trainer.global_step
        if self.interval == "step":
            self._apply(trainer)
        for name, bank in self._banks.items():
            pl_module.log(log_name(name, "temperature"), bank.temperature.mean())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; ``trainer.global_step`` counts that of every optimizer under manual optimization."""
        self._steps += trainer.global_step > self._step_before

    def end_of(self, name: str, bank: PrototypeBank) -> list[float] | None:
        """T of every head at the end of the schedule, on the tokens of now; None for a bank that is not annealed.

        A callable has no end that is known before; it only falls, so its present value stands for it.
        """
        if name not in self._banks:
            return None
        last = self._last if callable(self.schedule) else [end for _, end in self._ends]
        values = last if len(last) == bank.num_heads else last * bank.num_heads
        return (torch.tensor(values) * bank.temperature_state.reference().cpu()).tolist()

    def value(self, position: float) -> float | list[float]:
        """Temperature at a position (epochs or steps from the start), in the unit of ``start``; per head for lists."""
        values = self._values(position)
        return values if len(values) > 1 else values[0]

    def _values(self, position: float) -> list[float]:
        if callable(self.schedule):
            return [float(self.schedule(position))] * len(self._ends)
        return [self._between(start, end, position) for start, end in self._ends]

    def _between(self, start: float, end: float, position: float) -> float:
        if self.schedule == "exponential":
            return max(end, start * math.exp(-position / self._time_constant(start, end)))
        length = self.duration if self.duration is not None else self._length
        assert length is not None
        progress = min(1.0, position / (length - 1)) if length > 1 else float(position > 0)
        share = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return end + (start - end) * share

    def _time_constant(self, start: float, end: float) -> float:
        if self.tau is not None:
            return self.tau
        if end == start:
            return math.inf
        if self.duration is not None:
            return self.duration / math.log(start / end)
        assert self._length is not None
        return 0.8 * self._length / math.log(start / end)

    def _apply(self, trainer: pl.Trainer) -> None:
        values = self._values(self._position(trainer))
        for last, value in zip(self._last, values, strict=True):
            if value > last * (1 + 1e-9):
                raise ValueError(
                    f"the temperature must not increase; the schedule went from {last:.6g} to {value:.6g} at "
                    f"{self.interval} {self._position(trainer):g}."
                )
        self._last = values
        for bank in self._banks.values():
            self._set(bank, values)
        for copy in averaged_copies(trainer):  # averaged over a schedule, the temperature would lag behind it
            for name, bank in find_banks(copy).items():
                if name in self._banks:
                    self._set(bank, values)

    def _set(self, bank: PrototypeBank, values: list[float]) -> None:
        bank.temperature_state.set_values(
            torch.tensor(values if len(values) == bank.num_heads else values * bank.num_heads)
        )

    def _position(self, trainer: pl.Trainer) -> float:
        return float(trainer.current_epoch if self.interval == "epoch" else self._steps)

    def _fix_length(self, trainer: pl.Trainer) -> None:
        """Take the length of the run where it starts; a resumed run keeps that of the first."""
        if self._length is not None:
            return
        length = run_length(trainer, self.interval)
        free = callable(self.schedule) or self.tau is not None or self.duration is not None
        if math.isinf(length) and not free:
            raise ValueError(
                "the length of the run is unknown, so the temperature schedule has no end. Set max_epochs or "
                "max_steps, or give TemperatureAnnealing a duration (or a tau)."
            )
        self._length = length
        self._refuse_increase()

    def _refuse_increase(self) -> None:
        """A callable is tried at every position that the run can reach, up to a bound."""
        assert self._length is not None
        if not callable(self.schedule):
            return  # the named ones cannot
        previous = math.inf
        for position in range(int(min(self._length, MAX_TRIED))):
            value = float(self.schedule(position))
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"schedule must give finite temperatures > 0; got {value} at {self.interval} {position}. Correct "
                    "the callable."
                )
            if value > previous * (1 + 1e-9):
                raise ValueError(
                    f"schedule must not increase; it goes from {previous:.6g} to {value:.6g} at {self.interval} "
                    f"{position}."
                )
            previous = value

    def state_dict(self) -> dict[str, Any]:
        """Length of the run and the steps done: a resumed schedule is the same one."""
        return {"length": self._length, "steps": self._steps}

    @restores(length=(int, float, type(None)), steps=int)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the length of the run and the steps done."""
        self._length = state_dict["length"]
        self._steps = state_dict["steps"]


def _temperature(name: str, value: float | list[float] | Temperature) -> Temperature:
    try:
        return Temperature.of(value)
    except ValueError as error:
        raise ValueError(f"{name} of the schedule: {error}") from None


def _per_head(start: float | list[float], end: float | list[float]) -> list[tuple[float, float]]:
    """First and last temperature of every head; a single pair for all of them where neither is a list."""
    starts, ends = ([*value] if isinstance(value, Sequence) else [value] for value in (start, end))
    size = max(len(starts), len(ends))
    if any(len(values) not in (1, size) or not values for values in (starts, ends)):
        raise ValueError(
            f"start and end must be numbers or lists of the same length; got {start} and {end}. Give as many of both."
        )
    starts, ends = (values * (size if len(values) == 1 else 1) for values in (starts, ends))
    return list(zip(starts, ends, strict=True))


def _annealings(trainer: pl.Trainer) -> list[TemperatureAnnealing]:
    return [callback for callback in trainer.callbacks if isinstance(callback, TemperatureAnnealing)]  # type: ignore[attr-defined]
