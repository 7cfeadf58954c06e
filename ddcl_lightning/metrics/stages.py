"""Metrics of one stage as named scalars, for every form of value that a metric may compute."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import Running
from torchmetrics.wrappers.abstract import WrapperMetric

from ddcl_lightning._utils.arguments import nearest

KEY = "metric_"  # a ModuleDict takes no empty key (nor "train"), and a single head's metrics have no prefix


class UnknownMetric(KeyError):
    """A name under which a stage has no metric."""


class NamedMetrics(dict[str, Metric | MetricCollection]):
    """Metrics under a task's own names; an unknown name is told with those that are there."""

    def __missing__(self, name: object) -> Metric | MetricCollection:
        raise UnknownMetric(
            f"must read metrics by the names that the task gives them; got {name!r}{nearest(str(name), self)}"
        )


class StageMetrics(nn.ModuleDict):
    """The metrics of one stage, by name, and their values under the names that are logged.

    A metric of one value is logged under its own name, one of several (a dictionary, a ``MetricCollection``, a wrapper)
    under its name followed by that of each value, and a vector under its name and the place of each entry, ``acc_0``.
    What is undefined (NaN, None, empty) is left out, as is a metric that no process has updated, or only with nothing.

    Args:
        stage: ``"train"``, ``"val"`` or ``"test"``, for messages.
        metrics: What the task returned.

    Raises:
        TypeError: If it is no mapping from names to torchmetrics metrics.
        ValueError: If a name holds a dot, which no module's name may.
    """

    def __init__(self, stage: str, metrics: Mapping[str, Metric | MetricCollection]) -> None:
        super().__init__()
        self.stage = stage
        self._taken: set[str] = set()
        self._noted = False
        rule = f"a task's metrics (stage {stage!r}) must be a dict of names to torchmetrics metrics or collections"
        if not isinstance(metrics, (Mapping, MetricCollection)):
            raise TypeError(f"{rule}; got {type(metrics).__name__}. Return {{'name': metric}}.")
        for name, metric in metrics.items():
            if not isinstance(name, str):
                raise TypeError(f"{rule}; got the name {name!r}. Name it by a string.")
            if not isinstance(metric, (Metric, MetricCollection)):
                raise TypeError(
                    f"{rule}; got {type(metric).__name__} under {name!r}. Put several into a MetricCollection; the "
                    "history of a metric is the logger's to keep."
                )
            if "." in name:
                raise ValueError(f"the name of a metric must not hold a dot; got {name!r}. Write it without.")
            self[KEY + name] = metric

    def by_name(self) -> NamedMetrics:
        """The metrics under the task's own names."""
        return NamedMetrics({key.removeprefix(KEY): metric for key, metric in self.items()})  # type: ignore[misc]

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names for what is logged beside the metrics of this stage, its losses."""
        self._taken.update(names)

    def compute(self, anywhere: Callable[[bool], bool]) -> dict[str, Tensor]:
        """All values as float32 scalars, and a fresh start for the metrics; every process must call it.

        Args:
            anywhere: Whether a condition holds on any process. Metrics synchronize, so that all must compute, or none.

        Raises:
            TypeError: If a metric computes what is no scalar, vector or dictionary of them.
            ValueError: If a value has no name, or the name of another one.
        """
        values: dict[str, Tensor] = {}
        for name, metric in self.by_name().items():
            if not anywhere(any(_has_data(child) for child in metric.modules())):
                continue
            for key, value in self._scalars(name, metric.compute()):
                if key in values or key in self._taken:
                    raise ValueError(
                        f"values that are logged must differ in name; got '{self.stage}/{key}' from metric {name!r} "
                        "and from another metric or loss. Rename one of them in the task."
                    )
                if not bool(value.isnan()):
                    values[key] = value
        # Only now: metrics may be made of one another.
        for metric in self.by_name().values():
            metric.reset()
        return values

    def note_idle(self, anywhere: Callable[[bool], bool]) -> None:
        """Warn, the first time, of metrics that no process has updated in a pass; every process must call it.

        Args:
            anywhere: As for :meth:`compute`.
        """
        if self._noted:
            return
        self._noted = True
        names = [
            name
            for name, metric in self.by_name().items()
            if not anywhere(any(_is_updated(child) for child in metric.modules()))
        ]
        if names:
            listed = ", ".join(map(repr, names))
            rank_zero_warn(
                f"the task's update_metrics() must update every metric of metrics(), or it is not logged; in stage "
                f"{self.stage!r} it has not updated {listed}. Call metrics[{names[0]!r}].update(...) "
                "there, or leave it out of metrics()."
            )

    def _scalars(self, name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        """One computed value as named scalars."""
        if isinstance(value, Mapping):
            for key, entry in value.items():
                # Values of a dictionary within a dictionary are parted from its name, which is no prefix.
                inner = {f"_{k}": v for k, v in entry.items()} if isinstance(entry, Mapping) else entry
                yield from self._scalars(f"{name}{key}", inner)
            return
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return
        if isinstance(value, (Number, np.generic, np.ndarray)):
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor) or value.is_complex() or (value.dim() > 1 and value.numel() > 1):
            form = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)[:80]
            raise TypeError(
                f"metric {name!r} of stage {self.stage!r} must compute real numbers: a scalar, a vector or a "
                f"dictionary of them; got {form}. Reduce it, or show it from a callback of your own."
            )
        if value.numel() and not name:
            raise ValueError(
                f"a metric that computes no dictionary needs a name to be logged under (stage {self.stage!r}); got ''. "
                "Return {'name': metric} from the task."
            )
        entries = value.detach().float().reshape(-1)
        if value.dim() == 0 or value.numel() == 1:
            yield name, entries[0]
        else:
            yield from ((f"{name}_{i}", entry) for i, entry in enumerate(entries))


def _is_updated(child: nn.Module) -> bool:
    if isinstance(child, Running):
        return True  # it does not know: it resets the metric that it is of at every update
    # Other wrappers keep saying yes after a reset; the metrics in them do not.
    return isinstance(child, Metric) and not isinstance(child, WrapperMetric) and child.update_called


def _has_data(child: nn.Module) -> bool:
    return isinstance(child, Running) or (_is_updated(child) and isinstance(child, Metric) and _holds(child))


def _holds(metric: Metric) -> bool:
    """False if a metric was updated with nothing: all that it keeps are lists, and there is no value in them.

    What it computes of them would be undefined, and differ between one process and several.
    """
    states = list(metric.metric_state.values())
    if not states or not all(isinstance(state, list) for state in states):
        return True
    return any(not isinstance(entry, Tensor) or entry.numel() for state in states for entry in state)


def check_new(stages: Iterable[StageMetrics]) -> None:
    """Raise if stages share a metric, which each of them would reset.

    Raises:
        ValueError: Naming the metric.
    """
    owners: dict[int, str] = {}
    for metrics in stages:
        for name, metric in metrics.by_name().items():
            for child in metric.modules():
                if isinstance(child, Metric) and owners.setdefault(id(child), metrics.stage) != metrics.stage:
                    raise ValueError(
                        f"a task's metrics must be new at every call, since each stage counts its own; got metric "
                        f"{name!r} in stages {owners[id(child)]!r} and {metrics.stage!r}. Create it in metrics(), or "
                        "return its clone()."
                    )
