"""The backbone protocol."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from ddcl_lightning._utils.batch import Batch, inputs, mask
from ddcl_lightning._utils.reservoir import Reservoir

FIT_SAMPLES = 65_536  # inputs from which a backbone that needs the data (PCA) is fitted


class Tokens(NamedTuple):
    """Embeddings of a batch.

    Attributes:
        values: ``(B, T, embed_dim)``; T = 1 for one vector per sample.
        mask: ``(B, T)`` boolean, True for valid tokens, or None where all are.
    """

    values: Tensor
    mask: Tensor | None = None


class Backbone(nn.Module, ABC):
    """Turns a batch into tokens. Subclass it, set ``embed_dim`` and write ``forward``.

    A backbone that must see the training data before it can run (PCA) returns True from ``needs_fit`` and gets a
    bounded sample of the inputs through ``fit`` before training starts, the same sample on every process. One that
    wants whole batches instead (to compute features ahead) overrides ``needs_data`` and ``prepare``.

    Attributes:
        embed_dim: Dimension of the tokens it returns.
    """

    embed_dim: int

    @abstractmethod
    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, embed_dim)`` and mask of a batch as the data loader yields it."""

    def pieces(self, batch: Batch) -> Tensor | None:
        """Image parts that the tokens stand for, ``(B, T, C, H, W)``, to draw prototypes; None without images."""
        return None

    def needs_fit(self) -> bool:
        """True if ``fit`` must be called before ``forward``."""
        return False

    def fit(self, x: Tensor) -> None:
        """Learn from a sample of inputs ``(N, *)``, of masked ones from their valid tokens ``(N, F)``.

        Called once, never on a resumed run.
        """

    def needs_data(self) -> bool:
        """True if ``prepare`` must be called before training: by default where ``fit`` must."""
        return self.needs_fit()

    def prepare(self, batches: Iterable[Batch], total: float) -> None:
        """Get ready with the training data at the start of every fit that is not a resumed one; by default ``fit``.

        Every process calls it with its own batches.

        Args:
            batches: One pass over the training batches, as ``forward`` will get them.
            total: Their number; infinite for a stream that does not end.
        """
        reservoir = Reservoir(FIT_SAMPLES)
        for batch in batches:
            x = inputs(batch)
            valid = mask(batch, x) if x.dim() > 2 else None
            reservoir.add(x if valid is None else x[valid])
            if math.isinf(total) and reservoir.num_rows >= reservoir.capacity:
                break
        self.fit(reservoir.gather())
