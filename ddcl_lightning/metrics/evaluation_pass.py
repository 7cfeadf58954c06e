"""One pass over validation or test data, of one loader or several, by one process or several."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from ddcl_lightning._utils.distributed import mean_over_processes
from ddcl_lightning.metrics.stages import StageMetrics


def suffix(loader: int) -> str:
    """Suffix that Lightning, and so this package, adds to names of values of one of several loaders."""
    return f"/dataloader_idx_{loader}"


def flat_loaders(loaders: Any) -> list[Any]:
    """The loaders of a trainer in their order, whether they are one, a sequence or a mapping."""
    if isinstance(loaders, Mapping):
        return [inner for loader in loaders.values() for inner in flat_loaders(loader)]
    if isinstance(loaders, (list, tuple)):
        return [inner for loader in loaders for inner in flat_loaders(loader)]
    return [loaders]


class EvaluationPass:
    """Losses and metrics of one pass over the loaders of a stage: of all together and, of several, of each by itself.

    Losses are means per sample over all processes. (Lightning's own ``sync_dist`` rounds the number of samples where
    processes have different ones.)

    Args:
        metrics: Those of the stage, which count all loaders together; fresh.
        loaders: Number of loaders.
    """

    def __init__(self, metrics: StageMetrics, loaders: int) -> None:
        self._metrics = {"": metrics}
        if loaders > 1:
            self._metrics |= {suffix(loader): deepcopy(metrics) for loader in range(loaders)}
        self._sums: dict[str, dict[str, Tensor]] = {mark: {} for mark in self._metrics}
        self._sizes = dict.fromkeys(self._metrics, 0)

    def add(self, losses: Mapping[str, Tensor], size: int, loader: int) -> list[StageMetrics]:
        """Count the losses of a batch of ``size`` samples; returns the metrics that have to count it too."""
        marks = [mark for mark in ("", suffix(loader)) if mark in self._metrics]
        for mark in marks:
            self._sizes[mark] += size
            for name, value in losses.items():
                self._sums[mark][name] = self._sums[mark].get(name, 0) + value.detach() * size
            self._metrics[mark].reserve(losses)
        return [self._metrics[mark] for mark in marks]

    def compute(self, anywhere: Callable[[bool], bool]) -> dict[str, Tensor | float]:
        """All values over all processes, by name and the mark of the loader; every process must call it.

        Args:
            anywhere: See :meth:`~ddcl_lightning.metrics.stages.StageMetrics.compute`.
        """
        self._metrics[""].note_idle(anywhere)
        values: dict[str, Tensor | float] = {}
        for mark, metrics in self._metrics.items():
            size = self._sizes[mark]
            losses = mean_over_processes({name: value / size for name, value in self._sums[mark].items()}, size)
            values |= {name + mark: mean for name, mean in losses.items()}
            values |= {name + mark: value for name, value in metrics.compute(anywhere).items()}
        return values
