"""Semantic IDs that several items share, and the usual ways to make them different.

An ID is a tuple of L codes, one per level of a residual quantizer. Nothing here is random: the same IDs in the same
order give the same result.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddcl_lightning._utils.arguments import described, require_at_least


class TupleGroups(NamedTuple):
    """Items that share a tuple of codes.

    Attributes:
        tuples: The distinct tuples in lexical order, ``(M, L)``.
        group: Place of each item's tuple among them, ``(N,)`` int64.
        counts: Items of each, ``(M,)`` int64.
    """

    tuples: Tensor
    group: Tensor
    counts: Tensor


def check_ids(ids: Tensor, argument: str = "ids", lowest: int = -1) -> None:
    """Raise unless IDs are integers ``(N, L)`` of at least ``lowest``; L may be 0.

    Raises:
        TypeError: If they are no integers.
        ValueError: If they have another shape or, on a CPU, where looking is free, are below ``lowest``.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"{argument} must be a tensor of integers; got {described(ids)}. Pass what encode of a quantizer returns."
        )
    if ids.dim() != 2:
        raise ValueError(
            f"{argument} must have shape (N, L), a row of L codes per item; got {tuple(ids.shape)}. Flatten all but "
            "the last dimension."
        )
    if ids.device.type == "cpu" and ids.numel() and int(ids.min()) < lowest:
        raise ValueError(
            f"{argument} must be at least {lowest}; got {int(ids.min())}. Pass what encode of a quantizer returns."
        )


def group_tuples(ids: Tensor) -> TupleGroups:
    """Group items by their tuple of codes.

    Args:
        ids: ``(N, L)`` integers.

    Returns:
        Tuples, the place of each item's and their counts.
    """
    check_ids(ids)
    if ids.shape[1] == 0:  # one empty tuple, which torch.unique does not take
        group = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        return TupleGroups(ids[:1], group, torch.full((min(1, len(ids)),), len(ids), device=ids.device))
    return TupleGroups(*torch.unique(ids, dim=0, return_inverse=True, return_counts=True))


def disambiguate(ids: Tensor) -> Tensor:
    """Append a code that tells items of the same tuple apart: their running number, 0 for the first one.

    This is the extra token of TIGER (Rajput et al. 2023, section 3.1). It depends on the order of the items: keep it,
    or sort them by something of their own.

    Args:
        ids: ``(N, L)`` integers; rows with a -1 are padding, and get -1.

    Returns:
        ``(N, L + 1)`` int64, every valid row another one.

    Raises:
        TypeError: If IDs are no integers.
        ValueError: If they have another shape.
    """
    group = group_tuples(ids).group
    order = group.argsort(stable=True)
    ordered = group[order]
    places = torch.arange(len(ids), device=ids.device)
    number = torch.empty_like(places)
    number[order] = places - torch.searchsorted(ordered, ordered)
    number = number.masked_fill((ids < 0).any(1), -1)
    return torch.cat([ids.long(), number.unsqueeze(1)], 1)


def assign_balanced(prefixes: Tensor, costs: Tensor, capacity: int = 1) -> Tensor:
    """Codes of the last level that no tuple has more often than its capacity, at the least total cost.

    Items whose nearest codes are not taken too often keep them. Within a prefix where a code is, all items are assigned
    anew by an optimal matching (:func:`scipy.optimize.linear_sum_assignment`), so that items move to a next nearest
    code where that costs least. A prefix of n > ``capacity * K`` items has no room for them all: each of its codes gets
    n / K of them, rounded down or up, and :func:`disambiguate` tells these apart.

    The matching of n items takes time up to n^3: it is for prefixes of hundreds or a few thousand items.

    Args:
        prefixes: Codes of the levels before, ``(N, L - 1)`` integers; L may be 1.
        costs: Cost of each code of the last level for each item, ``(N, K)``, finite: its squared distance.
        capacity: Items that may share a tuple, at least 1.

    Returns:
        IDs ``(N, L)`` int64, on the device of the prefixes.

    Raises:
        TypeError: If the prefixes are no integers.
        ValueError: If shapes do not fit each other, a cost is not finite or the capacity is below 1.
    """
    require_at_least(1, capacity=capacity)
    check_ids(prefixes, "prefixes", lowest=0)
    if costs.dim() != 2 or len(costs) != len(prefixes) or costs.shape[1] < 1:
        raise ValueError(
            f"costs must have shape (N, K) = ({len(prefixes)}, K), a row per item; got {tuple(costs.shape)}. Give the "
            "squared distance of every code to every item."
        )
    matrix: npt.NDArray[np.float64] = costs.detach().double().cpu().numpy()
    if not np.isfinite(matrix).all():
        raise ValueError("costs must be finite; got NaN or infinity. Check the vectors of the items.")
    last = matrix.argmin(1)
    groups = group_tuples(prefixes)
    items_of = np.split(groups.group.argsort(stable=True).cpu().numpy(), groups.counts.cumsum(0).cpu().numpy()[:-1])
    for items in items_of:
        if np.bincount(last[items], minlength=1).max(initial=0) > capacity:
            last[items] = _matched(matrix[items], capacity)
    return torch.cat([prefixes.long(), torch.from_numpy(last).to(prefixes.device).unsqueeze(1)], 1)


def _matched(costs: npt.NDArray[np.float64], capacity: int) -> npt.NDArray[np.int64]:
    """Code of each of n items, none more often than ``capacity`` or, without room for that, all as often as others."""
    items, codes = costs.shape
    if items <= capacity * codes:
        places = np.repeat(costs, min(capacity, items), axis=1)  # no code can have more items than there are
        columns = linear_sum_assignment(places)[1] // min(capacity, items)
    else:
        needed = np.repeat(np.arange(codes), items // codes)
        code_of_place = np.concatenate([needed, np.arange(codes)])
        # Places that must be taken come before all others, whatever they cost.
        bonus = items * (costs.max() - costs.min()) + 1.0
        places = costs[:, code_of_place] - bonus * (np.arange(len(code_of_place)) < len(needed))
        columns = code_of_place[linear_sum_assignment(places)[1]]
    assigned: npt.NDArray[np.int64] = columns
    return assigned
