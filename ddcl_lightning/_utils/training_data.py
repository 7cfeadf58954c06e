"""The training data before training, for what gets ready with them."""

import math
from collections.abc import Iterable, Iterator

import lightning.pytorch as pl

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.batch import Batch


class TrainingBatches(Iterable[Batch]):
    """One pass over the training batches of this process, on its device; no loader is set up before it is asked for.

    Args:
        trainer: About to fit.

    Attributes:
        used: Whether somebody has asked for the batches or their number.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.used = False
        self._trainer = trainer

    def __iter__(self) -> Iterator[Batch]:
        self.used = True
        return (compat.to_device(self._trainer, batch) for batch in compat.train_batches(self._trainer))

    def __len__(self) -> int:
        self.used = True
        self._trainer.fit_loop.setup_data()  # the number of batches is not known before
        number = self._trainer.num_training_batches
        if math.isinf(number):
            raise TypeError("the training data are a stream without end, which has no length.")
        return int(number)
