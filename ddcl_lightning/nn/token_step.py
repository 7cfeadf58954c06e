"""The token-normalized step of prototypes, from statistics of their tokens."""

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import max_over_processes, sum_over_processes
from ddcl_lightning.functional import TokenStatistics
from ddcl_lightning.nn.relocation import relocate_prototypes


@torch.no_grad()
def move_prototypes(
    prototypes: Tensor,
    statistics: TokenStatistics,
    loads: Tensor | None,
    *,
    step_size: float,
    relocation_threshold: float,
    load_exponent: float,
) -> Tensor | None:
    """Move prototypes towards the means of their tokens, and those of nearly empty cells to crowded ones.

    Args:
        prototypes: ``(H, K, d)`` in float32 or wider, changed in place.
        statistics: Those of the tokens of this process since the last step.
        loads: Running distortion and number of tokens of the cells, ``(H, K, 2)``; None or zero before the first step.
        step_size: Share of the distance to the means that is covered, in [0, 1].
        relocation_threshold: Share of the mean load under which a prototype moves elsewhere; 0 never moves any.
        load_exponent: b of the load ``n^b D^(1 - b)`` of a cell with n tokens and distortion D.

    Returns:
        The running loads after the step, or None where nothing is relocated.
    """
    target, has_tokens = _reduce(statistics)
    prototypes.copy_(torch.where(has_tokens, prototypes.lerp(target.to(prototypes.dtype), step_size), prototypes))
    if relocation_threshold == 0 or statistics.cells is None:
        return None
    return relocate_prototypes(prototypes, statistics.cells, loads, relocation_threshold, load_exponent)


def check_step(name: str, step_size: float, relocation_threshold: float, load_exponent: float) -> None:
    """Raise a ValueError if a number is out of its range; ``name`` is that of the step size."""
    if not 0 < step_size <= 1:
        raise ValueError(f"{name} must be in (0, 1], a step size; got {step_size}. 0.05 is a good value.")
    if not 0 <= relocation_threshold < 1:
        raise ValueError(
            f"relocation_threshold must be in [0, 1), a share of the mean load; got {relocation_threshold}. "
            "0.5 suits codebooks, 0 moves none."
        )
    if not 0 <= load_exponent <= 1:
        raise ValueError(
            f"load_exponent must be in [0, 1], from equal distortion (0) to equal numbers of tokens (1); got "
            f"{load_exponent}. 0.75 is a good value."
        )


def _reduce(statistics: TokenStatistics) -> tuple[Tensor, Tensor]:
    """Means over all processes, weighted by mass, and whether there is any mass, ``(H, K, 1)``.

    The largest mass is taken out so that nothing underflows.
    """
    log_mass, mean = statistics.log_mass, statistics.mean
    largest = max_over_processes(log_mass)
    some = (largest > -torch.inf).unsqueeze(-1)
    weight = (log_mass - largest).exp().unsqueeze(-1).masked_fill(~some, 0.0)
    total = sum_over_processes(weight)
    return sum_over_processes(weight * mean) / torch.where(some, total, 1.0), some
