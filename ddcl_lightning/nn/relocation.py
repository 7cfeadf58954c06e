"""Moving prototypes of nearly empty cells to where they are needed, as the enhanced LBG algorithm does."""

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import sum_over_processes, take_the_last
from ddcl_lightning.functional import Cells

CROWDED = 1.5  # a cell with this many times the mean load may get a second prototype
RECENT = 0.05  # weight of the newest step in the running loads


def relocate_prototypes(
    prototypes: Tensor, cells: Cells, running: Tensor | None, threshold: float, exponent: float
) -> Tensor:
    """Move prototypes of nearly empty cells into crowded ones, the emptiest into the most crowded.

    Args:
        prototypes: ``(H, K, d)``, changed in place.
        cells: Content of their cells, on this process.
        running: Running distortion and number of tokens of the cells, ``(H, K, 2)``; None before the first step.
        threshold: Share of the mean load under which a prototype moves.
        exponent: b of the load ``n^b D^(1 - b)`` of a cell with n tokens and distortion D.

    Returns:
        The running statistics after this step, ``(H, K, 2)``, those of all processes.
    """
    latest = sum_over_processes(torch.stack([cells.distortion, cells.counts], -1))
    if running is None:
        running = torch.zeros_like(latest)
    # The first look counts whole, one without tokens not at all.
    weight = torch.where(running[..., 1].any(), RECENT, 1.0) * latest[..., 1].any()
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
    moves = (load.gather(1, empty) < threshold * mean) & (load.gather(1, crowded) > CROWDED * mean)
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


def _rows(index: Tensor, values: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
