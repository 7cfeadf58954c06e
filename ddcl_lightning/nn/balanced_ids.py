"""Semantic IDs of all items at once, spread over the codes of the last level where items would share one."""

from typing import Protocol

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import conform, described, require_at_least
from ddcl_lightning.functional import assign_balanced, group_tuples
from ddcl_lightning.nn.quantizer_base import require_started


class LevelQuantizer(Protocol):
    """A quantizer whose levels each encode what those before have left: a ``ResidualVectorQuantizer``, say.

    Attributes:
        num_codes: K, codes of each level.
        num_codebooks: L.
    """

    num_codes: int
    num_codebooks: int

    @property
    def codebook(self) -> Tensor:
        """The codes, ``(L, K, d)``."""

    def encode(self, z: Tensor) -> Tensor:
        """Indices ``(N, L)`` of vectors ``(N, D)``."""

    def decode(self, indices: Tensor) -> Tensor:
        """Vectors ``(N, D)`` of indices ``(N, l)``, those of the first l levels."""


@torch.no_grad()
def encode_balanced(quantizer: LevelQuantizer, vectors: Tensor, capacity: int = 1) -> Tensor:
    """IDs of items of which at most ``capacity`` share one, as far as their prefixes have room.

    Items whose ID is shared too often are matched anew with the codes of the last level, together with all others of
    their prefix, at the least total squared distance: see :func:`~ddcl_lightning.functional.assign_balanced`. The error
    rises a little, and IDs depend on each other: give all items at once. All other items keep what ``encode`` says.

    Args:
        quantizer: With at least two levels.
        vectors: All items as the quantizer reads them, ``(N, D)``.
        capacity: Items that may share an ID, at least 1.

    Returns:
        ``(N, L)`` int64, on the device of the vectors.

    Raises:
        ValueError: If the shape does not fit, the capacity is below 1, or the quantizer has one level or codes
            that have not started.
        TypeError: If vectors are no tensor.
    """
    require_at_least(1, capacity=conform("capacity", capacity, int))
    if not isinstance(vectors, Tensor):
        raise TypeError(f"vectors must be a tensor (N, D); got {described(vectors)}. Use torch.as_tensor(vectors).")
    if getattr(quantizer, "num_codebooks", 1) < 2:
        raise ValueError(
            "quantizer must have at least two levels, the last of which tells items apart; got "
            f"{type(quantizer).__name__} with one codebook. Use a ResidualVectorQuantizer."
        )
    if vectors.dim() != 2:
        raise ValueError(
            f"vectors must have shape (N, D), a row for each of all items; got {tuple(vectors.shape)}. Flatten them."
        )
    require_started(quantizer, "quantizer")
    ids = quantizer.encode(vectors)
    groups = group_tuples(ids)
    prefix = group_tuples(ids[:, :-1]).group
    crowded = torch.unique(prefix[groups.counts[groups.group] > capacity])
    items = torch.nonzero(torch.isin(prefix, crowded)).flatten()
    if not len(items):
        return ids
    costs = vectors.new_empty(len(items), quantizer.num_codes, dtype=torch.float64)
    codes = torch.arange(quantizer.num_codes, device=ids.device).unsqueeze(1)
    for number in crowded.tolist():
        rows = prefix[items] == number
        of_prefix = ids[items[rows][:1], :-1].expand(len(codes), -1)
        candidates = quantizer.decode(torch.cat([of_prefix, codes], 1))
        costs[rows] = torch.cdist(vectors[items[rows]].double(), candidates.double()).square()
    balanced = ids.clone()
    balanced[items] = assign_balanced(ids[items, :-1], costs, capacity)
    return balanced
