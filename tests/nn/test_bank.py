"""The bank: shapes, state, copies, and errors that name what is to blame."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from ddcl_lightning import PrototypeBank
from ddcl_lightning.functional import prototype_attention


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4), ()])
def test_shapes(heads: int, lead: tuple[int, ...]) -> None:
    bank = PrototypeBank(6, 4, num_heads=heads)
    tokens = torch.randn(*lead, heads * 4)
    output = bank(tokens)
    assert output.centroids.shape == tokens.shape
    assert output.weights is None
    assert all(term.shape == (heads,) for term in output.terms)
    weights = bank(tokens, need_weights=True).weights
    assert weights.shape == (*lead[:-1], heads, *lead[-1:], 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    codes = bank.encode(tokens)
    assert codes.shape == (*lead, heads)
    assert torch.equal(codes, weights.movedim(len(lead) - 1, -2).argmax(-1) if lead else weights.argmax(-1))


@pytest.mark.parametrize("need_weights", [False, True])
def test_every_head_reads_its_own_slice_with_its_own_temperature(need_weights: bool) -> None:
    bank = PrototypeBank(6, 4, num_heads=2)
    bank.set_temperature(torch.tensor([0.5, 2.0]))
    tokens, mask = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.8
    output = bank(tokens, mask, need_weights)
    for head, temperature in enumerate([0.5, 2.0]):
        part = tokens[..., 4 * head : 4 * head + 4]
        alone = prototype_attention(part.reshape(15, 4), bank.prototypes[head], temperature, mask.flatten())
        torch.testing.assert_close(output.centroids[..., 4 * head : 4 * head + 4], alone.centroids.view(3, 5, 4))
        torch.testing.assert_close(torch.stack(output.terms)[:, head], torch.stack(alone.terms))


def test_detach_assignments_reaches_the_call() -> None:
    tokens = torch.randn(9, 4)
    gradients = []
    for detach in (False, True):
        torch.manual_seed(0)
        bank = PrototypeBank(6, 4, detach_assignments=detach)
        bank(tokens).terms.loss.sum().backward()
        gradients.append(bank.prototypes.grad)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("need_weights", [False, True])
def test_temperature_may_change_between_forward_and_backward(need_weights: bool) -> None:
    bank, tokens = PrototypeBank(6, 4), torch.randn(9, 4)
    (expected,) = torch.autograd.grad(bank(tokens, None, need_weights).terms.loss.sum(), bank.prototypes)
    loss = bank(tokens, None, need_weights).terms.loss.sum()
    bank.set_temperature(9.0)
    (actual,) = torch.autograd.grad(loss, bank.prototypes)
    assert torch.equal(actual, expected)


def test_state_round_trip() -> None:
    bank = PrototypeBank(6, 4, num_heads=2)
    bank.set_prototypes(torch.randn(2, 6, 4))
    bank.set_temperature(torch.tensor([0.5, 2.0]))
    twin = PrototypeBank(6, 4, num_heads=2)
    assert not twin.initialized
    twin.load_state_dict(bank.state_dict())
    assert bool(twin.initialized)
    assert torch.equal(twin.temperature, torch.tensor([0.5, 2.0]))
    tokens = torch.randn(3, 8)
    for other in (twin, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(other(tokens).centroids, bank(tokens).centroids)
        other.set_temperature(9.0)
        assert bank.temperature.tolist() == [0.5, 2.0]


def test_bfloat16_module() -> None:
    bank = PrototypeBank(6, 4, num_heads=2).bfloat16()
    output = bank(torch.randn(3, 5, 8, dtype=torch.bfloat16))
    assert output.centroids.dtype == torch.bfloat16
    assert output.terms.loss.dtype == torch.float32
    output.terms.loss.sum().backward()
    assert bank.prototypes.grad.dtype == torch.bfloat16


def test_set_prototypes_marks_the_bank() -> None:
    bank = PrototypeBank(6, 4)
    values = torch.randn(1, 6, 4)
    bank.set_prototypes(values)
    assert torch.equal(bank.prototypes, values)
    assert bool(bank.initialized)
    with pytest.raises(ValueError, match=r"must have shape \(1, 6, 4\); got \(6, 4\)"):
        bank.set_prototypes(values[0])
    with pytest.raises(ValueError, match="prototypes must be finite"):
        bank.set_prototypes(values / 0)
    assert torch.equal(bank.prototypes, values)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])])
def test_refuses_a_temperature(bad: float | Tensor) -> None:
    bank = PrototypeBank(6, 4, num_heads=2)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        bank.set_temperature(bad)
    assert bank.temperature.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"one per head, \(2,\); got \(3,\)"):
        bank.set_temperature(torch.ones(3))


@pytest.mark.parametrize("argument", ["num_prototypes", "dim", "num_heads"])
def test_refuses_a_size_below_one(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1; got 0"):
        PrototypeBank(**{"num_prototypes": 2, "dim": 2, "num_heads": 2, argument: 0})
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        PrototypeBank(2, 2, temperature=0.0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_blames_the_right_input(need_weights: bool) -> None:
    bank = PrototypeBank(6, 4)
    tokens, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False

    def message(tokens: Tensor, mask: Tensor | None = mask) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            bank(tokens, mask, need_weights)
        return str(caught.value)

    bad = tokens.clone()
    bad[1, 4] = torch.nan
    bank(bad, mask, need_weights)  # behind the mask it is nobody's business
    bad[0, 0, 0] = torch.inf
    assert "tokens must be finite" in message(bad)
    assert "no valid token in the batch" in message(tokens, torch.zeros_like(mask))
    assert "at least one token; got an empty batch" in message(tokens[:0], None)
    assert "num_heads * dim = 4; got shape (2, 5, 3)" in message(tokens[..., :3], None)
    assert "(2, 5); got (2, 4)" in message(tokens, mask[:, :4])
    overflow = message(1e30 * tokens)
    assert "overflow torch.float32" in overflow
    assert "temperature [1.0]" in overflow
    with torch.no_grad():
        bank.prototypes[0, 2, 1] = torch.nan
    assert "prototypes became NaN" in message(tokens)


@pytest.mark.parametrize("need_weights", [False, True])
def test_refuses_a_mask_of_numbers(need_weights: bool) -> None:
    with pytest.raises(TypeError, match=r"mask must be boolean.*got torch.float32. Use mask.bool\(\)"):
        PrototypeBank(6, 4)(torch.randn(2, 5, 4), torch.ones(2, 5), need_weights)


def test_repr_names_the_sizes() -> None:
    assert "num_prototypes=6, dim=4, num_heads=2" in repr(PrototypeBank(6, 4, num_heads=2))


def test_a_bank_changes_its_size_in_place() -> None:
    bank = PrototypeBank(3, 4, temperature=2.0)
    parameter, tokens = bank.prototypes, torch.randn(9, 4)
    bank(tokens).terms.loss.sum().backward()
    for size in (5, 1, 3):
        new = torch.randn(1, size, 4)
        bank.resize(new)
        assert bank.prototypes is parameter
        assert parameter.grad is None
        assert bank.num_prototypes == size
        assert torch.equal(parameter, new)
        output = bank(tokens, need_weights=True)
        assert output.weights.shape == (1, 9, size)
        output.terms.loss.sum().backward()
        assert parameter.grad is not None
        assert parameter.grad.shape == (1, size, 4)
    assert "num_prototypes=3" in repr(bank)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (1, 5, 3), (1, 0, 4)])
def test_resize_keeps_heads_and_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"prototypes must have shape \(1, K, 4\) with K >= 1; got"):
        PrototypeBank(3, 4).resize(torch.zeros(shape))


def test_resize_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        PrototypeBank(3, 4).resize(torch.full((1, 2, 4), torch.nan))


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("assign", [False, True])
def test_a_bank_loads_at_the_size_that_was_saved(size: int, assign: bool) -> None:
    saved = PrototypeBank(3, 4, num_heads=2)
    saved.train()(torch.randn(9, 8))
    saved.resize(torch.randn(2, size, 4))
    layer = torch.nn.Sequential(PrototypeBank(3, 4, num_heads=2))
    layer.load_state_dict({f"0.{name}": value for name, value in saved.state_dict().items()}, assign=assign)
    bank = layer[0]
    assert isinstance(bank, PrototypeBank)
    assert bank.num_prototypes == size
    assert isinstance(bank.prototypes, torch.nn.Parameter)
    tokens = torch.randn(5, 8)
    assert torch.equal(bank.eval()(tokens).centroids, saved.eval()(tokens).centroids)


@pytest.mark.parametrize("other", [PrototypeBank(3, 5), PrototypeBank(3, 4, num_heads=2)])
def test_another_dimension_or_number_of_heads_is_still_an_error(other: PrototypeBank) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        PrototypeBank(3, 4).load_state_dict(other.state_dict())
