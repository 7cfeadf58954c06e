"""What lies in the cell of each prototype: how many tokens, how far away, and one of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional._common import accumulation_dtype, check_shapes


class Cells(NamedTuple):
    """The tokens that are nearest to each prototype.

    Attributes:
        number: How many, ``(H, K)``, a float.
        distortion: Sum of their squared distances to the prototype, ``(H, K)``.
        token: The last one of them, ``(H, K, d)``; zero where there is none.
        occupied: Whether there is one, ``(H, K)`` boolean.
        place: Where that token comes in the order of all tokens, ``(H, K)`` int64; -1 where there is none.
    """

    number: Tensor
    distortion: Tensor
    token: Tensor
    occupied: Tensor
    place: Tensor


@torch.no_grad()
def cells(
    tokens: Tensor, prototypes: Tensor, codes: Tensor, mask: Tensor | None = None, order: Tensor | None = None
) -> Cells:
    """Look into the cells.

    Args:
        tokens: ``(H, N, d)``.
        prototypes: ``(H, K, d)``.
        codes: Index of the nearest prototype, ``(H, N)`` int64, -1 for padding.
        mask: ``(H, N)`` boolean, True for valid tokens.
        order: Where each token comes among those of all calls and processes, ``(N,)`` int64 >= 0, increasing; by
            default their own numbers.
    """
    check_shapes(tokens, prototypes, mask)
    dtype = accumulation_dtype(tokens, prototypes)
    heads, size, dim = prototypes.shape
    z, p = tokens.to(dtype), prototypes.to(dtype)
    valid = codes >= 0 if mask is None else mask & (codes >= 0)
    codes = codes.clamp(min=0)
    distance = (z - p.gather(1, codes.unsqueeze(-1).expand(-1, -1, dim))).square().sum(-1)
    distance = distance.masked_fill(~valid, 0.0)
    position = torch.arange(z.shape[1], device=z.device).expand(heads, -1).masked_fill(~valid, -1)
    weights = valid.to(dtype)
    number, distortion = (z.new_zeros(heads, size).scatter_add_(1, codes, value) for value in (weights, distance))
    last = position.new_full((heads, size), -1).scatter_reduce_(1, codes, position, "amax")
    occupied = last >= 0
    token = z.gather(1, last.clamp(min=0).unsqueeze(-1).expand(-1, -1, dim))
    place = last if order is None else order[last.clamp(min=0)].masked_fill(~occupied, -1)
    return Cells(number, distortion, token.masked_fill(~occupied.unsqueeze(-1), 0.0), occupied, place)


def merge_cells(first: Cells, second: Cells) -> Cells:
    """Cells of two sets of tokens together; of the tokens, those of the second set come last."""
    token = torch.where(second.occupied.unsqueeze(-1), second.token, first.token)
    place = torch.where(second.occupied, second.place, first.place)
    return Cells(
        first.number + second.number,
        first.distortion + second.distortion,
        token,
        first.occupied | second.occupied,
        place,
    )
