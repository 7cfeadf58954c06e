"""The backbone protocol."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from ddcl_lightning.batch import Batch


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
    bounded sample of the inputs through ``fit`` before training starts, the same sample on every process.

    Attributes:
        embed_dim: Dimension of the tokens it returns.
    """

    embed_dim: int

    @abstractmethod
    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, embed_dim)`` and mask of a batch as the data loader yields it."""

    def needs_fit(self) -> bool:
        """Whether ``fit`` must be called before ``forward``."""
        return False

    def fit(self, x: Tensor) -> None:
        """Learn from a sample of inputs ``(N, *)``; called once, never on a resumed run."""
