"""Several validation or test loaders: figures of each, beside those of all of them together."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from ddcl_lightning.stage_metrics import StageMetrics


def suffix(loader: int) -> str:
    """What Lightning, and so this package, adds to the names of what is logged of one of several loaders."""
    return f"/dataloader_idx_{loader}"


def flat_loaders(loaders: Any) -> list[Any]:
    """The loaders of a trainer in their order, whether they are one, a sequence or a mapping."""
    if isinstance(loaders, Mapping):
        return [inner for loader in loaders.values() for inner in flat_loaders(loader)]
    if isinstance(loaders, (list, tuple)):
        return [inner for loader in loaders for inner in flat_loaders(loader)]
    return [loaders]


class SeveralLoaders:
    """One pass over several loaders.

    Args:
        metrics: Those of the stage, which count all loaders together; fresh.
        number: Of loaders.
    """

    def __init__(self, metrics: StageMetrics, number: int) -> None:
        self.metrics = [deepcopy(metrics) for _ in range(number)]
        self._sums: dict[str, Tensor] = {}
        self._size = 0

    def add(self, losses: Mapping[str, Tensor], size: int) -> None:
        """Count the losses of a batch of ``size`` samples."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach() * size
        self._size += size

    def means(self) -> dict[str, Tensor]:
        """Losses per sample over all loaders, as this process saw them."""
        return {name: value / self._size for name, value in self._sums.items()}

    @property
    def size(self) -> int:
        """Samples that this process saw."""
        return self._size
