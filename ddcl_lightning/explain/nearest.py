"""The nearest few of a stream, for many prototypes at once, in bounded memory."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Nearest(Generic[T]):
    """The ``size`` nearest candidates of a stream for each of M prototypes; ties go to the smaller place.

    Args:
        prototypes: M.
        size: Candidates kept per prototype.
    """

    def __init__(self, prototypes: int, size: int) -> None:
        self._distance = torch.full((prototypes, size), torch.inf, dtype=torch.float64)
        self._place = torch.full((prototypes, size), torch.iinfo(torch.int64).max)
        self._kept: list[dict[int, T]] = [{} for _ in range(prototypes)]

    def add(self, distances: Tensor, places: Tensor, show: Callable[[int, int], T]) -> None:
        """Offer a batch.

        Args:
            distances: ``(M, B)``; infinite ones are no candidates.
            places: Distinct places of the B candidates in the data set, ``(B,)`` int64.
            show: From prototype and row of the batch to what is kept; called for the winners only.
        """
        size = self._distance.shape[1]
        if size == 0 or not len(places):
            return
        number = min(size, len(places))
        # Rows by place first: a stable sort by distance then leaves ties in that order.
        rows = places.argsort()
        order = distances.to("cpu", torch.float64)[:, rows].sort(dim=1, stable=True)
        offered, offered_rows = order.values[:, :number], rows[order.indices[:, :number]]
        distance = torch.cat([self._distance, offered], 1)
        place = torch.cat([self._place, places[offered_rows]], 1)
        row = torch.cat([torch.full_like(self._place, -1), offered_rows], 1)
        by_place = place.argsort(1)
        by_distance = distance.gather(1, by_place).sort(dim=1, stable=True).indices[:, :size]
        winners = by_place.gather(1, by_distance)
        self._distance, self._place = distance.gather(1, winners), place.gather(1, winners)
        row = row.gather(1, winners)
        for prototype in torch.nonzero((row >= 0).any(1)).flatten().tolist():
            old, kept = self._kept[prototype], {}
            for slot in range(size):
                key, new = int(self._place[prototype, slot]), int(row[prototype, slot])
                if torch.isinf(self._distance[prototype, slot]):
                    break
                kept[key] = show(prototype, new) if new >= 0 else old[key]
            self._kept[prototype] = kept

    def of(self, prototype: int) -> list[tuple[float, T]]:
        """Distances and kept items of a prototype, nearest first."""
        neighbors = []
        for distance, place in zip(self._distance[prototype].tolist(), self._place[prototype].tolist(), strict=True):
            if place in self._kept[prototype]:
                neighbors.append((float(distance), self._kept[prototype][place]))
        return neighbors


class MembersFirst(Generic[T]):
    """The nearest few members of each of M prototypes; of a prototype without members, the nearest of all.

    Args:
        prototypes: M.
        size: Candidates kept per prototype.
    """

    def __init__(self, prototypes: int, size: int) -> None:
        self._members: Nearest[T] = Nearest(prototypes, size)
        self._all: Nearest[T] = Nearest(prototypes, size)

    def add(self, distances: Tensor, members: Tensor, places: Tensor, show: Callable[[int, int], T]) -> None:
        """Offer a batch.

        Args:
            distances: ``(M, B)``; infinite ones are no candidates.
            members: ``(M, B)`` boolean, True where the candidate belongs to the prototype.
            places: As for :meth:`Nearest.add`, and so is ``show``.
            show: See there.
        """
        self._members.add(distances.masked_fill(~members.to(distances.device), torch.inf), places, show)
        self._all.add(distances, places, show)

    def of(self, prototype: int) -> list[T]:
        """Kept items of a prototype, nearest first."""
        kept = self._members.of(prototype) or self._all.of(prototype)
        return [item for _, item in kept]
