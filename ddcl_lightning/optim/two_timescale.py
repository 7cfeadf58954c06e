"""Learning rates on two time scales: the ratio rho and its check, and parameter groups that keep it."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.nn.discovery import find_banks


def check_ratio(rho: float, *, allow_unstable: bool = False) -> None:
    """Raise unless ``0 <= rho < 1``, or any finite ``rho >= 0`` where ``allow_unstable``."""
    if not rho >= 0 or math.isinf(rho):
        raise ValueError(f"rho = lr_encoder / lr_prototypes must be finite and >= 0; got {rho}. Pass 0.1, say.")
    if rho >= 1 and not allow_unstable:
        raise ValueError(
            f"rho = lr_encoder / lr_prototypes must be < 1, so that prototypes are the faster ones; got {rho}. "
            "It sets the speed of a collapse; what prevents one is a bound on the scale of the embeddings or a loss of "
            "the encoder's own. Lower rho (the paper takes at most 0.1), or set allow_unstable=True."
        )


@typed
def two_timescale_groups(
    module: nn.Module, lr_prototypes: float, rho: float = 0.1, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for one optimizer: prototypes at ``lr_prototypes``, everything else at ``rho`` times that.

    For existing projects: ``torch.optim.AdamW(two_timescale_groups(self, 1e-2, rho=0.1))``.

    Args:
        module: Holds the banks and the encoder.
        lr_prototypes: Rate of the prototypes, > 0.
        rho: Ratio in [0, 1); with 0 the other parameters are left out.
        weight_decay: Of the other parameters; prototypes get none, it would pull them to the origin.

    Returns:
        One or two groups with ``params``, ``lr``, ``weight_decay`` and ``name``.

    Raises:
        ValueError: If a rate is out of range or the module holds no bank.
    """
    if not lr_prototypes > 0:
        raise ValueError(f"lr_prototypes must be > 0; got {lr_prototypes}. Pass a positive rate.")
    check_ratio(rho)
    fast = [bank.prototypes for bank in find_banks(module).values()]
    if not fast:
        raise ValueError(f"module must hold a PrototypeBank; found none in {type(module).__name__}.")
    known = {id(parameter) for parameter in fast}
    slow = [p for p in module.parameters() if id(p) not in known and p.requires_grad]
    groups = [{"params": fast, "lr": lr_prototypes, "weight_decay": 0.0, "name": "prototypes"}]
    if slow and rho > 0:
        groups.append({"params": slow, "lr": rho * lr_prototypes, "weight_decay": weight_decay, "name": "encoder"})
    return groups


def live_ratio(optimizers: Iterable[Optimizer], fast: set[int], slow: set[int]) -> float | None:
    """Largest rate of a slow parameter over the smallest rate of a fast one, as the optimizers stand now.

    Args:
        optimizers: Torch optimizers.
        fast: ``id`` of each prototype parameter.
        slow: ``id`` of each encoder parameter.

    Returns:
        rho; None where either side is not optimized at all, infinity where prototypes have rate zero.
    """
    slowest_fast, fastest_slow = math.inf, -math.inf
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        members = {id(parameter) for parameter in group["params"]}
        if members & fast:
            slowest_fast = min(slowest_fast, float(group["lr"]))
        if members & slow:
            fastest_slow = max(fastest_slow, float(group["lr"]))
    if slowest_fast == math.inf or fastest_slow == -math.inf:
        return None
    if slowest_fast == 0:
        # A warm-up that starts both at zero moves neither.
        return 0.0 if fastest_slow == 0 else math.inf
    return fastest_slow / slowest_fast


def parameter_ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    """``id`` of each parameter, for :func:`live_ratio`."""
    return {id(parameter) for parameter in parameters}


def run_length(trainer: pl.Trainer, interval: Literal["epoch", "step"]) -> float:
    """Epochs or optimizer steps of a run, as far as its limits tell; infinite where they do not.

    Under manual optimization a module may accumulate gradients itself: its ``accumulate_grad_batches`` counts, if any.
    """
    module = trainer.lightning_module
    window = trainer.accumulate_grad_batches
    if not module.automatic_optimization:
        window = int(getattr(module, "accumulate_grad_batches", 1))
    batches = trainer.num_training_batches
    steps = math.ceil(batches / window) if math.isfinite(batches) else math.inf
    epochs = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    limit = math.inf if trainer.max_steps < 0 else trainer.max_steps
    if interval == "step":
        return float(min(epochs * steps, limit))
    whole = math.ceil(limit / steps) if math.isfinite(limit) and math.isfinite(steps) else math.inf
    return float(min(epochs, whole))
