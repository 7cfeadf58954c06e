"""Separation, entropy, usage, variance and repulsion against their definitions."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import (
    assignment_statistics,
    effective_dimension,
    nearest_prototype,
    prototype_attention,
    repulsion_energy,
    separation,
    soft_assign,
    total_variance,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_separation_of_every_pair(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", chunk)
    prototypes = normal(2, 30, 4)
    prototypes[0, 25] = prototypes[0, 6] + 1e-9
    prototypes[1, 29] = prototypes[1, 28] + 1e-3
    apart = separation(prototypes.float() if chunk == 100 else prototypes)
    for head in range(2):
        pairs = {(j, k): float((prototypes[head, j] - prototypes[head, k]).norm()) for k in range(30) for j in range(k)}
        nearest = min(pairs, key=pairs.__getitem__)
        assert tuple(apart.closest[head].tolist()) == nearest
        assert float(apart.mean[head]) == pytest.approx(sum(pairs.values()) / len(pairs), rel=1e-6)
        assert float(apart.minimum[head]) == pytest.approx(pairs[nearest], rel=1e-3, abs=1e-7)


def test_separation_by_hand() -> None:
    apart = separation(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]))
    assert apart.minimum == 3
    assert apart.mean == 4
    assert apart.closest.tolist() == [0, 2]


def test_separation_of_one_prototype() -> None:
    apart = separation(torch.ones(2, 1, 3))
    assert apart.minimum.tolist() == [math.inf, math.inf]
    assert bool(apart.mean.isnan().all())
    assert apart.closest.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("chunk", [1 << 22, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_against_the_whole_matrix(chunk: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", chunk)
    tokens, prototypes = normal(2, 40, 3), normal(2, 5, 3, seed=1)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    q = soft_assign(tokens, prototypes, 0.8)
    codes = nearest_prototype(tokens, prototypes)
    junk = tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), torch.nan)
    use = assignment_statistics(junk, prototypes, 0.8, mask)
    for head in range(2):
        rows = q[head] if mask is None else q[head][mask[head]]
        hard = codes[head] if mask is None else codes[head][mask[head]]
        torch.testing.assert_close(use.entropy[head], -(rows * rows.log()).sum(1).mean())
        torch.testing.assert_close(use.mass[head], rows.mean(0))
        assert torch.equal(use.counts[head], hard.bincount(minlength=5))


def test_entropy_stays_between_zero_and_ln_k() -> None:
    tokens, prototypes = normal(200, 4).float(), normal(9, 4, seed=1).float()
    entropies = [float(assignment_statistics(tokens, prototypes, 10.0**e).entropy) for e in range(-9, 10)]
    assert entropies == pytest.approx(sorted(entropies), rel=1e-6)  # it rises with the temperature
    assert entropies[0] == 0.0  # hard: every other assignment underflows, and 0 ln 0 is 0
    assert entropies[-1] == pytest.approx(math.log(9), rel=1e-6)
    assert all(0 <= entropy <= math.log(9) * (1 + 1e-6) for entropy in entropies)
    assert float(assignment_statistics(tokens, prototypes[:1], 1.0).entropy) == 0.0


def test_mass_of_one_and_no_token() -> None:
    tokens, prototypes = normal(6, 4).bfloat16(), normal(3, 4).bfloat16()
    use = assignment_statistics(tokens, prototypes, 1.0)
    assert use.mass.dtype == torch.float32
    assert float(use.mass.sum()) == pytest.approx(1)
    assert int(use.counts.sum()) == 6
    nothing = assignment_statistics(tokens, prototypes, 1.0, torch.zeros(6, dtype=torch.bool))
    assert bool(nothing.entropy.isnan())
    assert not nothing.counts.any()


def test_total_variance_is_the_trace_of_the_covariance() -> None:
    tokens = normal(2, 50, 3) + 100
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = torch.stack([tokens[i][mask[i]].var(0, correction=0).sum() for i in range(2)])
    junk = tokens.masked_fill(~mask.unsqueeze(-1), torch.inf)
    torch.testing.assert_close(total_variance(junk, mask), expected)
    torch.testing.assert_close(total_variance(tokens), tokens.var(1, correction=0).sum(-1))


def test_repulsion_energy_is_the_mean_over_pairs() -> None:
    prototypes = normal(2, 5, 3).requires_grad_()
    scale = torch.tensor([2.0, 0.5], dtype=torch.float64)
    energy = repulsion_energy(prototypes, scale)
    pairs = [(j, k) for k in range(5) for j in range(k)]
    squared = torch.stack([(prototypes[:, j] - prototypes[:, k]).square().sum(-1) for j, k in pairs])
    expected = (1 + scale.square() / squared).log().mean(0)
    torch.testing.assert_close(energy, expected)
    weights = torch.tensor([1.0, -2.0])
    actual_gradient, expected_gradient = (
        torch.autograd.grad((value * weights).sum(), prototypes)[0] for value in (energy, expected)
    )
    torch.testing.assert_close(actual_gradient, expected_gradient)
    assert torch.autograd.gradcheck(repulsion_energy, (prototypes,))


def test_repulsion_energy_pushes_apart_within_the_scale_and_ends_at_zero() -> None:
    line = torch.tensor([[0.0], [1.0]], requires_grad=True)
    energy = repulsion_energy(line)
    energy.backward()
    assert energy.item() == pytest.approx(math.log(2))
    assert line.grad is not None
    assert line.grad.flatten().tolist() == [1.0, -1.0]  # descent moves the first down and the second up
    assert repulsion_energy(line.detach().half()).dtype == torch.float32
    near, far = (float(repulsion_energy(distance * line.detach().double())) for distance in (1e-6, 1e6))
    assert near == pytest.approx(12 * math.log(10))  # as minus ln of the squared distance
    assert 0 < far < 1e-11
    assert repulsion_energy(line, 0.0).item() == 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_repulsion_energy_is_never_below_zero(scale: float) -> None:
    prototypes = normal(50, 6, 3) * torch.logspace(-8, 8, 50, dtype=torch.float64).reshape(-1, 1, 1)
    assert bool((repulsion_energy(prototypes, scale) >= 0).all())


def test_a_prototype_without_mass_does_not_run_away_for_energy() -> None:
    """As it did under minus ln of the squared distance, whose energy has no lower bound."""
    tokens = normal(60, 2)
    scale = float(total_variance(tokens).sqrt())

    def barrier(prototypes: Tensor) -> Tensor:
        return -2 * torch.pdist(prototypes).log().mean()

    def course(repulsion: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """How far the prototype ends, in scales, and how much energy that has brought from half of the steps on."""
        p = torch.cat([tokens[:3], torch.tensor([[40.0, 0.0]], dtype=torch.float64)]).requires_grad_()
        assert float(assignment_statistics(tokens, p.detach(), 0.5).mass[3]) == 0
        optimizer, energies = torch.optim.SGD([p], lr=0.5), []
        for _ in range(1000):
            optimizer.zero_grad()
            loss = prototype_attention(tokens, p, 0.5).terms.loss + repulsion(p)
            loss.backward()
            optimizer.step()
            energies.append(float(loss.detach()))
        return float(p.detach()[3].norm()) / scale, energies[500] - energies[-1]

    (far, gained), (near, nothing) = course(barrier), course(lambda p: repulsion_energy(p, scale))
    started = 40 / scale
    assert far > 1.1 * started
    assert gained > 0.05
    assert near < 1.01 * started
    assert 0 <= nothing < 1e-3


def test_repulsion_energy_of_coinciding_prototypes_is_large_and_finite() -> None:
    prototypes = torch.zeros(3, 2, requires_grad=True)
    energy = repulsion_energy(prototypes)
    energy.backward()
    assert 100 < energy.item() < math.inf
    assert prototypes.grad is not None
    assert not prototypes.grad.any()


def test_repulsion_energy_refuses_one_prototype_large_banks_and_negative_scales() -> None:
    with pytest.raises(ValueError, match=r"at least 2 prototypes.*got K = 1"):
        repulsion_energy(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got K = 20000"):
        repulsion_energy(torch.zeros(20000, 1))
    with pytest.raises(ValueError, match=r"scale must be >= 0.*got -1.0"):
        repulsion_energy(torch.zeros(2, 2), -1.0)


def test_effective_dimension_counts_the_directions_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(100, 5, generator=generator, dtype=torch.float64)).Q
    basis = torch.linalg.qr(basis - basis.mean(0)).Q  # orthonormal and centred
    assert float(effective_dimension(3 * basis + 7)) == pytest.approx(5)
    assert float(effective_dimension(basis[:, :1] * torch.ones(1, 5) - 2)) == pytest.approx(1)
    variances = torch.tensor([4.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert float(effective_dimension(basis * variances.sqrt())) == pytest.approx(36 / 18)
    wide = torch.randn(2, 6, 40, generator=generator)
    covariance = torch.stack([torch.cov(head.double().T, correction=0) for head in wide])
    direct = covariance.diagonal(dim1=1, dim2=2).sum(1).square() / covariance.square().sum((1, 2))
    torch.testing.assert_close(effective_dimension(wide), direct)
    mask = torch.tensor([True, True, True, True, False, False]).expand(2, 6)
    hidden = wide.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(effective_dimension(hidden, mask), effective_dimension(wide[:, :4]))
    assert effective_dimension(torch.ones(4, 3)).isnan()
