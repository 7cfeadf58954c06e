"""The 1,797 handwritten digits that ship with scikit-learn."""

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._partition import EvaluateOn
from ddcl_lightning.datamodules._tensors import TensorDataModule


class DigitsDataModule(TensorDataModule):
    """Real images of handwritten digits, 8 x 8 pixels in [0, 1], ten classes.

    They ship with scikit-learn (the test set of UCI's Optical Recognition of Handwritten Digits). Validation and test
    run over the training set unless ``val_fraction`` is given.

    Args:
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out for validation and test, in [0, 1).
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for all the other arguments.
        limit: Train on at most this many rows, every class keeping its share.
        seed: Seed of the split and of the training order, in [0, 2**32); by default that of ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for tensors in memory.
        as_images: Give ``x`` as images ``(B, 1, 8, 8)`` for a convolutional backbone, not as rows ``(B, 64)``.
    """

    feature_names = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
    class_names = tuple(str(digit) for digit in range(10))

    @typed
    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        as_images: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        self.as_images = as_images

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1], ``(1797, 64)`` or ``(1797, 1, 8, 8)``, and digits ``(1797,)``."""
        images, digits = load_digits(return_X_y=True)
        x = torch.from_numpy(images / 16.0)
        return x.view(-1, 1, 8, 8) if self.as_images else x, torch.from_numpy(digits).long()

    def example(self, index: int) -> npt.NDArray[np.uint8]:
        """The digit as an image, ``(8, 8)``."""
        pixels: npt.NDArray[np.uint8] = (self._raw[self._check_index(index)].view(8, 8) * 255).round().byte().numpy()
        return pixels
