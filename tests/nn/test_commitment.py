"""The pull of tokens to their codes in the backward pass."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddcl_lightning import SoftVectorQuantizer
from ddcl_lightning.nn.commitment import MOST, RISE, Commitment
from tests.processes import results_of_processes

DIM = 4


def pulled(commitment: Commitment, z: Tensor, codes: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the commitment adds to the gradient g."""
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(commitment(codes, z, None, mask), z, g)
    return gradient - g


def example(size: float = 1.0, gap: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, codes and a gradient."""
    z = size * torch.randn(40, DIM)
    return z, z + size * gap * torch.randn(40, DIM), torch.randn(40, DIM)


def step() -> None:
    """An optimizer's, of anything."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()


def spread(z: Tensor) -> Tensor:
    return (z - z.mean(0)).norm()


def test_the_pull_grows_with_the_distance_and_follows_the_gradient() -> None:
    for size in (1e-4, 1.0, 1e4):
        z, codes, g = example(size)
        for factor in (1.0, 1e-6):
            expected = 0.5 * factor * g.norm() / spread(z) * (z - codes)
            torch.testing.assert_close(pulled(Commitment(0.5), z, codes, factor * g), expected, rtol=1e-4, atol=0)


def test_the_value_is_that_of_the_codes() -> None:
    z, codes, _ = example()
    assert torch.equal(Commitment(0.5)(codes, z.requires_grad_(), None, None), codes)


def test_padding_has_no_pull_and_does_not_count() -> None:
    z, codes, g = example()
    mask = torch.rand(40) < 0.7
    alone = pulled(Commitment(0.5), z[mask], codes[mask], g[mask])
    z[~mask] = 1e6
    g = g.masked_fill(~mask.unsqueeze(-1), 0.0)
    padded = pulled(Commitment(0.5), z, codes, g, mask)
    torch.testing.assert_close(padded[mask], alone)
    assert not padded[~mask].any()


def test_the_pull_of_a_call_stays_below_its_gradient() -> None:
    z, codes, g = example(gap=5.0)
    torch.testing.assert_close(pulled(Commitment(1.4), z, codes, g).norm(), MOST * g.norm())
    assert not pulled(Commitment(1.4), z, z, g).any()  # codes that are the tokens
    assert not pulled(Commitment(1.4), z, codes, 0 * g).any()


def test_the_weight_falls_at_once_and_rises_slowly() -> None:
    commitment = Commitment(1.0)
    z, codes, g = example()
    pulled(commitment, z, codes, g)
    assert not commitment.weight  # until an optimizer steps
    step()
    first = commitment.weight.clone()
    torch.testing.assert_close(first, g.norm() / spread(z))
    pulled(commitment, z, codes, 0.1 * g)
    step()
    torch.testing.assert_close(commitment.weight, 0.1 * first)
    pulled(commitment, z, codes, g)
    step()
    torch.testing.assert_close(commitment.weight, 0.1 * first + RISE * 0.9 * first)
    # A large gradient finds the weight of before, so that a distance grows until the pull is as large.
    torch.testing.assert_close(pulled(commitment, z, codes, g), commitment.weight * (z - codes), rtol=1e-4, atol=1e-7)


def test_accumulated_batches_count_as_one() -> None:
    batches, commitment = [example(), example(2.0)], Commitment(1.0)
    for batch in batches:
        pulled(commitment, *batch)
    step()
    total = sum(float(spread(z)) ** 2 for z, _, _ in batches)
    squares = sum(float(g.norm()) ** 2 for _, _, g in batches)
    assert float(commitment.weight) == pytest.approx((squares / total) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_add_nothing(bad: float) -> None:
    commitment = Commitment(1.0)
    z, codes, g = example()
    pulled(commitment, z, codes, g)
    step()
    before = commitment.weight.clone()
    broken = g.clone()
    broken[3] = bad
    pulled(commitment, z, codes, broken)
    step()
    assert torch.equal(commitment.weight, before)


def test_a_copy_and_a_state_go_on_alike() -> None:
    commitment = Commitment(1.0)
    z, codes, g = example()
    pulled(commitment, z, codes, g)
    step()
    loaded = Commitment(1.0)
    loaded.load_state_dict(commitment.state_dict())
    for other in (copy.deepcopy(commitment), loaded):
        assert torch.equal(pulled(other, z, codes, 2 * g), pulled(commitment, z, codes, 2 * g))
    with pytest.raises(RuntimeError, match=r"weight must be finite and >= 0; got nan"):
        loaded.load_state_dict({"weight": torch.tensor(float("nan"))})


def test_evaluation_passes_the_gradient_as_it_is() -> None:
    z, codes, g = example()
    assert not pulled(Commitment(1.0).eval(), z, codes, g).any()


@pytest.mark.parametrize("ratio", [-0.1, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"commitment_ratio must be .*finite.*; got {ratio}"):
        SoftVectorQuantizer(DIM, 4, commitment_ratio=ratio)


def of_a_share(rank: int, number: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    commitment = Commitment(1.0)
    z, codes, g = (value.chunk(number)[rank] for value in example())
    # The mean over processes of gradients of losses of their own is that of the joint loss.
    added = pulled(commitment, z, codes, number * g) / number
    commitment.settle()
    return added, commitment.weight


def of_a_half(rank: int) -> tuple[Tensor, Tensor]:
    return of_a_share(rank, 2)


def test_two_processes_pull_as_one_does(tmp_path: Path) -> None:
    whole = of_a_share(0, 1)
    shares = results_of_processes(tmp_path, of_a_half)
    torch.testing.assert_close(torch.cat([added for added, _ in shares]), whole[0])
    for _, weight in shares:
        torch.testing.assert_close(weight, whole[1])
