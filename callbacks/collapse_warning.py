"""Early warning of a collapsing bank, with the sign, its numbers and what to do."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import broadcast_object
from ddcl_lightning.callbacks._base import BankCallback, head_name, log_name
from ddcl_lightning.monitoring.history import TREND_READINGS, HeadHistory, PrototypeUse, trend
from ddcl_lightning.monitoring.recording import BankRecord, over_processes
from ddcl_lightning.monitoring.signals import (
    HeadSignals,
    Signal,
    check_signals,
    read_sign,
    read_signal,
    read_signals,
)

NOT_FINITE = "tokens or prototypes are NaN or infinite. Lower the learning rates or clip the gradients."

SIGNS = ("above_critical", "falling", "flat", "merged", "uniform", "dead")
TAKEN = (*HeadSignals.logged, "delta_trend", "dead_prototypes", "not_finite", *SIGNS)


class CollapseError(RuntimeError):
    """Error that a bank is collapsing."""


class CollapseWarning(BankCallback):
    """Monitor of every bank for signs of a collapse, which logs every signal it reads.

    The signs, in the order in which they tend to appear:

    - *above_critical*: T / T_c >= 1. The bank is attracted to the mean from here on; Delta falls later.
    - *falling*: Delta lost more than ``max_drop`` of its highest value and still falls. The warning says whether the
      embeddings shrink with it or the prototypes approach each other. Where prototypes did not start from data, the
      first 20 readings do not count: they have to travel to the tokens first.
    - *flat*: the embeddings use less than ``min_dimension`` of the directions that they used at their best: they
      become copies of a few. With few classes a task may want just that.
    - *merged*: Delta is below ``min_separation`` times the scale of the tokens: two prototypes do the work of one.
    - *uniform*: H is above ``max_entropy`` ln K: assignments say nothing about the tokens.
    - *dead*: prototypes that were nearest to none of the last 50 K tokens, nor to any for 20 times as long as they used
      to wait for one.

    A sign is reported once when it has held for ``patience`` readings (a dead prototype at once, for it has been
    watched long enough), and again only after it went away.

    Args:
        every_n_batches: Interval between readings.
        on_collapse: ``"warn"``, ``"stop"`` (end training after this batch) or ``"raise"``.
        min_separation: Smallest Delta relative to the root mean squared spread of the tokens.
        max_drop: Share of its highest value that Delta may lose.
        max_entropy: Largest H / ln K.
        min_dimension: Smallest effective dimension of the embeddings relative to its highest value.
        patience: Readings for which a sign must hold.
        additional: Signals of your own (:class:`~ddcl_lightning.Signal`), which are logged, and reported where they
            give a sign.

    Attributes:
        signals: The latest signals, by bank, one entry per head.
        reported: Every message so far.

    Raises:
        ValueError: If an argument is out of its range, or a signal of your own has no name, or that of another or of
            the callback's; in use, if it does not return what :class:`~ddcl_lightning.Signal` says.
        CollapseError: On a sign, with ``on_collapse="raise"``.
    """

    @typed
    def __init__(
        self,
        every_n_batches: int = 10,
        on_collapse: Literal["warn", "stop", "raise"] = "warn",
        min_separation: float = 0.02,
        max_drop: float = 0.5,
        max_entropy: float = 0.98,
        min_dimension: float = 0.25,
        patience: int = 3,
        additional: list[Signal] | None = None,
    ) -> None:
        super().__init__(every_n_batches)
        if on_collapse not in ("warn", "stop", "raise"):
            raise ValueError(f"on_collapse must be 'warn', 'stop' or 'raise'; got {on_collapse!r}.")
        for name, value in (("max_drop", max_drop), ("max_entropy", max_entropy), ("min_dimension", min_dimension)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {value}.")
        if min_separation < 0:
            raise ValueError(f"min_separation must be >= 0; got {min_separation}.")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 reading; got {patience}.")
        self.on_collapse, self.min_separation, self.max_drop = on_collapse, min_separation, max_drop
        self.max_entropy, self.min_dimension, self.patience = max_entropy, min_dimension, patience
        self.additional = list(additional or [])
        check_signals("additional", self.additional, TAKEN)
        self.signals: dict[str, list[HeadSignals]] = {}
        self.reported: list[str] = []
        self._watches: dict[tuple[str, int], HeadHistory] = {}

    def forget(self) -> None:
        """Drop the signals and warnings of an earlier run."""
        self.signals, self.reported, self._watches = {}, [], {}

    def bank_resized(self, name: str) -> None:
        """Start the history of a resized bank anew, since readings of its earlier size would mislead."""
        self._watches = {key: watch for key, watch in self._watches.items() if key[0] != name}

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, records: dict[str, BankRecord]) -> None:
        """Read, log and judge the signals of one batch, that of all processes together."""
        messages = [
            message
            for name, observed in over_processes(records).items()
            for message in self._read_bank(trainer, pl_module, name, observed)
        ]
        # All have read the same; should rounding differ, they must still agree on whether to go on.
        messages = broadcast_object(messages)
        if messages:
            self._act(trainer, messages)

    def _read_bank(self, trainer: pl.Trainer, module: pl.LightningModule, name: str, record: BankRecord) -> list[str]:
        bank, tokens = self._banks[name], record.valid_tokens()
        if tokens.shape[1] == 0 or not bool(torch.isfinite(tokens).all() & torch.isfinite(record.codebook).all()):
            return [f"not_finite in {name} at step {trainer.global_step}: {NOT_FINITE}"] if tokens.shape[1] else []
        fresh = (HeadHistory(PrototypeUse.empty(bank.num_prototypes)) for _ in range(bank.num_heads))
        watches = [self._watches.setdefault((name, head), watch) for head, watch in enumerate(fresh)]
        for watch, values in zip(watches, tokens, strict=True):
            watch.add_tokens(values)
        recent = torch.stack([torch.cat(list(watch.tokens)) for watch in watches])
        self.signals[name] = read_signals(record, bank.detach_assignments, recent)
        others = {signal.name: read_signal(signal, record) for signal in self.additional}
        messages = []
        for head, (watch, now) in enumerate(zip(watches, self.signals[name], strict=True)):
            where = head_name(name, head, bank.num_heads)
            added = {signal_name: values[head] for signal_name, values in others.items()}
            triggered = self._judge(watch, now, bool(bank.initialized), added)
            messages += [f"{sign} in {where} at step {trainer.global_step}: {text}" for sign, text in triggered.items()]
            dead = len(watch.use.dead()) / now.num_prototypes
            values = {**added, **now.scalars(), "delta_trend": trend(watch.log_delta), "dead_prototypes": dead}
            module.log_dict({log_name(where, key): value for key, value in values.items()})
        return messages

    def _judge(
        self, watch: HeadHistory, now: HeadSignals, from_data: bool, added: Mapping[str, float]
    ) -> dict[str, str]:
        """Update what is remembered and return the messages of signs that have just become due."""
        watch.readings += 1
        watch.use.add(now.counts)
        signs = self._signs_of_additional(watch, added)
        if now.num_prototypes > 1:
            signs |= self._signs_of_several(watch, now, from_data)
        triggered = {}
        for sign, message in signs.items():
            watch.streaks[sign] = watch.streaks.get(sign, 0) + 1 if message else 0
            if message and watch.streaks[sign] == (1 if sign == "dead" else self.patience):
                triggered[sign] = message
        return triggered

    def _signs_of_additional(self, watch: HeadHistory, added: Mapping[str, float]) -> dict[str, str]:
        return {
            signal.name: read_sign(signal, added[signal.name], watch.add_value(signal.name, added[signal.name]))
            for signal in self.additional
        }

    def _signs_of_several(self, watch: HeadHistory, now: HeadSignals, from_data: bool) -> dict[str, str]:
        """Signs of a bank with several prototypes, whose separation is remembered."""
        if now.delta_min > watch.peak_delta and (from_data or watch.readings > TREND_READINGS):
            watch.peak_delta, watch.scale_at_peak = now.delta_min, now.scale
        if now.dimension > watch.peak_dimension:
            watch.peak_dimension = now.dimension
        watch.log_delta.append(math.log(max(now.delta_min, 1e-300)))
        return self._signs(watch, now, from_data)

    def _signs(self, watch: HeadHistory, now: HeadSignals, from_data: bool) -> dict[str, str]:
        """A message for each sign that is present, an empty string for each that is not."""
        signs = dict.fromkeys(SIGNS, "")
        first, second = now.closest
        if now.temperature_ratio >= 1:
            signs["above_critical"] = (
                f"T = {now.temperature:.4g} is {now.temperature_ratio:.2f} times the critical temperature "
                f"{now.critical:.4g}, so the prototypes are drawn to the mean whatever the learning rates. Lower the "
                "temperature (TemperatureAnnealing(start=0.1) starts at a tenth of the critical one)."
            )
        if now.delta_min < (1 - self.max_drop) * watch.peak_delta and trend(watch.log_delta) < 0:
            shrinks = now.scale < (1 - 0.5 * self.max_drop) * watch.scale_at_peak
            spread = f"{watch.scale_at_peak:.4g} -> {now.scale:.4g}"
            cause = (
                f"the embeddings shrink with it (spread {spread}). Bound their scale "
                "(embedding_scale='whiten'), add a task loss, or freeze the encoder (rho=0)"
                if shrinks
                else f"the spread of the embeddings does not ({spread}), so prototypes {first} and {second} approach "
                "each other. Lower the temperature or rho, or add repulsion"
            )
            signs["falling"] = f"Delta fell from {watch.peak_delta:.4g} to {now.delta_min:.4g}; {cause}."
        if now.dimension < self.min_dimension * watch.peak_dimension:
            signs["flat"] = (
                f"the embeddings' effective dimension fell from {watch.peak_dimension:.3g} to {now.dimension:.3g}: "
                "they become copies of a few directions. Whiten them (embedding_scale='whiten'), lower rho or freeze "
                "the encoder (rho=0); ignore it where a task with few classes asks for few directions."
            )
        if now.relative_separation < self.min_separation:
            signs["merged"] = (
                f"prototypes {first} and {second} are {now.delta_min:.4g} apart, {now.relative_separation:.2g} of the "
                f"spread {now.scale:.4g} of the tokens. Lower the temperature (T / T_c = {now.temperature_ratio:.3g}) "
                "so that they split, use fewer prototypes, or add repulsion."
            )
        if now.entropy_ratio > self.max_entropy:
            signs["uniform"] = (
                f"H = {now.entropy:.4g} is {now.entropy_ratio:.3f} of ln K, so every token is assigned to every "
                f"prototype alike. Lower the temperature (T / T_c = {now.temperature_ratio:.3g})."
            )
        if dead := watch.use.dead():
            shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
            remedy = "Lower" if from_data else "Start with KMeansInitialization, lower"
            signs["dead"] = (
                f"{len(dead)} of {now.num_prototypes} prototypes ({shown}) were nearest to none of the last "
                f"{int(watch.use.idle[dead].min())} tokens looked at. {remedy} the rates of encoder and "
                "prototypes, step the latter with TokenNormalized, or use fewer of them."
            )
        return signs

    def _act(self, trainer: pl.Trainer, messages: list[str]) -> None:
        self.reported += messages
        if self.on_collapse == "raise":
            raise CollapseError("; ".join(messages))
        for message in messages:
            rank_zero_warn(f"CollapseWarning: {message}")
        if self.on_collapse == "stop":
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Recent tokens, highest separations, use and streaks: a resumed run warns as the uninterrupted one would."""
        heads = {
            f"{name}\n{head}": {
                "tokens": [tokens.cpu().clone() for tokens in watch.tokens],
                "readings": watch.readings,
                "log_delta": list(watch.log_delta),
                "peak_delta": watch.peak_delta,
                "scale_at_peak": watch.scale_at_peak,
                "peak_dimension": watch.peak_dimension,
                "use": dict(vars(watch.use)),
                "streaks": dict(watch.streaks),
                "values": dict(watch.values),
            }
            for (name, head), watch in self._watches.items()
        }
        return {**super().state_dict(), "heads": heads, "reported": list(self.reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the histories of all heads and what was reported."""
        super().load_state_dict(state_dict)
        self.reported = list(state_dict["reported"])
        for key, saved in state_dict["heads"].items():
            name, head = key.split("\n")
            self._watches[name, int(head)] = HeadHistory(
                tokens=deque(saved["tokens"]),
                readings=saved["readings"],
                log_delta=deque(saved["log_delta"], maxlen=TREND_READINGS),
                peak_delta=saved["peak_delta"],
                scale_at_peak=saved["scale_at_peak"],
                peak_dimension=saved["peak_dimension"],
                use=PrototypeUse(**saved["use"]),
                streaks=dict(saved["streaks"]),
                values=dict(saved["values"]),
            )
