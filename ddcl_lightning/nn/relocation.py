"""Moving prototypes of nearly empty cells to where they are needed, as the enhanced LBG algorithm does."""

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import sum_over_processes, take_the_last
from ddcl_lightning.functional import Cells, cells_of, nearest_prototype

CROWDED = 1.5  # a cell with this many times the mean load may get a second prototype
ROUNDS = 400  # of K / 64 prototypes each, so that all of them could move six times
QUIET_ROUNDS = 3  # rounds that there are at least
SETTLING_WEIGHT = 0.5  # of the newest round
RECENT = 0.05  # weight of the newest step in the running loads


def relocate_prototypes(
    prototypes: Tensor,
    cells: Cells,
    running: Tensor | None,
    threshold: float,
    exponent: float,
    *,
    crowded_from: float = CROWDED,
    recent: float = RECENT,
) -> Tensor:
    """Move prototypes of nearly empty cells into crowded ones, the emptiest into the most crowded.

    Args:
        prototypes: ``(H, K, d)``, changed in place.
        cells: Content of their cells, on this process.
        running: Running distortion and number of tokens of the cells, ``(H, K, 2)``; None before the first step.
        threshold: Share of the mean load under which a prototype moves.
        exponent: b of the load ``n^b D^(1 - b)`` of a cell with n tokens and distortion D.
        recent: Weight of this step in the running statistics.
        crowded_from: How many times the mean load a cell bears that gets a second prototype.

    Returns:
        The running statistics after this step, ``(H, K, 2)``, those of all processes.
    """
    latest = sum_over_processes(torch.stack([cells.distortion, cells.counts], -1))
    running = torch.zeros_like(latest) if running is None else running.to(latest)
    # The first look counts whole, one without tokens not at all.
    weight = torch.where(running[..., 1].any(), recent, 1.0) * latest[..., 1].any()
    running = running.lerp(latest, weight.to(latest.dtype))
    distortion, number = running.unbind(-1)
    load = number**exponent * distortion ** (1 - exponent)
    mean = load.mean(-1, keepdim=True)
    most = max(1, load.shape[-1] // 64)
    order = load.sort(dim=-1, stable=True).indices
    empty, crowded = order[:, :most], order.flip(-1)[:, :most]
    token, has_token = take_the_last(cells.token, cells.place)

    # What its tokens lose: all of them go to the nearest other prototype, at the worst.
    source = _rows(empty, prototypes)
    distances = torch.cdist(source.to(running.dtype), prototypes.to(running.dtype)).square()
    neighbour = distances.scatter(2, empty.unsqueeze(-1), torch.inf).amin(-1)
    loss = number.gather(1, empty) * neighbour
    moves = (load.gather(1, empty) < threshold * mean) & (load.gather(1, crowded) > crowded_from * mean)
    moves &= (loss < distortion.gather(1, crowded)) & has_token.gather(1, crowded)
    moves = moves.unsqueeze(-1)

    target = torch.where(moves, _rows(crowded, token).to(prototypes.dtype), source)
    prototypes.scatter_(1, empty.unsqueeze(-1).expand_as(target), target)
    # Both parts of a cell that was split start with half of it.
    half = _rows(crowded, running) / 2
    for index in (empty, crowded):
        divided = torch.where(moves, half, _rows(index, running))
        running.scatter_(1, index.unsqueeze(-1).expand_as(divided), divided)
    return running


@torch.no_grad()
def relocate_until_settled(
    prototypes: Tensor, tokens: Tensor, mask: Tensor | None, order: Tensor, *, threshold: float, exponent: float
) -> None:
    """Move prototypes of nearly empty cells into crowded ones, round by round, until none has to move any more.

    Those that have moved take the mean of their cell in every round; the others stay where they are.

    Args:
        prototypes: ``(H, K, d)``, changed in place.
        tokens: ``(H, N, d)``, finite where valid.
        mask: ``(H, N)`` boolean, True for valid tokens, or None.
        order: Where each token comes among those of all processes, ``(N,)``.
        threshold: See :func:`relocate_prototypes`, as for the exponent.
        exponent: See there.
    """
    loads = None
    moved = torch.zeros_like(prototypes[..., :1], dtype=torch.bool)
    for round_number in range(ROUNDS):
        codes = nearest_prototype(tokens, prototypes)
        if round_number:
            prototypes.copy_(torch.where(moved, _cell_means(prototypes, tokens, codes, mask), prototypes))
        cells = cells_of(tokens, prototypes, codes, mask, order)
        before = prototypes.clone()
        loads = relocate_prototypes(
            prototypes, cells, loads, threshold, exponent, crowded_from=1.0, recent=SETTLING_WEIGHT
        )
        moves = (prototypes != before).any(-1, keepdim=True)
        moved |= moves
        if round_number > QUIET_ROUNDS and not bool(moves.any()):
            return


def _cell_means(prototypes: Tensor, tokens: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """Mean token of each cell over all processes, ``(H, K, d)``; the prototype where the cell is empty."""
    valid = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
    rows = torch.cat([tokens.masked_fill(valid.unsqueeze(-1) == 0, 0.0), valid.unsqueeze(-1)], -1)
    index = codes.unsqueeze(-1).expand_as(rows)
    sums = rows.new_zeros(*prototypes.shape[:2], rows.shape[-1]).scatter_add_(1, index, rows)
    sums = sum_over_processes(sums)
    number = sums[..., -1:]
    return torch.where(number > 0, sums[..., :-1] / number.clamp(min=1.0), prototypes.to(sums.dtype)).to(prototypes)


def _rows(index: Tensor, values: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
