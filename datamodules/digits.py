"""The 1,797 handwritten digits that ship with scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ddcl_lightning.datamodules._loading import TensorDataModule


class DigitsDataModule(TensorDataModule):
    """Real images of handwritten digits, 8 x 8 pixels in [0, 1], ten classes.

    They ship with scikit-learn (the test set of UCI's Optical Recognition of Handwritten Digits).

    Args:
        batch_size: Rows per batch and process, at least 1.
        val_fraction: Part of each class that is held out for validation and test, in [0, 1). With 0,
            validation and test run over the training set: the protocol of deep clustering, where labels take
            no part in training.
        seed: Seed of the split and of the training order, at least 0; by default that of ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for tensors in memory.
    """

    feature_names = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(
        self, batch_size: int = 256, val_fraction: float = 0.0, seed: int | None = None, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)

    def load(self) -> tuple[Tensor, Tensor]:
        """Pixels ``(1797, 64)`` in [0, 1] and digits ``(1797,)``."""
        images, digits = load_digits(return_X_y=True)
        return torch.from_numpy(images / 16.0), torch.from_numpy(digits).long()
