"""How many prototypes? What to split, merge and prune in a bank, and carrying it out with the optimizers' state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddcl_lightning.functional import nearest_prototype, prototype_critical_temperatures, split_test, token_means
from ddcl_lightning.functional.split import NUM_NULLS
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.optim.resizing_state import resize_state

MIN_TOKENS = 8  # of the sample, in each half of a split


@dataclass(frozen=True)
class SizeRules:
    """Rules of when the number of prototypes changes.

    Attributes:
        min_prototypes: Smallest K, at least 1.
        max_prototypes: Largest K.
        split_margin: A prototype may split where its own critical temperature is above ``(1 + split_margin) T``.
        significance: Chance in (0, 0.5) of splitting a Gaussian; None splits at every critical temperature.
        merge_distance: Prototypes closer than ``merge_distance * sqrt(T)`` become one; 0 merges none.
        prune_fraction: Share of the tokens, as a multiple of the even share 1 / K, below which a prototype is idle.
        patience: Checks in a row for which it must be idle to be removed, at least 1.

    Raises:
        ValueError: If one is out of its range.
    """

    min_prototypes: int = 2
    max_prototypes: int = 64
    split_margin: float = 0.1
    significance: float | None = 0.01
    merge_distance: float = 0.1
    prune_fraction: float = 0.1
    patience: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_prototypes <= self.max_prototypes:
            raise ValueError(
                f"min_prototypes must be at least 1 and at most max_prototypes; got {self.min_prototypes} and "
                f"{self.max_prototypes}. Lower min_prototypes, or raise max_prototypes."
            )
        if self.significance is not None and not 0 < self.significance < 0.5:
            raise ValueError(
                "significance must be in (0, 0.5), the chance of splitting a Gaussian, or None; got "
                f"{self.significance}. Its default is 0.01."
            )
        for name in ("split_margin", "merge_distance"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be finite and >= 0; got {getattr(self, name)}. Pass 0 or more.")
        if not 0 <= self.prune_fraction < 1:
            raise ValueError(
                f"prune_fraction must be in [0, 1), a multiple of the even share 1 / K; got {self.prune_fraction}. "
                "Pass 0 to prune none."
            )
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 check; got {self.patience}. Pass 1 or more.")


class Resize(NamedTuple):
    """Plan of a bank's next prototypes.

    Attributes:
        prototypes: ``(K', d)``, in the order of their predecessors, second halves of splits last.
        parents: Row of the bank that each comes from, ``(K',)`` int64.
        idle: Checks in a row for which each was idle, K' numbers.
        changes: One phrase per change, empty where nothing changes.
    """

    prototypes: Tensor
    parents: Tensor
    idle: list[int]
    changes: list[str]


@torch.no_grad()
def plan_resize(
    tokens: Tensor,
    prototypes: Tensor,
    temperature: float,
    rules: SizeRules,
    idle: list[int],
    *,
    detach_assignments: bool = False,
    seed: int = 0,
) -> Resize:
    """Decide what to prune, merge and split, in this order.

    Args:
        tokens: ``(N, d)``, a sample of what the bank sees.
        prototypes: ``(K, d)``.
        temperature: T > 0, in units of squared distance.
        rules: The rules.
        idle: Checks in a row for which each prototype was idle before this one, K numbers.
        detach_assignments: The bank's own setting, on which critical temperatures depend.
        seed: Seed of the test of splits.

    Returns:
        The next prototypes in float64.
    """
    z, p = tokens.to("cpu", torch.float64), prototypes.to("cpu", torch.float64)
    now = Resize(p, torch.arange(len(p)), list(idle), [])
    share = token_means(z, p, temperature).log_mass.softmax(-1)
    now = _prune(now, share, rules)
    now = _merge(now, share, temperature, rules)
    return _split(now, z, temperature, rules, detach_assignments, seed)


def _prune(now: Resize, share: Tensor, rules: SizeRules) -> Resize:
    limit = rules.prune_fraction / len(share)
    idle = [count + 1 if used < limit else 0 for count, used in zip(now.idle, share.tolist(), strict=True)]
    due = [row for row in share.argsort().tolist() if idle[row] >= rules.patience]
    due = due[: max(0, len(share) - rules.min_prototypes)]
    keep = [row for row in range(len(share)) if row not in due]
    changes = [f"pruned {row} (share {float(share[row]):.2g} < {limit:.2g})" for row in sorted(due)]
    return Resize(now.prototypes[keep], now.parents[keep], [idle[row] for row in keep], changes)


def _merge(now: Resize, share: Tensor, temperature: float, rules: SizeRules) -> Resize:
    prototypes, mass = now.prototypes.clone(), share[now.parents].clone()
    distance = torch.cdist(prototypes, prototypes)
    distance.fill_diagonal_(math.inf)
    keep, changes, limit = list(range(len(prototypes))), list(now.changes), rules.merge_distance * temperature**0.5
    while len(keep) > rules.min_prototypes:
        among = distance[keep][:, keep]
        if not float(among.min()) < limit:
            break
        first, second = (keep[int(i)] for i in divmod(int(among.argmin()), len(keep)))
        stays, goes = (first, second) if mass[first] >= mass[second] else (second, first)
        weight = mass[[stays, goes]] / mass[[stays, goes]].sum()
        changes.append(
            f"merged {int(now.parents[goes])} into {int(now.parents[stays])} (distance "
            f"{float(distance[first, second]):.3g} < {limit:.3g})"
        )
        prototypes[stays] = weight[0] * prototypes[stays] + weight[1] * prototypes[goes]
        mass[stays] += mass[goes]
        keep.remove(goes)
        distance[stays] = distance[:, stays] = torch.linalg.vector_norm(prototypes - prototypes[stays], dim=-1)
        distance[stays, stays] = math.inf
    return Resize(prototypes[keep], now.parents[keep], [now.idle[row] for row in keep], changes)


def _split(
    now: Resize, tokens: Tensor, temperature: float, rules: SizeRules, detach_assignments: bool, seed: int
) -> Resize:
    size = len(now.prototypes)
    if size >= rules.max_prototypes:
        return now
    critical = prototype_critical_temperatures(
        tokens, now.prototypes, temperature, detach_assignments=detach_assignments
    )
    codes = nearest_prototype(tokens, now.prototypes)
    # A half that pruning would take away again is none.
    least = max(MIN_TOKENS, math.ceil(rules.prune_fraction * len(tokens) / (size + 1)))
    needed = -math.inf if rules.significance is None else NormalDist().inv_cdf(1 - rules.significance)
    candidates = []
    for row in torch.nonzero(critical > (1 + rules.split_margin) * temperature).flatten().tolist():
        nulls = 2 if rules.significance is None else NUM_NULLS  # the two means are wanted all the same
        test = split_test(tokens[codes == row], min_tokens=least, seed=seed, num_nulls=nulls)
        if math.isfinite(test.score) and test.score >= needed:
            candidates.append((test.score, row, test.centers))
    candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
    prototypes, parents, idle, changes = now.prototypes.clone(), now.parents.tolist(), list(now.idle), list(now.changes)
    added = []
    for score, row, centers in candidates[: rules.max_prototypes - size]:
        prototypes[row] = centers[0]
        added.append(centers[1])
        parents.append(parents[row])
        idle[row] = 0
        idle.append(0)
        why = "" if rules.significance is None else f", two clusters by {score:.1f} s.d."
        changes.append(f"split {parents[row]} (its T_c {float(critical[row]):.4g} > T {temperature:.4g}{why})")
    prototypes = torch.cat([prototypes, torch.stack(added)]) if added else prototypes
    return Resize(prototypes, torch.tensor(parents), idle, changes)


def resize_bank(bank: PrototypeBank, plan: Resize, optimizers: Iterable[Optimizer] = ()) -> None:
    """Replace the prototypes of a bank of one head by those of a plan, and the rows of the optimizers' state.

    The parameter stays the same object, so parameter groups need no change. A row's state is that of its parent, for
    both halves of a split. Gradients are dropped: do this right after an optimizer step.

    Raises:
        ValueError: If an optimizer keeps state that does not consist of rows; nothing has changed then.
    """
    resize_state(optimizers, bank.prototypes, plan.parents)
    bank.resize(plan.prototypes.unsqueeze(0))
