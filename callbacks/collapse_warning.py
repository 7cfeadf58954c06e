"""Early warning of a collapsing bank, with the sign, the figures and what to do."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddcl_lightning.callbacks._base import BankCallback, log_name
from ddcl_lightning.probe import Observation
from ddcl_lightning.signals import HeadSignals, read_signals

RECENT_READINGS = 8  # readings whose tokens make one covariance
TOKENS_PER_READING = 2048


class CollapseError(RuntimeError):
    """A bank is collapsing."""


@dataclass
class _Watch:
    """What is remembered of one head between readings."""

    recent: deque[Tensor] = field(default_factory=lambda: deque(maxlen=RECENT_READINGS))
    log_delta: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    peak_delta: float = 0.0
    scale_at_peak: float = math.nan
    counts: deque[Tensor] = field(default_factory=lambda: deque(maxlen=50))
    streaks: dict[str, int] = field(default_factory=dict)


class CollapseWarning(BankCallback):
    """Watches every bank for the signs of a collapse and logs every signal it watches.

    The signs, in the order in which they tend to appear:

    - *above_critical*: T / T_c >= 1. The bank is attracted to the mean from here on; Delta falls later.
    - *falling*: Delta lost more than ``max_drop`` of its highest value and still falls. The warning says whether the
      embeddings shrink with it or the prototypes approach each other.
    - *merged*: Delta is below ``min_separation`` times the scale of the tokens: two prototypes do the work of one.
    - *uniform*: H is above ``max_entropy`` ln K: assignments say nothing about the tokens.
    - *dead*: prototypes that no token was nearest to in the last readings.

    A sign is reported once when it has held for ``patience`` readings, and again only after it went away.

    Args:
        every_n_batches: Interval between readings.
        on_collapse: ``"warn"``, ``"stop"`` (end training after this batch) or ``"raise"``.
        min_separation: Smallest Delta relative to the root mean squared spread of the tokens.
        max_drop: Share of its highest value that Delta may lose.
        max_entropy: Largest H / ln K.
        patience: Readings for which a sign must hold.

    Raises:
        ValueError: If an argument is out of its range.
        CollapseError: On a sign, with ``on_collapse="raise"``.
    """

    def __init__(
        self,
        every_n_batches: int = 20,
        on_collapse: Literal["warn", "stop", "raise"] = "warn",
        min_separation: float = 0.02,
        max_drop: float = 0.5,
        max_entropy: float = 0.98,
        patience: int = 3,
    ) -> None:
        super().__init__(every_n_batches)
        if on_collapse not in ("warn", "stop", "raise"):
            raise ValueError(f"on_collapse must be 'warn', 'stop' or 'raise'; got {on_collapse!r}.")
        for name, value in (("max_drop", max_drop), ("max_entropy", max_entropy)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {value}.")
        if min_separation < 0:
            raise ValueError(f"min_separation must be >= 0; got {min_separation}.")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 reading; got {patience}.")
        self.on_collapse, self.min_separation, self.max_drop = on_collapse, min_separation, max_drop
        self.max_entropy, self.patience = max_entropy, patience
        self.signals: dict[str, list[HeadSignals]] = {}
        self.reported: list[str] = []
        self._watches: dict[tuple[str, int], _Watch] = {}

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: dict[str, Observation]) -> None:
        """Read, log and judge the signals of one batch."""
        messages = []
        for name, observed in seen.items():
            bank = self._banks[name]
            heads = range(bank.num_heads)
            watches = [self._watches.setdefault((name, head), _Watch()) for head in heads]
            for watch, tokens in zip(watches, observed.valid_tokens(), strict=True):
                watch.recent.append(tokens[:TOKENS_PER_READING].float())
            recent = torch.stack([torch.cat(list(watch.recent)) for watch in watches])
            self.signals[name] = read_signals(observed, bank.detach_assignments, recent)
            for head, (watch, signals) in enumerate(zip(watches, self.signals[name], strict=True)):
                where = f"{name}/head{head}" if bank.num_heads > 1 else name
                messages += self._judge(trainer, where, watch, signals)
                values = {**signals.scalars(), **_window_scalars(watch)}
                pl_module.log_dict({log_name(where, key): value for key, value in values.items()})
        # Each process reads its own batch; they must agree on whether to go on.
        found = trainer.strategy.reduce_boolean_decision(bool(messages), all=False)
        if found:
            self._act(trainer, messages)

    def _judge(self, trainer: pl.Trainer, where: str, watch: _Watch, now: HeadSignals) -> list[str]:
        """Update what is remembered and return the messages of signs that have just become due."""
        if now.num_prototypes == 1:
            return []
        if now.delta_min > watch.peak_delta:
            watch.peak_delta, watch.scale_at_peak = now.delta_min, now.scale
        watch.log_delta.append(math.log(max(now.delta_min, 1e-300)))
        watch.counts.append(now.counts)
        due = []
        for sign, message in self._signs(watch, now).items():
            streak = watch.streaks.get(sign, 0) + 1 if message else 0
            watch.streaks[sign] = streak
            if message and streak == self.patience:
                due.append(f"{sign} in {where} at step {trainer.global_step}: {message}")
        return due

    def _signs(self, watch: _Watch, now: HeadSignals) -> dict[str, str]:
        """A message for each sign that is present, an empty string for each that is not."""
        signs = dict.fromkeys(("above_critical", "falling", "merged", "uniform", "dead"), "")
        first, second = now.closest
        if now.temperature_ratio >= 1:
            signs["above_critical"] = (
                f"T = {now.temperature:.4g} is {now.temperature_ratio:.2f} times the critical temperature {now.critical:.4g}, "
                "so the prototypes are drawn to the mean whatever the learning rates. Lower the temperature "
                "(TemperatureAnnealing(start=0.1) starts at a tenth of it)."
            )
        if now.delta_min < (1 - self.max_drop) * watch.peak_delta and trend(watch.log_delta) < 0:
            shrinks = now.scale < (1 - 0.5 * self.max_drop) * watch.scale_at_peak
            cause = (
                f"the embeddings shrink with it (spread {watch.scale_at_peak:.4g} -> {now.scale:.4g}). Bound their scale "
                "(embedding_scale='per_dimension'), add a task loss, or freeze the encoder (rho=0)"
                if shrinks
                else f"the spread of the embeddings does not ({watch.scale_at_peak:.4g} -> {now.scale:.4g}), so prototypes {first} "
                f"and {second} approach each other. Lower the temperature or rho, or add repulsion"
            )
            signs["falling"] = f"Delta fell from {watch.peak_delta:.4g} to {now.delta_min:.4g}; {cause}."
        if now.relative_separation < self.min_separation:
            signs["merged"] = (
                f"prototypes {first} and {second} are {now.delta_min:.4g} apart, {now.relative_separation:.2g} of the spread "
                f"{now.scale:.4g} of the tokens. Lower the temperature (T / T_c = {now.temperature_ratio:.3g}) so that they "
                "split, use fewer prototypes, or add repulsion."
            )
        if now.entropy_ratio > self.max_entropy:
            signs["uniform"] = (
                f"H = {now.entropy:.4g} is {now.entropy_ratio:.3f} of ln K, so every token is assigned to every prototype alike. "
                f"Lower the temperature (T / T_c = {now.temperature_ratio:.3g})."
            )
        dead = dead_prototypes(watch.counts)
        if dead:
            shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
            signs["dead"] = (
                f"{len(dead)} of {now.num_prototypes} prototypes ({shown}) were nearest to none of the last "
                f"{int(sum(int(c.sum()) for c in watch.counts))} tokens. Start with KMeansInitialization, step the prototypes "
                "with prototype_optimizer='TokenNormalized', or use fewer prototypes."
            )
        return signs

    def _act(self, trainer: pl.Trainer, messages: list[str]) -> None:
        self.reported += messages
        text = "; ".join(messages) or "another process saw a sign of collapse"
        if self.on_collapse == "raise":
            raise CollapseError(text)
        for message in messages:
            rank_zero_warn(f"CollapseWarning: {message}")
        if self.on_collapse == "stop":
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Highest separations and running streaks: a resumed run warns as the uninterrupted one would."""
        heads = {
            f"{name}\n{head}": {
                "peak_delta": watch.peak_delta,
                "scale_at_peak": watch.scale_at_peak,
                "log_delta": list(watch.log_delta),
                "streaks": dict(watch.streaks),
                "counts": list(watch.counts),
                "recent": list(watch.recent),
            }
            for (name, head), watch in self._watches.items()
        }
        return {**super().state_dict(), "heads": heads, "reported": list(self.reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state_dict)
        self.reported = list(state_dict["reported"])
        for key, saved in state_dict["heads"].items():
            name, head = key.split("\n")
            watch = self._watches.setdefault((name, int(head)), _Watch())
            watch.peak_delta, watch.scale_at_peak = saved["peak_delta"], saved["scale_at_peak"]
            watch.log_delta.extend(saved["log_delta"])
            watch.streaks.update(saved["streaks"])
            watch.counts.extend(saved["counts"])
            watch.recent.extend(saved["recent"])


def trend(values: "deque[float]") -> float:
    """Slope of the least-squares line through equally spaced values, per reading; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    y = torch.tensor(list(values), dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    x -= x.mean()
    return float((x * y).sum() / x.square().sum())


def dead_prototypes(counts: "deque[Tensor]") -> list[int]:
    """Prototypes that no token was nearest to, once enough tokens were seen to tell (20 per prototype)."""
    if not counts:
        return []
    total = torch.stack(list(counts)).sum(0)
    return torch.nonzero(total == 0).flatten().tolist() if int(total.sum()) >= 20 * len(total) else []


def _window_scalars(watch: _Watch) -> dict[str, float]:
    """Signals over the last readings: the trend of ln Delta, and the share of prototypes in use."""
    if not watch.counts:
        return {}
    total = torch.stack(list(watch.counts)).sum(0)
    return {"delta_trend": trend(watch.log_delta), "usage": float((total > 0).float().mean())}
