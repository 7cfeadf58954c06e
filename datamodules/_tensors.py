"""Data modules of feature vectors in memory."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import described
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


def _checked(data: "TensorDataModule", returned: Any) -> tuple[Tensor, Tensor]:
    """Features and labels that ``tensors`` of a data module has returned, if they are such."""
    name, feature_names = type(data).__name__, getattr(data, "feature_names", None)
    rule = f"{name}.tensors() must return a pair of tensors, features (N, F) and labels (N,) int64"
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise TypeError(f"{rule}; got {described(returned)}. Return (x, y), with y = -1 where there is no label.")
    x, y = returned
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"{rule}; got {described(x)} and {described(y)}. Convert them with torch.as_tensor.")
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{rule}; got labels of {y.dtype}. Convert them with y.long().")
    if x.dim() < 2 or y.dim() != 1 or len(x) != len(y):
        raise ValueError(
            f"{rule}, one label per row; got shapes {tuple(x.shape)} and {tuple(y.shape)}. Give every row a label, -1 "
            "where it is unknown."
        )
    if feature_names is not None and x.dim() == 2 and x.shape[1] != len(feature_names):
        raise ValueError(
            f"{name}.feature_names must name the F = {x.shape[1]} features of tensors(); got {len(feature_names)} "
            "names. Name each column."
        )
    names = data.class_names
    invalid = (y < -1) | (y >= len(names)) if isinstance(names, Sequence) and len(names) else torch.tensor(False)
    if data.origin() is None and bool(invalid.any()):
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"{rule}, numbers of class_names in [0, {len(names)}), or -1 for unlabelled; got {int(y[row])} in row "
            f"{row}. Number the classes from 0, in the order of class_names."
        )
    return x, y.long()


class TensorDataModule(SplitDataModule):
    """Data module of features that fit in memory: variants give tensors, this class and its base do the rest.

    Batches hold ``x`` ``(B, F)`` float32, or ``(B, T, D)`` and so on where ``tensors`` gives tokens; those need an
    ``example`` of their own. Arguments and splits are those of :class:`SplitDataModule`; without a
    ``val_fraction`` everything runs over the whole data set.

    Attributes:
        num_features: Number of features F.
        feature_names: F names.
    """

    feature_names: tuple[str, ...]

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return len(self._names())

    def _names(self) -> Sequence[str]:
        names: object = getattr(self, "feature_names", None)
        if isinstance(names, str) or not isinstance(names, Sequence):
            kind = type(self).__name__
            raise TypeError(
                f"{kind}.feature_names must be a tuple with the name of each feature; got {described(names)}. Set it "
                f"in {kind}."
            )
        return names

    @abstractmethod
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Features ``(N, F)``, or tokens ``(N, T, D)``, and labels ``(N,)`` int64 in [0, C) of the whole data set."""

    def origin(self) -> Origin | None:
        """The file behind the tensors, asked for after them; none unless overridden."""
        return None

    def scale(self, x: Tensor, train_rows: Tensor) -> Tensor:
        """Scale features ``(N, F)`` by statistics of the training rows; the identity unless overridden."""
        return x

    def load(self) -> Loaded:
        """The features as they are.

        Raises:
            TypeError: If ``tensors`` does not return two tensors, labels of them integers.
            ValueError: If they are not one row of features and one label for each row.
        """
        self._raw, y = _checked(self, self.tensors())
        return Loaded(Features(self._raw), y, origin=self.origin())

    def transform(self, loaded: Loaded, train_rows: Tensor) -> Loaded:
        """The features as the training rows scale them."""
        return loaded._replace(fetch=Features(self.scale(self._raw, train_rows)))

    def example(self, index: int) -> str | npt.NDArray[np.uint8]:
        """Names and unscaled values of the features of row ``index``.

        Raises:
            TypeError: If a row is no vector of features, of which a person reads names and values.
        """
        row = self._raw[self._check_index(index)]
        if row.dim() > 1:
            kind = type(self).__name__
            raise TypeError(
                f"{kind}.example() must show a row of tensors() to a person; got rows of shape {tuple(row.shape)}, "
                f"whose features have no names. Override example(index) in {kind}: a text, or an image (H, W) uint8."
            )
        values = row.tolist()
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self._names(), values, strict=True))
