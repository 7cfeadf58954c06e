"""Quality of semantic IDs: how many items share one, how evenly the codes of each level are used, and the error.

Fewer collisions often come with a larger error, so the two belong side by side.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.functional import effective_number, group_tuples
from ddcl_lightning.functional._common import require_integers
from ddcl_lightning.metrics.codebook_metrics import codebook_counts


def colliding_share(counts: Tensor) -> Tensor:
    """Share of the items whose ID is that of at least one other item.

    Args:
        counts: Items of each distinct ID, ``(M,)`` integers, at least one.

    Returns:
        Scalar in [0, 1], float64.
    """
    shared: Tensor = counts.masked_fill(counts < 2, 0).sum().double() / counts.sum()
    return shared


def conditional_perplexity(ids: Tensor, level: int, num_codes: int) -> Tensor:
    """Perplexity of the codes of a level among the items of one prefix, averaged over items.

    Every prefix (the codes of the levels before) counts as often as it has items:
    ``sum_p n_p / N exp(H(code | p))``, H in nats.

    Args:
        ids: ``(N, L)`` integers in [0, K), N >= 1.
        level: From 0; the prefix of level 0 is empty.
        num_codes: K.

    Returns:
        Scalar in [1, K], float64.
    """
    tuples, _, counts = group_tuples(ids[:, : level + 1])
    group = group_tuples(tuples[:, :level]).group
    table = torch.zeros(int(group.max()) + 1, num_codes, dtype=torch.float64, device=ids.device)
    table[group, tuples[:, level].long()] = counts.double()
    sizes = table.sum(1)
    return (effective_number(table) * sizes).sum() / sizes.sum()


class SemanticIDMetrics(Metric):
    """Collisions, use of the codes and relative error of semantic IDs, over all items of a data set.

    The IDs of all items are kept, since any two may be equal: ``L`` integers per item. Items with a known index count
    once, however often batches or processes repeat them.

    Args:
        num_codes: K, codes per level, at least 1.
        num_levels: L, at least 1.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Attributes:
        rows: Index (-1 where unknown) and ID of each item, ``(N, 1 + L)`` int64 in pieces.
        moments: Number, squared spread, squared error and mean of the vectors, ``(M, 3 + D)`` in pieces.

    Raises:
        ValueError: If a size is below 1.
    """

    is_differentiable = False
    full_state_update = False
    rows: list[Tensor]
    moments: list[Tensor]

    @typed
    def __init__(self, num_codes: int, num_levels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_at_least(1, num_codes=num_codes, num_levels=num_levels)
        self.num_codes, self.num_levels = num_codes, num_levels
        # One piece per process is what torchmetrics gathers without a reduction, see sync.
        self.add_state("rows", [], dist_reduce_fx=None)
        self.add_state("moments", [], dist_reduce_fx=None)

    def update(
        self,
        ids: Tensor,
        vectors: Tensor | None = None,
        decoded: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Add items.

        Args:
            ids: ``(..., L)`` integers in [0, K), as ``encode`` of a quantizer gives them; rows with a -1 are padding.
            vectors: What the IDs stand for, ``(..., D)``, for the relative error.
            decoded: What came back, of the shape of ``vectors``.
            index: Number of each item in its data set, ``(...)``, by which repeated items are told.

        Raises:
            TypeError: If IDs are no integers.
            ValueError: If a shape does not fit, a code is out of range, or one of ``vectors`` and ``decoded`` is
                missing.
        """
        require_integers("ids", ids)
        if ids.dim() < 1 or ids.shape[-1] != self.num_levels:
            raise ValueError(
                f"ids must have shape (..., num_levels = {self.num_levels}); got {tuple(ids.shape)}. Set num_levels "
                "to that of the quantizer."
            )
        codebook_counts(ids, self.num_codes)  # refuses what is no code
        if index is not None and index.shape != ids.shape[:-1]:
            raise ValueError(
                f"index must hold one number per item, {tuple(ids.shape[:-1])}; got {tuple(index.shape)}. Leave it out "
                "where it is unknown."
            )
        flat = ids.detach().reshape(-1, self.num_levels).long()
        valid = (flat >= 0).all(1)
        if vectors is not None or decoded is not None:
            self.moments = [_merged([*self.moments, self._moments(ids, vectors, decoded, valid)])]
        numbers = torch.full_like(flat[:, 0], -1) if index is None else index.reshape(-1).to(flat)
        self.rows.append(torch.cat([numbers.unsqueeze(1), flat], 1)[valid])

    def _moments(self, ids: Tensor, vectors: Tensor | None, decoded: Tensor | None, valid: Tensor) -> Tensor:
        if vectors is None or decoded is None or vectors.shape != decoded.shape or vectors.shape[:-1] != ids.shape[:-1]:
            shapes = ["None" if value is None else tuple(value.shape) for value in (vectors, decoded)]
            raise ValueError(
                f"vectors and decoded must both have shape {(*ids.shape[:-1], 'D')}, one vector per item; got "
                f"{shapes[0]} and {shapes[1]}. Leave both out where there are none."
            )
        given, returned = (value.detach().flatten(0, -2)[valid].float() for value in (vectors, decoded))
        mean = given.mean(0) if len(given) else given.new_zeros(given.shape[1])
        sums = torch.stack(
            [given.new_tensor(len(given)), (given - mean).square().sum(), (given - returned).square().sum()]
        )
        return torch.cat([sums, mean]).unsqueeze(0)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the items of all processes, of which each gives one piece, be it empty."""
        self.rows = [self._rows()]
        self.moments = [_merged([torch.zeros(0, 3, device=self.device), *self.moments])]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Metrics of all items since the last reset, over all processes.

        Returns:
            Scalars: ``items``; ``collisions``, share of the items that share their ID, in [0, 1]; ``distinct_ids``;
            ``largest_group``, items of the most frequent ID; ``relative_error``, mean squared error over the variance
            of the vectors, NaN without them; for each level from 1, ``level1_usage`` (share of its codes that at
            least one item has), ``level1_perplexity``, and from level 2 on ``level2_conditional_perplexity``, see
            :func:`conditional_perplexity`.

        Raises:
            RuntimeError: If no item was seen.
        """
        ids = self._ids()
        if not len(ids):
            raise RuntimeError(
                "SemanticIDMetrics must see at least one item before compute(); got none since the last reset. Call "
                "update(ids) first."
            )
        groups = group_tuples(ids)
        values = {
            "items": torch.tensor(len(ids), device=ids.device),
            "collisions": colliding_share(groups.counts),
            "distinct_ids": torch.tensor(len(groups.counts), device=ids.device),
            "largest_group": groups.counts.max(),
            "relative_error": self._relative_error(),
        }
        for level, counts in enumerate(codebook_counts(ids, self.num_codes)):
            name = f"level{level + 1}"
            values[f"{name}_usage"] = (counts > 0).double().mean()
            values[f"{name}_perplexity"] = effective_number(counts)
            if level:
                values[f"{name}_conditional_perplexity"] = conditional_perplexity(ids, level, self.num_codes)
        return values

    def _rows(self) -> Tensor:
        empty = torch.zeros(0, 1 + self.num_levels, dtype=torch.int64, device=self.device)
        return torch.cat([empty, *self.rows])

    def _ids(self) -> Tensor:
        """IDs of the items, those with one index once."""
        rows = self._rows()
        known = rows[rows[:, 0] >= 0]
        numbers, group = torch.unique(known[:, 0], return_inverse=True)
        places = torch.arange(len(group), device=group.device)
        first = torch.full_like(numbers, len(group)).scatter_reduce(0, group, places, "amin")
        return torch.cat([rows[rows[:, 0] < 0], known[first]])[:, 1:]

    def _relative_error(self) -> Tensor:
        merged = _merged([torch.zeros(0, 3, device=self.device), *self.moments])
        return merged[0, 2] / merged[0, 1] if len(merged) else torch.tensor(torch.nan, device=self.device)


def _merged(pieces: list[Tensor]) -> Tensor:
    """Moments of the vectors of all pieces together, ``(1, 3 + D)``, or ``(0, 3)`` of none.

    They are of deviations from the mean, so that vectors far from zero lose no digits.
    """
    filled = [piece for piece in pieces if len(piece)]
    if not filled:
        return pieces[0]
    rows = torch.cat(filled)
    counts, means = rows[:, :1], rows[:, 3:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    between = (counts * (means - mean).square()).sum()
    sums = torch.stack([total, rows[:, 1].sum() + between, rows[:, 2].sum()])
    return torch.cat([sums, mean]).unsqueeze(0)
