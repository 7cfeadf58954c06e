"""The backbone protocol."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sized
from typing import NamedTuple

from torch import Tensor, nn

from ddcl_lightning._utils.batch import Batch, inputs, token_mask
from ddcl_lightning._utils.reservoir import Reservoir

FIT_SAMPLES = 65_536  # inputs from which a backbone that needs the data (PCA) is fitted,
FIT_VALUES = 2**25  # and numbers in them: of wide inputs (images) fewer are taken, but not fewer than
FEWEST_SAMPLES = 1024


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

    A backbone that must see the training data before it can run (PCA), or gains by it (features computed ahead),
    overrides ``prepare``.

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

    def token_grid(self, batch: Batch) -> tuple[int, int, int] | None:
        """Tokens before the grid (a class token), rows and columns of the tokens of images; None where none is known.

        A token of the grid stands for its cell of the whole image, row by row.
        """
        return None

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Get ready with the training data, at the start of every fit that is not a resumed one; nothing by default.

        Every process calls it with its own batches. What learns from them must come to the same on every process
        (:func:`input_sample` does).

        Args:
            batches: One pass over the training batches, as ``forward`` will get them; loaders are not set up before
                somebody iterates or asks for the number ``len(batches)``, which a stream without end has not
                (``TypeError``).
        """


def count_batches(batches: Iterable[Batch]) -> int | None:
    """Number of batches, or None for a stream without end."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def input_sample(batches: Iterable[Batch], size: int = FIT_SAMPLES) -> Tensor:
    """A bounded sample of the inputs in batches, the same on every process: ``(N, *)``, of masked ones ``(N, F)``.

    Args:
        batches: All are read, but of a stream without end only what fills the sample.
        size: Largest N; of inputs of more than 512 numbers each so many that all of them are at most ``FIT_VALUES``.
    """
    endless = count_batches(batches) is None
    reservoir: Reservoir | None = None
    for batch in batches:
        x = inputs(batch)
        valid = token_mask(batch, x) if x.dim() > 2 else None
        rows = x if valid is None else x[valid]
        if reservoir is None:
            width = max(1, rows[:1].numel())
            reservoir = Reservoir(min(size, max(FEWEST_SAMPLES, FIT_VALUES // width)))
        reservoir.add(rows)
        if endless and reservoir.num_rows >= reservoir.capacity:
            break
    return (reservoir or Reservoir(size)).gather()
