"""The bank: shapes, state, copies, and errors that name what is to blame."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tiny import absolute
from torch import Tensor

from ddcl_lightning import PrototypeBank, Temperature
from ddcl_lightning.functional import BankOutput, cells_of, critical_temperature, prototype_attention
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from ddcl_lightning.nn.initialization import InitMethod
from ddcl_lightning.nn.observer import BankObserver
from ddcl_lightning.nn.temperature import TemperatureUnit


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4), ()])
def test_a_bank_returns_the_shape_of_its_tokens(heads: int, lead: tuple[int, ...]) -> None:
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
    bank = PrototypeBank(6, 4, num_heads=2, temperature=absolute([0.5, 2.0]))
    tokens, mask = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.8
    output = bank(tokens, mask, need_weights)
    for head, temperature in enumerate([0.5, 2.0]):
        own = tokens[..., 4 * head : 4 * head + 4]
        alone = prototype_attention(own.reshape(15, 4), bank.prototypes[head], temperature, mask.flatten())
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
    bank, tokens = PrototypeBank(6, 4, temperature=absolute()), torch.randn(9, 4)
    (expected,) = torch.autograd.grad(bank(tokens, None, need_weights).terms.loss.sum(), bank.prototypes)
    loss = bank(tokens, None, need_weights).terms.loss.sum()
    bank.set_temperature(absolute(9.0))
    (actual,) = torch.autograd.grad(loss, bank.prototypes)
    assert torch.equal(actual, expected)


def test_a_bank_loads_the_state_of_another() -> None:
    bank = PrototypeBank(6, 4, num_heads=2, temperature=absolute([0.5, 2.0]))
    bank.set_prototypes(torch.randn(2, 6, 4))
    twin = PrototypeBank(6, 4, num_heads=2, temperature=absolute())
    assert not twin.initialized
    twin.load_state_dict(bank.state_dict())
    assert bool(twin.initialized)
    assert torch.equal(twin.temperature, torch.tensor([0.5, 2.0]))
    tokens = torch.randn(3, 8)
    for other in (twin, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(other(tokens).centroids, bank(tokens).centroids)
        other.set_temperature(absolute(9.0))
        assert bank.temperature.tolist() == [0.5, 2.0]


def test_a_bfloat16_bank_computes_its_loss_in_float32() -> None:
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


@pytest.mark.parametrize("argument", ["num_prototypes", "dim", "num_heads"])
def test_refuses_a_size_below_one(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1; got 0"):
        PrototypeBank(**{"num_prototypes": 2, "dim": 2, "num_heads": 2, argument: 0})


@pytest.mark.parametrize("need_weights", [False, True])
def test_blames_the_right_input(need_weights: bool) -> None:
    bank = PrototypeBank(6, 4, temperature=absolute())
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
    bank = PrototypeBank(3, 4, temperature=absolute(2.0))
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


# Starting from tokens ------------------------------------------------------------------------


def blobs(heads: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens ``(5, 24, H * 3)`` around four centres per head, far apart, and the centres ``(H, 4, 3)``."""
    generator = torch.Generator().manual_seed(0)
    centers = 20 * torch.randn(heads, 4, 3, generator=generator)
    tokens = centers.repeat(1, 30, 1) + 0.1 * torch.randn(heads, 120, 3, generator=generator)
    return tokens.transpose(0, 1).reshape(5, 24, heads * 3), centers


@pytest.mark.parametrize("method", ["kmeans", "farthest_point"])
@pytest.mark.parametrize("unit", ["critical", "initial"])
def test_it_starts_where_the_tokens_are_at_their_temperature(method: InitMethod, unit: TemperatureUnit) -> None:
    bank = PrototypeBank(4, 3, num_heads=2, temperature=Temperature([0.2, 0.1], unit=unit))
    tokens, centers = blobs()
    bank(100 * tokens)  # what was measured before is forgotten
    bank.initialize(tokens, method=method)
    assert bool(bank.initialized)
    distances = torch.cdist(centers, bank.prototypes.detach())
    assert float(distances.amin(-1).max()) < 1.0
    assert distances.argmin(-1).sort(-1).values.tolist() == [[0, 1, 2, 3]] * 2
    expected = torch.tensor([0.2, 0.1]) * critical_temperature(bank.split_heads(tokens)[0])
    torch.testing.assert_close(bank.temperature.double(), expected.double(), rtol=1e-4, atol=0.0)
    again = PrototypeBank(4, 3, num_heads=2)
    again.initialize(tokens, method=method)
    assert torch.equal(again.prototypes, bank.prototypes)  # the seed is 0
    again.initialize(tokens.flatten(0, 1), method=method)  # any leading shape
    assert torch.equal(again.prototypes, bank.prototypes)


def test_a_start_draws_nothing_from_the_global_state_and_leaves_the_parameter() -> None:
    bank, (tokens, _) = PrototypeBank(4, 3, num_heads=2), blobs()
    parameter, before = bank.prototypes, torch.get_rng_state()
    bank.initialize(tokens.requires_grad_(), num_restarts=1, seed=3)
    assert bank.prototypes is parameter
    assert parameter.requires_grad
    assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_that_cannot_be_is_refused_and_changes_nothing() -> None:
    bank, (tokens, _) = PrototypeBank(4, 3, num_heads=2), blobs()
    before = copy.deepcopy(bank.state_dict())
    for wrong, method, message in (
        (tokens[..., :5], "kmeans", r"num_heads \* dim = 6; got shape \(5, 24, 5\)"),
        (tokens[:1, :3], "kmeans", "4 prototypes for 3 distinct among 3 collected tokens"),
        (tokens / 0, "kmeans", "tokens must be finite to start prototypes from them"),
        (tokens, "random", "method must be 'kmeans' or 'farthest_point'; got 'random'"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            bank.initialize(wrong, method=method)  # type: ignore[arg-type]
    with pytest.raises((ValueError, RuntimeError), match="num_restarts must be at least 1; got 0"):
        bank.initialize(tokens, num_restarts=0, name="head.bank")
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name]), name


# Codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_quantize_is_the_call_with_codes_and_entropy(training: bool, straight: bool) -> None:
    bank = PrototypeBank(6, 4, num_heads=2, temperature=absolute([0.5, 2.0])).train(training)
    tokens, mask = torch.randn(3, 5, 8, requires_grad=True), torch.rand(3, 5) < 0.7
    plain, output = bank(tokens, mask, need_weights=True), bank.quantize(tokens, mask, straight_through=straight)
    torch.testing.assert_close(output.centroids, plain.centroids)
    torch.testing.assert_close(output.terms, plain.terms)
    assert output.codes.shape == (3, 5, 2)
    assert torch.equal(output.codes[mask], bank.encode(tokens)[mask])
    mean = plain.weights.transpose(1, 2)[mask].mean(0)  # (H, K)
    torch.testing.assert_close(output.entropy, -(mean * mean.log()).sum(-1))
    output.terms.loss.sum().backward()
    assert tokens.grad is not None
    assert (bank.prototypes.grad is not None) is training  # in evaluation the codebook is held constant
    codes = bank.encode(tokens)
    decoded = torch.stack([bank.prototypes[head][codes[..., head]] for head in range(2)], -2).flatten(-2)
    assert torch.equal(bank.decode(codes), decoded)


@pytest.mark.parametrize("straight", [True, False])
def test_padding_has_the_code_minus_one_which_is_decoded_to_zero(straight: bool) -> None:
    bank = PrototypeBank(6, 4, num_heads=2)
    tokens, mask = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.7
    with record_codebooks(bank, lambda name, record: records.append(record)):
        records: list[CodebookRecord] = []
        codes = bank.quantize(tokens, mask, straight_through=straight).codes
    assert torch.equal(codes[mask], bank.encode(tokens)[mask])
    assert bool((codes[~mask] == -1).all())
    assert not bank.decode(codes)[~mask].any()
    assert torch.equal(records[0].codes == -1, ~records[0].mask)


def test_cells_hold_no_padding_whether_a_mask_tells_or_the_codes() -> None:
    bank, tokens, mask = PrototypeBank(6, 8), torch.randn(3, 5, 8), torch.rand(3, 5) < 0.7
    codes = bank.encode(tokens, mask).view(1, 15)
    expected = cells_of(tokens[mask].unsqueeze(0), bank.prototypes, codes[codes >= 0].unsqueeze(0))
    for given in (None, mask.view(1, 15)):
        values = cells_of(tokens.view(1, 15, 8), bank.prototypes, codes, given)
        torch.testing.assert_close(values[:3], expected[:3])  # but the place, which counts padding


def test_gradients_of_codes_do_not_depend_on_how_the_centroids_are_found() -> None:
    gradients = []
    tokens, mask = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.7
    bank = PrototypeBank(6, 4, num_heads=2, temperature=absolute([0.5, 2.0]))
    for straight in (True, False):
        z = tokens.clone().requires_grad_()
        output = bank.quantize(z, mask, straight_through=straight)
        loss = output.terms.loss.sum() - 0.3 * output.entropy.sum()
        gradients.append(torch.autograd.grad(loss, (z, bank.prototypes)))
    torch.testing.assert_close(*gradients)


# Observers -----------------------------------------------------------------------------------


class Noting(BankObserver):
    """Notes what it is shown, and doubles the centroids."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, PrototypeBank, Tensor, Tensor | None]] = []

    def before(self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None) -> None:
        self.calls.append(("before", bank, tokens, mask))

    def after(self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        self.calls.append(("after", bank, tokens, mask))
        return output._replace(centroids=2 * output.centroids)


@pytest.mark.parametrize("call", ["__call__", "forward", "quantize"])
def test_observers_see_every_call_and_may_change_what_it_returns(call: str) -> None:
    bank, tokens, mask = PrototypeBank(3, 4, temperature=absolute()), torch.randn(5, 4), torch.ones(5, dtype=torch.bool)
    expected, observer = getattr(bank, call)(tokens, mask).centroids, Noting()
    bank.add_observer(observer)
    assert torch.equal(getattr(bank, call)(tokens, mask=mask).centroids, 2 * expected)
    assert [when for when, *_ in observer.calls] == ["before", "after"]
    assert all(of is bank and given is tokens and valid is mask for _, of, given, valid in observer.calls)
    for twin in (copy.deepcopy(bank), copy.copy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(getattr(twin, call)(tokens, mask).centroids, expected)
    bank.remove_observer(observer)
    bank.remove_observer(Noting())  # was never added
    assert torch.equal(getattr(bank, call)(tokens, mask).centroids, expected)
    assert len(observer.calls) == 2


def test_an_observer_that_is_gone_sees_nothing() -> None:
    bank, tokens = PrototypeBank(3, 4), torch.randn(5, 4)
    before, observer = bank(tokens).centroids, Noting()
    bank.add_observer(observer)
    del observer
    assert torch.equal(bank(tokens).centroids, before)
    bank.add_observer(BankObserver())
    assert torch.equal(bank(tokens).centroids, before)


# Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["critical", "initial", "absolute"])
def test_a_whole_state_goes_around_and_a_damaged_one_is_refused(unit: TemperatureUnit, tmp_path: Path) -> None:
    bank = PrototypeBank(4, 3, num_heads=2, temperature=Temperature([0.2, 0.1], unit=unit))
    tokens, _ = blobs()
    bank.initialize(tokens)
    bank(3 * tokens)
    bank.settle()
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    state = torch.load(tmp_path / "bank.pt", weights_only=True)
    twin = PrototypeBank(4, 3, num_heads=2, temperature=Temperature(0.7, unit=unit))
    twin.load_state_dict(state)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, bank.state_dict()[name]), name
    assert torch.equal(twin.eval()(tokens).centroids, bank.eval()(tokens).centroids)
    for name in ("temperature_state.value", "temperature_state.current"):
        for bad in (0.0, -1.0, torch.nan, torch.inf):
            damaged = {**state, name: torch.tensor([1.0, bad])}
            with pytest.raises(RuntimeError, match=f"{name} must be finite and > 0; got .* damaged: load another"):
                twin.load_state_dict(damaged)
    for name in state:
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*{name}"):
            twin.load_state_dict({key: value for key, value in state.items() if key != name})
    assert torch.equal(twin.temperature, bank.temperature)


def test_banks_refuse_what_is_no_tensor_of_tokens_or_codes() -> None:
    bank = PrototypeBank(5, 3)
    for call in (bank, bank.encode):
        with pytest.raises(TypeError, match="tokens must be a tensor; got list"):
            call([[1.0, 2.0, 3.0]])
    for code in (5, -7):
        with pytest.raises(ValueError, match=rf"codes must be in \[0, K = 5\), .* got values from {code} to {code}"):
            bank.decode(torch.tensor([[code]]))
    with pytest.raises(TypeError, match=r"codes must be integers; got torch\.float32"):
        bank.decode(torch.zeros(2, 1))
