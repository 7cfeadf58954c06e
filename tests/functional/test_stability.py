"""What a step lowers and how large it may be, in real descent through the layer's own backward pass."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import (
    assignment_statistics,
    critical_temperature,
    descent_violation,
    free_energy,
    largest_stable_rate,
    lyapunov,
    prototype_attention,
    prototype_attention_reference,
)


def tokens_in_clusters(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return centers[torch.arange(80) % 4] + 0.5 * torch.randn(80, 3, generator=generator, dtype=torch.float64)


def descend(
    tokens: Tensor, prototypes: Tensor, temperature: float, rate: float, steps: int, detach: bool
) -> tuple[Tensor, list[Tensor]]:
    """Prototypes after plain gradient steps, and those of every step."""
    p = prototypes.clone().requires_grad_()
    optimizer = torch.optim.SGD([p], lr=rate)
    course = []
    for _ in range(steps):
        course.append(p.detach().clone())
        optimizer.zero_grad()
        prototype_attention(tokens, p, temperature, detach_assignments=detach).terms.loss.backward()
        optimizer.step()
    return p.detach(), course


def values(tokens: Tensor, prototypes: Tensor, temperature: float) -> dict[str, float]:
    loss = prototype_attention(tokens, prototypes, temperature).terms.loss
    entropy = assignment_statistics(tokens, prototypes, temperature).entropy
    return {"loss": float(loss), "free energy": float(free_energy(loss, temperature, entropy))}


def rate_of(tokens: Tensor, prototypes: Tensor, temperature: float) -> float:
    return float(largest_stable_rate(assignment_statistics(tokens, prototypes, temperature).mass))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
def test_the_largest_stable_rate_is_where_descent_stops_to_converge(fraction: float) -> None:
    """Measured by bisection: a perturbed equilibrium comes back below a rate, and leaves above it."""
    tokens = tokens_in_clusters()
    temperature = fraction * float(critical_temperature(tokens, detach_assignments=True))
    equilibrium, _ = descend(tokens, tokens[:3], temperature, 0.9, 1500, True)
    predicted = rate_of(tokens, equilibrium, temperature)
    perturbation = 1e-6 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def comes_back(rate: float) -> bool:
        end, _ = descend(tokens, equilibrium + perturbation, temperature, rate, 150, True)
        return bool((end - equilibrium).norm() < perturbation.norm())

    low, high = 0.5 * predicted, 2 * predicted
    assert comes_back(low)
    assert not comes_back(high)
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if comes_back(middle) else (low, middle)
    assert 0.98 < low / predicted < 1.05  # the bound is a lower one, and nearly tight where assignments are hard


def test_the_limit_of_one_prototype_is_exactly_one() -> None:
    tokens = tokens_in_clusters()
    mass = assignment_statistics(tokens, tokens[:1], 1.0).mass
    assert largest_stable_rate(mass) == 1
    mean = tokens.mean(0, keepdim=True)
    for rate, factor in ((0.99, 0.98**50), (1.01, 1.02**50)):
        end, _ = descend(tokens, mean + 1e-3, 1.0, rate, 50, True)
        assert float((end - mean).norm() / (1e-3 * 3**0.5)) == pytest.approx(factor)


def test_largest_stable_rate_is_one_per_bank() -> None:
    mass = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(largest_stable_rate(mass), torch.tensor([4 / 3, 2.0]))


@pytest.mark.parametrize("mass", [torch.zeros(2, 3), torch.tensor([0.5, -0.1]), torch.tensor([0.5, torch.nan])])
def test_largest_stable_rate_refuses_what_is_no_mass(mass: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mass must be >= 0.*assignment_statistics"):
        largest_stable_rate(mass)


def test_free_energy_is_minus_t_times_the_mean_log_partition_function() -> None:
    tokens = torch.stack([tokens_in_clusters(0), tokens_in_clusters(1)])
    prototypes, temperature = tokens[:, :5], torch.tensor([0.5, 4.0], dtype=torch.float64)
    distances = torch.cdist(tokens, prototypes).square()
    expected = -temperature * (-distances / temperature[:, None, None]).logsumexp(-1).mean(-1)
    loss = prototype_attention(tokens, prototypes, temperature).terms.loss
    entropy = assignment_statistics(tokens, prototypes, temperature).entropy
    torch.testing.assert_close(free_energy(loss, temperature, entropy), expected)
    torch.testing.assert_close(lyapunov(loss, temperature, entropy, detach_assignments=True), expected)
    torch.testing.assert_close(lyapunov(loss, temperature, entropy, detach_assignments=False), loss)


@pytest.mark.parametrize(("detach", "falls", "rises"), [(True, "free energy", "loss"), (False, "loss", "free energy")])
@pytest.mark.parametrize("seed", range(3))
def test_each_form_lowers_its_own_function_and_raises_the_other(
    detach: bool, falls: str, rises: str, seed: int
) -> None:
    tokens = tokens_in_clusters(seed)
    temperature = 0.7 * float(critical_temperature(tokens, detach_assignments=detach))
    rate = 0.5 * rate_of(tokens, tokens[:6], temperature)
    _, course = descend(tokens, tokens[:6], temperature, rate, 100, detach)
    measured = [values(tokens, p, temperature) for p in course]
    steps = list(pairwise(measured))
    assert all(after[falls] <= before[falls] + 1e-12 for before, after in steps)
    assert sum(after[rises] > before[rises] + 1e-12 for before, after in steps) >= 5


@pytest.mark.parametrize("seed", range(5))
def test_a_step_at_the_largest_stable_rate_never_raises_the_free_energy_of_its_batch(seed: int) -> None:
    """Wherever it starts, not at an equilibrium only."""
    tokens = tokens_in_clusters(seed)
    generator = torch.Generator().manual_seed(seed)
    for fraction in (0.01, 0.1, 1.0, 10.0):
        temperature = fraction * float(critical_temperature(tokens, detach_assignments=True))
        prototypes = 3 * torch.randn(5, 3, generator=generator, dtype=torch.float64)
        rate = rate_of(tokens, prototypes, temperature)
        before = values(tokens, prototypes, temperature)["free energy"]
        end, _ = descend(tokens, prototypes, temperature, rate, 1, True)
        assert values(tokens, end, temperature)["free energy"] <= before + 1e-12


def test_descent_violation_is_a_rise_beyond_the_tolerance_or_a_nan() -> None:
    before = torch.tensor([1.0, 1.0, -5.0, 0.0])
    after = torch.tensor([1.005, 1.02, -6.0, torch.nan])
    scale = torch.ones(4)
    assert descent_violation(before, after, scale, 0.01).tolist() == [False, True, False, True]
    assert descent_violation(before, after, 10 * scale, 0.01).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match=r"tolerance must be finite and >= 0.*got -1.0"):
        descent_violation(before, after, scale, -1.0)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("place", ["collapsed", "random", "descended"])
def test_signs_of_the_linearised_flow_do_not_depend_on_the_ratio_of_the_rates(place: str, detach: bool) -> None:
    """Encoder and prototypes descend one potential: J = D(rho) H has as many unstable directions as H (Sylvester)."""
    x = tokens_in_clusters()[:40]
    x = (x - x.mean(0)) / x.std(0)
    generator = torch.Generator().manual_seed(3)
    encoder = 0.5 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
    temperature = 0.5 * float(critical_temperature(x @ encoder, detach_assignments=detach))
    prototypes = (x @ encoder)[:3] if place != "collapsed" else (x @ encoder).mean(0).repeat(3, 1)

    def potential(point: Tensor) -> Tensor:
        z, p = x @ point[:6].view(3, 2), point[6:].view(3, 2)
        output = prototype_attention_reference(z, p, temperature)
        loss, entropy = output.terms.loss, torch.special.entr(output.weights).sum(-1).mean()
        own = (z.T @ z / len(z) - torch.eye(2)).square().sum()  # a loss of the encoder's own, that bounds its scale
        return own + lyapunov(loss, temperature, entropy, detach_assignments=detach)

    point = torch.cat([encoder.flatten(), prototypes.flatten()])
    point = point.requires_grad_()
    optimizer = torch.optim.SGD([point], lr=0.02)
    for _ in range(3000 if place == "descended" else 0):
        optimizer.zero_grad()
        potential(point).backward()
        optimizer.step()
    hessian = torch.autograd.functional.hessian(potential, point.detach())
    counts, fastest = set(), set()
    for rho in (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3):
        rates = torch.cat([torch.full((6,), rho, dtype=torch.float64), torch.ones(6, dtype=torch.float64)])
        values = torch.linalg.eigvals(rates.unsqueeze(1) * hessian)
        assert float(values.imag.abs().max()) < 1e-6 * float(values.abs().max())  # no oscillation either
        tolerance = 1e-8 * float(hessian.abs().max()) * min(rho, 1.0)
        counts.add((int((values.real > tolerance).sum()), int((values.real < -tolerance).sum())))
        fastest.add(round(float(values.real.max()), 6))
    assert len(counts) == 1
    ((_, unstable),) = counts
    assert place == "descended" or unstable > 0
    assert len(fastest) > 3  # what does depend on rho: the speed, and so the largest stable rate
