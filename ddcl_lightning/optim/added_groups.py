"""Parameter groups that callbacks for fine-tuning add to the optimizers during training."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ddcl_lightning.optim.two_timescale import parameter_ids

if TYPE_CHECKING:
    from ddcl_lightning.module import DDCLReadoutModule


def adopt_groups(optimizers: Sequence[Optimizer], module: "DDCLReadoutModule", factor: float) -> bool:
    """Add new parameter groups to the module's schedule.

    A group starts at the rate with which it came, and is named after the role of its parameters.

    Args:
        optimizers: All optimizers of the module.
        module: Whose parameters they are.
        factor: What the schedule multiplies all rates by at this step.

    Returns:
        Whether there were any: parameters train that did not before.

    Raises:
        ValueError: If a parameter of a new group sits in another group too, or does not train.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    added = [group for group in groups if "base_lr" not in group]
    names = {id(parameter): name for name, parameter in module.named_parameters()} if added else {}
    for new in added:
        members = parameter_ids(new["params"])
        others = parameter_ids(p for group in groups if group is not new for p in group["params"])
        twice = [names.get(member, "?") for member in members if member in others]
        if twice:
            raise ValueError(
                f"a parameter must sit in one group of one optimizer; {min(twice)!r} was added to a second one, and "
                "would be stepped twice. Add it where optimizer is trainer.optimizers[-1] only."
            )
        roles = [role for role, held in module.parameter_groups().items() if members & parameter_ids(held)]
        if not roles:
            raise ValueError(
                f"a group of parameters that do not train was added: {names.get(min(members, default=0), 'none')!r} is "
                "frozen, or belongs to an encoder with rho = 0. Unfreeze it first, and give rho a value > 0."
            )
        taken = {group.get("name") for group in groups}
        labels = (roles[0] if number == 1 else f"{roles[0]}_{number}" for number in itertools.count(1))
        new.setdefault("name", next(label for label in labels if label not in taken))
        new["set_lr"] = new["lr"]
        new["base_lr"] = new["lr"] / factor if factor > 0 else new["lr"]
    return bool(added)


def release_restored(optimizers: Iterable[Optimizer], configured: set[int]) -> bool:
    """Unfreeze the parameters of groups that a resumed run has got back.

    Lightning's fine-tuning callbacks freeze them when a run starts and restore the groups, but leave them frozen.

    Args:
        optimizers: As restored.
        configured: ``id`` of each parameter that is in the optimizers of a new run.

    Returns:
        Whether there were any.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    frozen = [p for group in groups for p in group["params"] if id(p) not in configured and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return bool(frozen)
