"""Sums over the tokens of each prototype, which add up over batches and processes."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional._common import accumulation_dtype, check_shapes, zero_padding


class Cells(NamedTuple):
    """The tokens that are nearest to each prototype.

    Attributes:
        counts: How many, ``(H, K)``, a float.
        distortion: Sum of their squared distances to the prototype, ``(H, K)``.
        token: The last one of them, ``(H, K, d)``; zero where there is none.
        place: Where that token comes in the order of all tokens, ``(H, K)`` int64; -1 where there is none.
    """

    counts: Tensor
    distortion: Tensor
    token: Tensor
    place: Tensor

    def merge(self, later: "Cells") -> "Cells":
        """Cells of two sets of tokens together, of which the tokens of the other come last."""
        replaced = later.place >= 0
        return Cells(
            self.counts + later.counts,
            self.distortion + later.distortion,
            torch.where(replaced.unsqueeze(-1), later.token, self.token),
            torch.where(replaced, later.place, self.place),
        )


class Moments(NamedTuple):
    """Number, mean and scatter of the tokens of each head, about their mean, so that large offsets cost no digits.

    Attributes:
        number: How many, ``(H,)``, a float.
        mean: Their mean, ``(H, d)``; zero where there is none.
        scatter: Sum of the outer products of their distances from the mean, ``(H, d, d)``.
    """

    number: Tensor
    mean: Tensor
    scatter: Tensor

    def merge(self, later: "Moments") -> "Moments":
        """Moments of two sets of tokens together."""
        number = self.number + later.number
        share = later.number / number.clamp(min=1.0)
        apart = later.mean - self.mean
        between = (self.number * share)[:, None, None] * apart.unsqueeze(-1) * apart.unsqueeze(-2)
        mean = self.mean + share.unsqueeze(-1) * apart
        return Moments(number, mean, self.scatter + later.scatter + between)


class TokenStatistics(NamedTuple):
    """Additive statistics of the tokens of each prototype, for any number of tokens.

    Attributes:
        log_mass: Logarithm of the tokens assigned to each prototype, ``ln sum_n q_nk``, ``(..., K)``; finite where the
            mass itself underflows.
        mean: ``sum_n w_kn z_n`` with ``w_kn = softmax_n(ln q_nk)``, ``(..., K, d)``.
        cells: The tokens that are nearest to each prototype, or None where they were not asked for.
        moments: Mean and scatter of all tokens, or None where they were not asked for.
    """

    log_mass: Tensor
    mean: Tensor
    cells: Cells | None = None
    moments: Moments | None = None

    def merge(self, later: "TokenStatistics") -> "TokenStatistics":
        """Statistics of two sets of tokens together, of which the tokens of the other come last."""
        log_mass = torch.logaddexp(self.log_mass, later.log_mass)
        share = (later.log_mass - log_mass).exp().nan_to_num(nan=0.0).unsqueeze(-1)  # two empty sets: -inf - -inf
        cells = None if self.cells is None or later.cells is None else self.cells.merge(later.cells)
        moments = None if self.moments is None or later.moments is None else self.moments.merge(later.moments)
        # Calls of several dtypes: the widest.
        before, after = (mean.to(share.dtype) for mean in (self.mean, later.mean))
        return TokenStatistics(log_mass, torch.lerp(before, after, share), cells, moments)

    def finite(self, loss: Tensor) -> "TokenStatistics":
        """These statistics, or those of no token if a number in them or the loss of the call is not finite."""
        log_mass, mean, cells, moments = self
        # A mass of -inf is that of no token; NaN is not below infinity.
        clean = torch.isfinite(loss).all() & torch.isfinite(mean).all() & (log_mass < torch.inf).all()
        if cells is not None:
            clean &= torch.isfinite(cells.distortion).all()
        if moments is not None:
            clean &= torch.isfinite(moments.scatter).all()
        if cells is not None:
            counts, distortion, token = (torch.where(clean, value, 0.0) for value in cells[:3])
            cells = Cells(counts, distortion, token, torch.where(clean, cells.place, -1))
        if moments is not None:
            moments = Moments(*(torch.where(clean, value, 0.0) for value in moments))
        return TokenStatistics(torch.where(clean, log_mass, -torch.inf), torch.where(clean, mean, 0.0), cells, moments)


def code_counts(codes: Tensor, num_codes: int, mask: Tensor | None = None) -> Tensor:
    """Tokens on each code, ``(..., K)`` int64, without a wait for the device.

    Args:
        codes: ``(..., N)`` int64 in [0, K), or -1 for padding, which is left out.
        num_codes: K.
        mask: ``(..., N)`` boolean, True for valid tokens, beside the codes of -1.
    """
    # Padding gets a column of its own: selecting it away would wait for the GPU, as bincount does.
    columns = codes + 1 if mask is None else (codes + 1).masked_fill(~mask, 0)
    counts = columns.new_zeros(*codes.shape[:-1], num_codes + 1)
    return counts.scatter_add_(-1, columns, torch.ones_like(columns))[..., 1:]


@torch.no_grad()
def cells_of(
    tokens: Tensor, prototypes: Tensor, codes: Tensor, mask: Tensor | None = None, order: Tensor | None = None
) -> Cells:
    """Statistics of the tokens in the cell of each prototype.

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
    counts = code_counts(codes, size, mask).to(dtype)
    codes = codes.clamp(min=0)
    distance = (z - p.gather(1, codes.unsqueeze(-1).expand(-1, -1, dim))).square().sum(-1).masked_fill(~valid, 0.0)
    position = torch.arange(z.shape[1], device=z.device).expand(heads, -1).masked_fill(~valid, -1)
    distortion = z.new_zeros(heads, size).scatter_add_(1, codes, distance)
    last = position.new_full((heads, size), -1).scatter_reduce_(1, codes, position, "amax")
    occupied = last >= 0
    token = z.gather(1, last.clamp(min=0).unsqueeze(-1).expand(-1, -1, dim))
    place = last if order is None else order[last.clamp(min=0)].masked_fill(~occupied, -1)
    return Cells(counts, distortion, token.masked_fill(~occupied.unsqueeze(-1), 0.0), place)


@torch.no_grad()
def moments_of(tokens: Tensor, mask: Tensor | None = None) -> Moments:
    """Moments of ``(H, N, d)`` tokens with mask ``(H, N)``, True for valid ones, in float32 or wider."""
    with torch.autocast(tokens.device.type, enabled=False):
        z = zero_padding(tokens.to(accumulation_dtype(tokens)), mask)
        number = z.new_full(z.shape[:1], z.shape[1]) if mask is None else mask.sum(-1).to(z.dtype)
        mean = z.sum(-2) / number.clamp(min=1.0).unsqueeze(-1)
        centred = zero_padding(z - mean.unsqueeze(-2), mask)
        return Moments(number, mean, centred.mT @ centred)
