"""Data modules of feature vectors in memory."""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddcl_lightning.datamodules._loading import Batch
from ddcl_lightning.datamodules._origin import Origin
from ddcl_lightning.datamodules._partition import Loaded
from ddcl_lightning.datamodules._splits import SplitDataModule


class Features:
    """Function from row numbers to rows of a tensor.

    Args:
        x: Features, ``(N, ...)``; kept in float32.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x.float()

    def __call__(self, rows: Tensor) -> Batch:
        """``x`` of the rows, ``(B, ...)`` float32."""
        return {"x": self.x[rows]}


class TensorDataModule(SplitDataModule):
    """Data module of features that fit in memory: variants give tensors, this class and its base do the rest.

    Batches hold ``x`` ``(B, F)`` float32. Arguments and splits are those of :class:`SplitDataModule`; without a
    ``val_fraction`` everything runs over the whole data set.

    Attributes:
        num_features: Number of features F.
        feature_names: F names.
    """

    feature_names: tuple[str, ...]

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return len(self.feature_names)

    @abstractmethod
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Features ``(N, F)`` and labels ``(N,)`` int64 of the whole data set."""

    def origin(self) -> Origin | None:
        """The file behind the tensors, asked for after them; none unless overridden."""
        return None

    def scale(self, x: Tensor, train_rows: Tensor) -> Tensor:
        """Scale features ``(N, F)`` by statistics of the training rows; the identity unless overridden."""
        return x

    def load(self) -> Loaded:
        """The features as they are."""
        self._raw, y = self.tensors()
        return Loaded(Features(self._raw), y, origin=self.origin())

    def transform(self, loaded: Loaded, train_rows: Tensor) -> Loaded:
        """The features as the training rows scale them."""
        return loaded._replace(fetch=Features(self.scale(self._raw, train_rows)))

    def example(self, index: int) -> str | npt.NDArray[np.uint8]:
        """Names and unscaled values of the features of row ``index``."""
        values = self._raw[self._check_index(index)].tolist()
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self.feature_names, values, strict=True))
