"""What is remembered of a codebook and of the loss between readings: plain numbers, which a checkpoint can hold."""

import copy
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch

from ddcl_lightning.monitoring.health_report import CodebookReport

TREND_READINGS = 20
SEPARATIONS = ("separation", "delta")
BESIDE = ("spread", "temperature_ratio")  # what a separation depends on
MIN_CHANGES = 5  # of a loss, before its noise is known
TRAVEL_READINGS = 20  # for which codes that did not start from data may travel to the tokens


@dataclass
class HeadHistory:
    """State of one head of a codebook between readings.

    Attributes:
        readings: Their number so far.
        first: First known value of each number.
        best: Highest value of each.
        at_best: Other numbers at the highest value of some, by the names of both.
        recent: The latest 20 known values of each, the oldest first.
        unknown: Numbers that the last reading does not have.
        streaks: Readings in a row with a sign, by its name.
        alarmed: Kinds of the present harm that have been reported.
        harmed: Readings in a row with harm, by its kind.
        non_finite: Values that were no numbers, so far.
        is_new: Whether there were more of them in the last reading.
        travels: Whether codes that did not start from data may still be on their way to the tokens.
        starts_out_of_scale: Whether a bank could not hold the squared spread of the tokens in the first reading.
        planned: Whether the temperature started above the critical one and is planned to fall below it.
    """

    readings: int = 0
    first: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    at_best: dict[str, dict[str, float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    streaks: dict[str, int] = field(default_factory=dict)
    planned: bool = False
    starts_out_of_scale: bool = False
    alarmed: list[str] = field(default_factory=list)
    harmed: dict[str, int] = field(default_factory=dict)
    non_finite: int = 0
    is_new: bool = False
    travels: bool = False

    def add(self, now: CodebookReport, from_data: bool = True) -> None:
        """Add one reading. Codes that did not start from data have no best separation before they have travelled."""
        self.readings += 1
        if self.readings == 1 and now.bank is not None:
            self.starts_out_of_scale = not now.bank.fits_dtype
        self.is_new, self.non_finite = now.non_finite > self.non_finite, now.non_finite
        self.travels = not from_data and self.readings <= TRAVEL_READINGS
        values = numbers(now)
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            self.first.setdefault(name, value)
            if not (self.travels and name in SEPARATIONS) and value > self.best.get(name, -math.inf):
                self.best[name] = value
                if name in SEPARATIONS:
                    self.at_best[name] = {
                        key: values[key] for key in BESIDE if math.isfinite(values.get(key, math.nan))
                    }
            self.add_value(name, value)
        self.unknown = [name for name in self.recent if not math.isfinite(values.get(name, math.nan))]

    def add_value(self, name: str, value: float) -> list[float]:
        """Keep a value; those before it, at most 20."""
        earlier = self.recent.get(name, [])
        self.recent[name] = [*earlier, value][-TREND_READINGS:]
        return earlier

    def share_of_best(self, name: str) -> float:
        """The value of the last reading over the highest one; NaN where either is not known."""
        recent, best = self.recent.get(name), self.best.get(name, math.nan)
        return recent[-1] / best if recent and best > 0 and name not in self.unknown else math.nan

    def forget_best(self, names: Iterable[str]) -> None:
        """Drop the highest values of some numbers."""
        for name in names:
            self.best.pop(name, None)
            self.at_best.pop(name, None)

    def is_recovering(self, name: str, readings: int) -> bool:
        """True if a number has risen in each of so many readings."""
        values = self.recent.get(name, [])[-readings - 1 :]
        return len(values) > readings and all(now > before for before, now in pairwise(values))

    def is_falling(self, name: str) -> bool:
        """True if the logarithm of the latest values falls, by its least-squares line."""
        values = self.recent.get(name, [])
        return trend([math.log(max(value, 1e-300)) for value in values]) < 0

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        return asdict(self)


def numbers(now: CodebookReport) -> dict[str, float]:
    """Numbers of a report whose course is followed."""
    values = {name: getattr(now, name) for name in ("separation", "token_rank", "code_rank", "spread")}
    values |= {"perplexity": now.perplexity, "explained": now.explained, "commitment": now.commitment}
    values |= {"extent": now.extent, "dead": math.nan if now.dead is None else float(len(now.dead))}
    if now.bank is not None:
        values |= {"delta": now.bank.delta_min, "temperature": now.bank.temperature}
        values["temperature_ratio"] = now.bank.temperature_ratio
    return values


@dataclass
class LossHistory:
    """Course of a smoothed loss. What is within its noise neither falls nor rises.

    Attributes:
        readings: Their number so far.
        is_broken: Whether it ever was no number.
        latest: The last reading.
        smooth: Mean of the latest readings, exponentially weighted.
        first: Its first value.
        lowest: Its lowest value.
        since_lowest: Readings since then.
        changes: Sizes of the latest 20 changes from reading to reading, of which the median is the noise.
    """

    readings: int = 0
    is_broken: bool = False
    latest: float = math.nan
    smooth: float = math.nan
    first: float = math.nan
    lowest: float = math.inf
    since_lowest: int = 0
    changes: list[float] = field(default_factory=list)

    def add(self, loss: float, weight: float = 0.5) -> None:
        """Add the mean loss since the last reading."""
        self.readings += 1
        if not math.isfinite(loss):
            self.is_broken = True
            return
        if not math.isnan(self.latest):
            self.changes = [*self.changes, abs(loss - self.latest)][-TREND_READINGS:]
        self.latest = loss
        self.smooth = loss if math.isnan(self.smooth) else self.smooth + weight * (loss - self.smooth)
        self.first = self.smooth if math.isnan(self.first) else self.first
        self.since_lowest += 1
        if self.smooth < self.lowest - 0.005 * (self.first - self.lowest if math.isfinite(self.lowest) else 0.0):
            self.lowest, self.since_lowest = self.smooth, 0

    @property
    def noise(self) -> float:
        """Usual change from one reading to the next; infinite before there are five."""
        return statistics.median(self.changes) if len(self.changes) >= MIN_CHANGES else math.inf

    @property
    def regain(self) -> float:
        """Share of the whole fall of the loss that it has risen again; NaN where either is within the noise."""
        fall, rise = self.first - self.lowest, max(self.smooth - self.lowest, 0.0)
        return rise / fall if fall > 4 * self.noise and rise >= 4 * self.noise else math.nan

    @property
    def has_jumped(self) -> bool:
        """True if it has risen again by more than half of its fall."""
        return self.regain > 0.5

    def has_stalled(self, min_fall: float) -> bool:
        """True if it has no new lowest value for a quarter of the readings, after a fall by less than a share."""
        return 0 < (1 - min_fall) * self.first < self.lowest and self.since_lowest >= max(5, self.readings / 4)


def trend(values: list[float]) -> float:
    """Slope of the least-squares line through equally spaced values, per reading; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    x -= x.mean()
    return float((x * y).sum() / x.square().sum())


def histories_from(state: Mapping[str, Mapping[str, Any]]) -> dict[str, HeadHistory]:
    """Histories of what ``state_dict`` of each gave; numbers that are kept no longer are passed over."""
    known = {field.name for field in fields(HeadHistory)}
    return {
        name: HeadHistory(**copy.deepcopy({key: value for key, value in saved.items() if key in known}))
        for name, saved in state.items()
    }
