"""Small problems in float64 for the study of stability: tokens in clusters, equilibria, limits of a rate, splits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning.functional import (
    assignment_statistics,
    critical_temperature,
    free_energy,
    prototype_attention,
    soft_assign,
    split_margins,
)


def clusters(seed: int, size: int = 120, dim: int = 3, number: int = 6) -> Tensor:
    """Tokens ``(N, d)``: clusters of different widths at random places, some of them near each other."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(number, dim, generator=generator, dtype=torch.float64)
    centers[1::2] = centers[::2] + 0.7 * torch.randn(number // 2, dim, generator=generator, dtype=torch.float64)
    widths = 0.1 + 0.4 * torch.rand(number, 1, generator=generator, dtype=torch.float64)
    code = torch.arange(size) % number
    return centers[code] + widths[code] * torch.randn(size, dim, generator=generator, dtype=torch.float64)


def start(tokens: Tensor, size: int, seed: int) -> Tensor:
    """Prototypes at tokens drawn without replacement."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:size]].clone()


def gradient(tokens: Tensor, prototypes: Tensor, temperature: float, detach: bool) -> Tensor:
    """Gradient of ``L_q`` with respect to the prototypes, written out for speed."""
    distances = torch.cdist(tokens, prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()
    weights = (-distances / temperature).softmax(-1)
    if not detach:
        loss = (weights * distances).sum(-1, keepdim=True)
        weights = weights * (1 - (distances - loss) / temperature)
    return 2 / len(tokens) * (weights.sum(0).unsqueeze(-1) * prototypes - weights.T @ tokens)


def require_gradient_of_layer(tokens: Tensor, prototypes: Tensor, temperature: float, detach: bool) -> None:
    """Raise unless :func:`gradient` is what the layer's backward pass gives."""
    leaf = prototypes.detach().requires_grad_()
    loss = prototype_attention(tokens, leaf, temperature, detach_assignments=detach).terms.loss
    torch.testing.assert_close(gradient(tokens, prototypes, temperature, detach), torch.autograd.grad(loss, leaf)[0])


def both(tokens: Tensor, prototypes: Tensor, temperature: float) -> tuple[float, float]:
    """``L_q`` and F."""
    loss = prototype_attention(tokens, prototypes, temperature).terms.loss
    entropy = assignment_statistics(tokens, prototypes, temperature).entropy
    return float(loss), float(free_energy(loss, temperature, entropy))


def settled(tokens: Tensor, prototypes: Tensor, temperature: float, detach: bool, steps: int, size: float) -> Tensor:
    """Prototypes after gradient steps that are divided by twice their mass, as the token-normalized step is."""
    p = prototypes.clone()
    for _ in range(steps):
        mass = soft_assign(tokens, p, temperature).mean(0).clamp(min=1e-12)
        step = size * gradient(tokens, p, temperature, detach) / (2 * mass.unsqueeze(-1))
        p -= step
        if float(step.abs().max()) < 1e-13:
            break
    return p


def equilibrium(tokens: Tensor, size: int, fraction: float, detach: bool, seed: int) -> tuple[Tensor, float]:
    """Prototypes where the gradient is zero, and T."""
    temperature = fraction * float(critical_temperature(tokens, detach_assignments=detach))
    rate = 1.0 if detach else 0.3
    p = start(tokens, size, seed)
    require_gradient_of_layer(tokens, p, temperature, detach)
    return settled(tokens, p, temperature, detach, 20_000, rate), temperature


def measured_limit(
    tokens: Tensor, prototypes: Tensor, temperature: float, detach: bool, largest: float, steps: int
) -> float | None:
    """Largest rate of plain gradient steps at which a small perturbation of an equilibrium shrinks, by bisection."""
    generator = torch.Generator().manual_seed(0)
    perturbation = 1e-7 * torch.randn(prototypes.shape, generator=generator, dtype=torch.float64)

    def shrinks(rate: float) -> bool:
        p = prototypes + perturbation
        for _ in range(steps):
            p = p - rate * gradient(tokens, p, temperature, detach)
        return bool((p - prototypes).norm() < perturbation.norm())

    if not shrinks(0.1 * largest):
        return None  # a saddle, or not reached
    low, high = 0.0, largest
    for _ in range(12):
        rate = (low + high) / 2
        low, high = (rate, high) if shrinks(rate) else (low, rate)
    return low


def hessian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Hessian of a function of a vector."""
    matrix: Tensor = torch.autograd.functional.hessian(function, point)
    return (matrix + matrix.T) / 2


class Split(NamedTuple):
    """One group of coinciding prototypes that has parted."""

    named: bool  # it had the smallest margin before
    candidates: int  # groups of more than one prototype
    margin: float  # before


def annealed_splits(tokens: Tensor, size: int, detach: bool, seed: int, last: float, factor: float) -> list[Split]:
    """Splits while T falls from 1.05 of its critical value to the fraction ``last`` of it."""
    generator = torch.Generator().manual_seed(seed)
    critical = float(critical_temperature(tokens, detach_assignments=detach))
    scale = float(tokens.var(0).sum().sqrt())
    p, fraction, before = tokens.mean(0).repeat(size, 1), 1.05, torch.zeros(size, dtype=torch.int64)
    splits: list[Split] = []
    while fraction > last:
        margins = split_margins(tokens, p, fraction * critical, detach_assignments=detach)
        fraction *= factor
        noise = 1e-5 * scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p = settled(tokens, p + noise, fraction * critical, detach, 600, 1.0 if detach else 0.5)
        now = groups(p, 1e-2 * scale)
        several = [g for g in before.unique().tolist() if int((before == g).sum()) > 1]
        smallest = {g: float(margins[before == g].mean()) for g in several}
        # Of several that part at the same T, the one that was said to be first.
        parted = [g for g in several if len(now[before == g].unique()) > 1]
        for group in sorted(parted, key=smallest.__getitem__):
            open_groups = {g: margin for g, margin in smallest.items() if g == group or g not in parted}
            splits.append(
                Split(group == min(open_groups, key=open_groups.__getitem__), len(open_groups), smallest[group])
            )
        before = now
        for group in before.unique().tolist():  # what coincides, coincides exactly
            p[before == group] = p[before == group].mean(0)
    return splits


def groups(prototypes: Tensor, distance: float) -> Tensor:
    """Number of the group of each prototype: those with chains of neighbours nearer than a distance."""
    near = torch.cdist(prototypes, prototypes) < distance
    for _ in range(len(prototypes)):
        near = (near.double() @ near.double()) > 0
    return near.double().argmax(1)
