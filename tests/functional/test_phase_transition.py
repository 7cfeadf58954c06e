"""Critical temperatures: the number, and what it says about the dynamics of a collapsed bank."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import (
    critical_temperature,
    prototype_attention,
    prototype_critical_temperatures,
    soft_assign,
    split_margins,
)


def cloud(n: int = 300, seed: int = 0) -> Tensor:
    """Tokens (n, 3) with three different variances and a mean that is not zero."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor(
        [5.0, 0, 1]
    )


def covariance(tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    weights = torch.full_like(tokens[:, 0], 1 / len(tokens)) if weights is None else weights
    centred = tokens - weights @ tokens
    return (centred * weights.unsqueeze(1)).T @ centred


@pytest.mark.parametrize(("detach", "factor"), [(False, 4.0), (True, 2.0)])
def test_is_a_multiple_of_the_largest_variance(detach: bool, factor: float) -> None:
    tokens = cloud()
    expected = factor * torch.linalg.eigvalsh(covariance(tokens))[-1]
    actual = critical_temperature(tokens, detach_assignments=detach)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(critical_temperature(tokens.float(), detach_assignments=detach), expected)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("fraction", [0.95, 1.05])
def test_collapse_repels_below_it_and_attracts_above_it(fraction: float, detach: bool) -> None:
    tokens, size, steps = cloud(), 4, 150
    critical = float(critical_temperature(tokens, detach_assignments=detach))
    g = torch.Generator().manual_seed(1)
    perturbation = torch.randn(size, 3, generator=g, dtype=torch.float64)
    perturbation = 1e-5 * (perturbation - perturbation.mean(0))
    prototypes = (tokens.mean(0) + perturbation).requires_grad_()
    top = torch.linalg.eigh(covariance(tokens)).eigenvectors[:, -1]
    lr = 0.25 * size  # the prototypes' share of the mean loss is 1 / K each
    for _ in range(steps):
        loss = prototype_attention(tokens, prototypes, fraction * critical, detach_assignments=detach).terms.loss
        (gradient,) = torch.autograd.grad(loss, prototypes)
        with torch.no_grad():
            prototypes -= lr * gradient
    spread = (prototypes - prototypes.mean(0)).detach()
    grown = float(spread.norm() / perturbation.norm())
    assert grown > 5 if fraction < 1 else grown < 0.05
    # and at the rate that the second variation (I - factor C / T) predicts for the leading direction:
    predicted = (1 - 0.5 * (1 - 1 / fraction)) ** steps
    assert float((spread @ top).norm() / (perturbation @ top).norm()) == pytest.approx(predicted, rel=1e-2)


def test_padding_does_not_count() -> None:
    tokens = torch.stack([cloud(seed=0), cloud(seed=1)])
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, 100:] = mask[1, :50] = False
    expected = torch.stack([critical_temperature(tokens[0, :100]), critical_temperature(tokens[1, 50:])])
    junk = tokens.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(critical_temperature(junk, mask), expected)
    prototypes = torch.randn(2, 3, 3, dtype=torch.float64)
    expected = torch.stack(
        [
            prototype_critical_temperatures(tokens[0, :100], prototypes[0], 2.0),
            prototype_critical_temperatures(tokens[1, 50:], prototypes[1], 2.0),
        ]
    )
    torch.testing.assert_close(prototype_critical_temperatures(junk, prototypes, 2.0, mask), expected)


@pytest.mark.parametrize("limit", ["EXACT_DIMENSION", "EXACT_ELEMENTS"])
def test_power_iteration_agrees_with_eigenvalues(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.stack([cloud(seed=0), 1e-3 * cloud(seed=1)])
    prototypes = torch.randn(2, 4, 3, dtype=torch.float64)
    exact = critical_temperature(tokens), prototype_critical_temperatures(tokens, prototypes, 3.0)
    state = torch.get_rng_state()
    monkeypatch.setattr(f"ddcl_lightning.functional.phase_transition.{limit}", 1)
    monkeypatch.setattr("torch.linalg.eigvalsh", None)  # it must not be called on this path
    iterated = critical_temperature(tokens), prototype_critical_temperatures(tokens, prototypes, 3.0)
    torch.testing.assert_close(iterated, exact, rtol=1e-6, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert critical_temperature(torch.ones(5, 3)) == 0
    torch.testing.assert_close(critical_temperature(tokens + 1e7), exact[0], rtol=1e-4, atol=0)


def test_power_iteration_of_many_dimensions() -> None:
    tokens = torch.randn(50, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = tokens - tokens.mean(0)
    exact = 4 * torch.linalg.eigvalsh(centred @ centred.T / 50)[-1]  # the Gram matrix has the same eigenvalues
    torch.testing.assert_close(critical_temperature(tokens), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("detach", "factor"), [(False, 4.0), (True, 2.0)])
def test_per_prototype_from_its_own_tokens(detach: bool, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.cat([cloud(200), 0.1 * cloud(100)])
    prototypes = torch.stack([tokens[:200].mean(0), tokens[200:].mean(0), tokens[7]])
    q = soft_assign(tokens, prototypes, 1.5)
    expected = torch.stack(
        [factor * torch.linalg.eigvalsh(covariance(tokens, q[:, k] / q[:, k].sum()))[-1] for k in range(3)]
    )
    actual = prototype_critical_temperatures(tokens, prototypes, 1.5, detach_assignments=detach)
    torch.testing.assert_close(actual, expected)
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", 64)
    actual = prototype_critical_temperatures(tokens, prototypes, 1.5, detach_assignments=detach)
    torch.testing.assert_close(actual, expected)


def test_collapsed_prototypes_have_the_critical_temperature_of_all_tokens() -> None:
    tokens = cloud()
    prototypes = tokens.mean(0).expand(4, 3)
    actual = prototype_critical_temperatures(tokens, prototypes, 1.0)
    torch.testing.assert_close(actual, critical_temperature(tokens).expand(4))


def test_per_prototype_where_assignments_underflow() -> None:
    tokens = cloud()
    prototypes = torch.cat([tokens[:3], tokens.mean(0, keepdim=True) + 1000])
    assert not soft_assign(tokens, prototypes, 0.5)[:, 3].any()
    actual = prototype_critical_temperatures(tokens, prototypes, 0.5)
    assert bool(torch.isfinite(actual).all())
    # Seen from far away, tokens weigh exp(2 z.p / T) over what the nearer prototypes take: the farthest out wins.
    assert actual[3] < critical_temperature(tokens)
    # With one prototype all tokens count equally, however far away it is.
    alone = prototype_critical_temperatures(tokens, prototypes[3:], 0.5)
    torch.testing.assert_close(alone, critical_temperature(tokens).unsqueeze(0))


@pytest.mark.parametrize(
    "function",
    [critical_temperature, lambda z, mask=None: prototype_critical_temperatures(z, torch.ones(2, 3), 1.0, mask)],
)
def test_refuses_tokens_without_a_covariance(function) -> None:
    tokens = cloud(10)
    with pytest.raises(ValueError, match="mask leaves no valid token"):
        function(tokens, torch.zeros(10, dtype=torch.bool))
    tokens[3, 1] = torch.nan
    with pytest.raises(ValueError, match="tokens must be finite"):
        function(tokens)


def doubled(tokens: Tensor, prototypes: Tensor, row: int, temperature: float, detach: bool) -> Tensor:
    """Hessian of what descends, with respect to the distance between two halves of a prototype of half its mass."""
    log_weights = torch.zeros(len(prototypes) + 1, dtype=torch.float64)
    log_weights[row] = log_weights[-1] = torch.tensor(0.5).log()

    def objective(offset: Tensor) -> Tensor:
        p = torch.cat([prototypes, prototypes[row : row + 1]])
        p = p.index_add(0, torch.tensor([row, len(prototypes)]), torch.stack([offset, -offset]))
        distances = (tokens.unsqueeze(1) - p).square().sum(-1)
        logits = log_weights - distances / temperature
        free_energy = -temperature * logits.logsumexp(-1).mean()
        return free_energy if detach else (logits.softmax(-1) * distances).sum(-1).mean()

    hessian: Tensor = torch.autograd.functional.hessian(objective, torch.zeros(3, dtype=torch.float64))
    return hessian


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_split_margins_are_below_one_exactly_where_two_halves_move_apart(seed: int, detach: bool) -> None:
    tokens, sides = cloud(60, seed), set()
    prototypes = cloud(4, seed + 10)
    for temperature in (0.3, 1.0, 3.0, 10.0, 30.0):
        margins = split_margins(tokens, prototypes, temperature, detach_assignments=detach)
        for row in range(4):
            lowest = torch.linalg.eigvalsh(doubled(tokens, prototypes, row, temperature, detach))[0]
            assert bool(margins[row] < 1) == bool(lowest < 0)
            sides.add(bool(lowest < 0))
    assert sides == {True, False}


def test_split_margins_with_detached_assignments_are_relative_to_the_covariance_about_the_prototype() -> None:
    tokens = cloud()
    prototypes = cloud(3, seed=1)
    q = soft_assign(tokens, prototypes, 1.5)
    expected = []
    for row in range(3):
        offset, weight = tokens - prototypes[row], q[:, row] / q[:, row].sum()
        expected.append(1.5 / (2 * torch.linalg.eigvalsh((offset * weight.unsqueeze(1)).T @ offset)[-1]))
    actual = split_margins(tokens, prototypes, 1.5, detach_assignments=True)
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("detach", [True, False])
def test_split_margin_of_a_collapsed_bank_is_t_over_its_critical_temperature(detach: bool) -> None:
    tokens = cloud()
    critical = critical_temperature(tokens, detach_assignments=detach)
    margins = split_margins(tokens, tokens.mean(0).expand(4, 3), 0.8 * critical, detach_assignments=detach)
    torch.testing.assert_close(margins, torch.full((4,), 0.8, dtype=torch.float64))


@pytest.mark.parametrize("detach", [True, False])
def test_split_margins_leave_padding_out_and_take_a_temperature_per_head(
    detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, prototypes = torch.stack([cloud(seed=0), cloud(seed=1)]), torch.stack([cloud(3, 2), cloud(3, 3)])
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, 100:] = mask[1, :50] = False
    junk, temperature = tokens.masked_fill(~mask.unsqueeze(-1), torch.nan), torch.tensor([1.0, 5.0])
    expected = torch.stack(
        [
            split_margins(tokens[0, :100], prototypes[0], 1.0, detach_assignments=detach),
            split_margins(tokens[1, 50:], prototypes[1], 5.0, detach_assignments=detach),
        ]
    )
    torch.testing.assert_close(split_margins(junk, prototypes, temperature, mask, detach_assignments=detach), expected)
    monkeypatch.setattr("ddcl_lightning.functional.phase_transition.EXACT_DIMENSION", 1)
    iterated = split_margins(junk, prototypes, temperature, mask, detach_assignments=detach)
    torch.testing.assert_close(iterated, expected, rtol=1e-6, atol=0)
    assert split_margins(torch.ones(5, 3), torch.ones(2, 3), 1.0, detach_assignments=detach).isinf().all()


def test_split_margins_name_the_next_prototype_to_split_in_an_annealing() -> None:
    """Six clusters, twelve prototypes: as T falls, of the groups that coincide that of the smallest margin parts."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    tokens = centers[torch.arange(120) % 6] + 0.4 * torch.randn(120, 3, generator=generator, dtype=torch.float64)
    critical = float(critical_temperature(tokens, detach_assignments=True))
    fraction, named, chance = 1.05, [], []
    prototypes, before = tokens.mean(0).repeat(12, 1), torch.zeros(12, dtype=torch.int64)
    while fraction > 0.03:
        margins = split_margins(tokens, prototypes, fraction * critical, detach_assignments=True)
        fraction *= 0.97
        prototypes = prototypes + 1e-4 * torch.randn(12, 3, generator=generator, dtype=torch.float64)
        for _ in range(200):
            q = soft_assign(tokens, prototypes, fraction * critical)
            prototypes = (q / q.sum(0)).T @ tokens
        now = (torch.cdist(prototypes, prototypes) < 1e-2).double().argmax(1)  # the first that it coincides with
        several = [group for group in before.unique().tolist() if int((before == group).sum()) > 1]
        parted = [group for group in several if len(now[before == group].unique()) > 1]
        if len(several) > 1 and len(parted) == 1:
            smallest = min(several, key=lambda group: float(margins[before == group].mean()))
            named.append(smallest == parted[0])
            chance.append(1 / len(several))
        before = now
    assert len(named) >= 4
    assert sum(named) >= len(named) - 1
    assert sum(chance) / len(chance) < 0.5
