"""The state that optimizers keep for prototypes whose number changes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddcl_lightning.optim.token_normalized import TokenNormalized


@torch.no_grad()
def resize_state(optimizers: Iterable[Optimizer], prototypes: Tensor, parents: Tensor) -> None:
    """Resize the optimizers' state of a parameter whose rows are about to change; each row takes that of its parent.

    Args:
        optimizers: All of them; those without the parameter stay as they are.
        prototypes: The parameter ``(H, K, d)``, still of its old size.
        parents: Old row of each new one, ``(K',)`` int64.

    Raises:
        ValueError: If a state has neither the parameter's rows nor a single number; nothing has changed then.
    """
    changes: list[tuple[dict[str, Any], str, Tensor]] = []
    owners = [o for o in optimizers if any(p is prototypes for group in o.param_groups for p in group["params"])]
    for optimizer in owners:
        state: dict[str, Any] = optimizer.state.get(prototypes, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or (value.numel() <= 1 and value.shape != prototypes.shape):
                continue
            if value.shape[:2] != prototypes.shape[:2]:
                raise ValueError(
                    f"optimizer {type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for prototypes "
                    f"{tuple(prototypes.shape)}, which cannot follow a change of their number. Use Adam, SGD or "
                    "TokenNormalized for the prototypes."
                )
            changes.append((state, name, value.index_select(1, parents.to(value.device))))
    for state, name, value in changes:
        state[name] = value
    for optimizer in owners:
        if isinstance(optimizer, TokenNormalized):
            optimizer.forget(prototypes)
