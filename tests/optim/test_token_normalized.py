"""The token-normalized step is the formula it claims to be."""

import copy
import pickle

import pytest
import torch
from tiny import absolute
from torch import Tensor, nn

from ddcl_lightning import DDCLAttention, PrototypeBank, SoftVectorQuantizer, TokenNormalized
from ddcl_lightning.functional import soft_assign


def bank_and_optimizer(lr: float = 0.3, heads: int = 2) -> tuple[PrototypeBank, TokenNormalized]:
    torch.manual_seed(0)
    bank = PrototypeBank(5, 3, num_heads=heads, temperature=absolute(0.8)).double()
    return bank, TokenNormalized([bank.prototypes], lr=lr).watch(bank)


def target(tokens: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Means of tokens (N, d) under responsibilities that sum to one over tokens, (K, d)."""
    q = soft_assign(tokens, prototypes, temperature)
    return (q / q.sum(0)).T @ tokens


def test_step_is_the_formula() -> None:
    bank, optimizer = bank_and_optimizer()
    tokens, mask = torch.randn(4, 6, 6, dtype=torch.float64), torch.rand(4, 6) < 0.7
    before = bank.prototypes.detach().clone()
    bank(tokens.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    assert optimizer.step() is None
    for head in range(2):
        goal = target(tokens[mask][:, 3 * head : 3 * head + 3], before[head], 0.8)
        torch.testing.assert_close(bank.prototypes[head].detach(), before[head] + 0.3 * (goal - before[head]))


def test_is_the_gradient_step_with_the_mass_divided_out() -> None:
    bank, optimizer = bank_and_optimizer(heads=1)
    bank.detach_assignments = True
    tokens = torch.randn(20, 3, dtype=torch.float64)
    bank(tokens).terms.loss.sum().backward()
    mass = soft_assign(tokens, bank.prototypes[0].detach(), 0.8).mean(0)
    expected = bank.prototypes.detach() - 0.3 * bank.prototypes.grad / (2 * mass.unsqueeze(-1))
    optimizer.step()
    torch.testing.assert_close(bank.prototypes.detach(), expected)


def test_prototype_whose_mass_underflows_moves_like_the_others() -> None:
    bank, optimizer = bank_and_optimizer(lr=0.5, heads=1)
    tokens = torch.randn(20, 3, dtype=torch.float64)
    with torch.no_grad():
        bank.prototypes[0, 4] = 100.0
    bank.set_temperature(absolute(0.05))
    assert not soft_assign(tokens, bank.prototypes[0].detach(), 0.05)[:, 4].any()
    bank(tokens)
    optimizer.step()
    # It goes half of the way to the token that it is nearest to, compared with the prototypes that took it.
    assert bool(((bank.prototypes[0, 4] > 45) & (bank.prototypes[0, 4] < 55)).all())


def test_streams_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 22, 30):
        monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", chunk)
        bank, optimizer = bank_and_optimizer()
        bank(torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        optimizer.step()
        results.append(bank.prototypes.detach())
    torch.testing.assert_close(*results)


def test_two_accumulated_batches_equal_the_joint_one() -> None:
    tokens = torch.randn(30, 6, dtype=torch.float64)
    results = []
    for sizes in ([30], [11, 19]):
        bank, optimizer = bank_and_optimizer()
        for chunk in tokens.split(sizes):
            bank(chunk)
        optimizer.step()
        results.append(bank.prototypes.detach())
        with pytest.raises(RuntimeError, match="needs a forward pass in training mode before each step"):
            optimizer.step()  # the statistics are used up
    torch.testing.assert_close(*results)


def crowded(relocation_threshold: float, accumulate: int = 1) -> tuple[PrototypeBank, TokenNormalized, Tensor]:
    """Three wide cells and two narrow ones: two heads, the second far from the tokens of the first."""
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [20.0, 20.0], [20.1, 20.0]], dtype=torch.float64)
    width = torch.tensor([2.0, 1.0, 1.0, 0.01, 0.01], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 5, 2, dtype=torch.float64, generator=generator)
    tokens = (centers + width.unsqueeze(-1) * noise).flatten(0, 1)
    both = torch.cat([tokens, tokens + 50], -1)
    bank = PrototypeBank(5, 2, num_heads=2, temperature=absolute(0.01)).double()
    bank.set_prototypes(torch.stack([centers, centers + 50]))
    optimizer = TokenNormalized([bank.prototypes], lr=1e-9, relocation_threshold=relocation_threshold).watch(bank)
    for chunk in both.chunk(accumulate):
        bank(chunk)
    return bank, optimizer, both


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_prototype_of_an_empty_cell_moves_into_the_most_crowded_one(accumulate: int) -> None:
    bank, optimizer, tokens = crowded(0.5, accumulate)
    before = bank.prototypes.detach().clone()
    optimizer.step()
    for head in range(2):
        moved = (bank.prototypes[head] - before[head]).abs().sum(-1) > 1e-3
        assert moved.tolist() in ([False, False, False, True, False], [False, False, False, False, True])
        # To the last token of the widest cell.
        own = tokens[:, 2 * head : 2 * head + 2]
        cell = torch.cdist(own, before[head]).argmin(1) == 0
        torch.testing.assert_close(bank.prototypes[head][moved][0].detach(), own[cell][-1])
    running = optimizer.state[bank.prototypes]["cells"]
    torch.testing.assert_close(running[1, int(moved.nonzero())], running[1, 0])
    widest = 0.5 * float((tokens[::5, :2] - before[0, 0]).square().sum())
    assert running[0, 0].tolist() == pytest.approx([widest, 20.0], rel=1e-6)


@pytest.mark.parametrize(("load_exponent", "moves"), [(0.0, False), (0.5, True), (1.0, True)])
def test_load_exponent_weighs_numbers_of_tokens_against_distortion(load_exponent: float, moves: bool) -> None:
    """The last prototype has the fewest tokens, the one before it the least distortion."""
    centers = torch.tensor([[0.0, 0.0], [50.0, 0.0], [40.0, 0.0]], dtype=torch.float64)
    numbers, widths = torch.tensor([300, 30, 3]), torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(333, 2, dtype=torch.float64, generator=generator).clamp(-1.2, 1.2)
    tokens = centers.repeat_interleave(numbers, 0) + widths.repeat_interleave(numbers).unsqueeze(-1) * noise
    bank = PrototypeBank(3, 2, temperature=absolute(0.01)).double()
    bank.set_prototypes(centers.unsqueeze(0))
    optimizer = TokenNormalized(
        [bank.prototypes], lr=1e-9, relocation_threshold=0.5, load_exponent=load_exponent
    ).watch(bank)
    bank(tokens)
    optimizer.step()
    assert bool((bank.prototypes.detach()[0, 2] - centers[2]).norm() > 1) is moves


def test_relocation_stops_where_the_error_is_spread_evenly_and_never_starts_at_zero() -> None:
    bank, optimizer, tokens = crowded(0.0)
    before = bank.prototypes.detach().clone()
    optimizer.step()
    torch.testing.assert_close(bank.prototypes.detach(), before)
    assert not optimizer.state[bank.prototypes]
    bank, optimizer, tokens = crowded(0.5)
    optimizer.param_groups[0]["lr"] = 0.5
    errors = []
    for _ in range(60):
        errors.append(float(bank(tokens).terms.loss.detach().sum()))
        optimizer.step()
    assert errors[-1] < 0.8 * errors[0]
    settled = bank.prototypes.detach().clone()
    for _ in range(5):
        bank(tokens)
        optimizer.step()
    torch.testing.assert_close(bank.prototypes.detach(), settled, atol=0.2, rtol=0)


def test_evaluation_does_not_count() -> None:
    bank, optimizer = bank_and_optimizer()
    bank.eval()
    bank(torch.randn(9, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="training mode"):
        optimizer.step()


def test_batch_without_tokens_does_not_disturb_the_others() -> None:
    bank, optimizer = bank_and_optimizer()
    tokens = torch.randn(9, 6, dtype=torch.float64)
    bank(tokens)
    twin, reference = bank_and_optimizer()
    twin(tokens)
    # A CPU refuses such a batch in the forward pass; a GPU does not wait to look.
    bank._require_finite = lambda *args: None  # type: ignore[method-assign]
    bank(tokens, torch.zeros(9, dtype=torch.bool))
    optimizer.step()
    reference.step()
    assert torch.equal(bank.prototypes, twin.prototypes)


def test_closure_runs_with_gradients() -> None:
    bank, optimizer = bank_and_optimizer()

    def closure() -> Tensor:
        loss = bank(torch.randn(9, 6, dtype=torch.float64)).terms.loss.sum()
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure) > 0
    assert bank.prototypes.grad is not None


def test_token_normalized_moves_bfloat16_prototypes() -> None:
    bank = PrototypeBank(5, 3, temperature=absolute()).bfloat16()
    optimizer = TokenNormalized([bank.prototypes], lr=1.0).watch(bank)
    tokens, before = torch.randn(20, 3).bfloat16(), bank.prototypes.detach().float()[0]
    with torch.autocast("cpu", torch.bfloat16):
        bank(tokens)
    optimizer.step()
    assert bank.prototypes.dtype == torch.bfloat16
    torch.testing.assert_close(
        bank.prototypes[0].detach().float(), target(tokens.float(), before, 1.0), rtol=1e-2, atol=1e-2
    )


def test_token_normalized_loads_the_state_of_another() -> None:
    bank, optimizer = bank_and_optimizer(lr=0.3)
    optimizer.param_groups[0]["lr"] = 0.125
    state = copy.deepcopy(optimizer.state_dict())
    twin_bank, twin = bank_and_optimizer(lr=0.9)
    twin.load_state_dict(state)
    assert twin.param_groups[0]["lr"] == 0.125
    tokens = torch.randn(9, 6, dtype=torch.float64)
    for b, o in ((bank, optimizer), (twin_bank, twin)):
        b(tokens)
        o.step()
    assert torch.equal(bank.prototypes, twin_bank.prototypes)


def test_watch_finds_banks_and_replaces_an_earlier_watch() -> None:
    model = nn.ModuleList([DDCLAttention(4, 3), DDCLAttention(4, 2)])
    optimizer = TokenNormalized([model[1].bank.prototypes], lr=0.5).watch(model)
    assert not model[0].bank._observers
    optimizer.watch(model)
    assert len(model[1].bank._observers) == 1
    with pytest.raises(ValueError, match="optimizes 2 parameters but only 1 of them are prototypes"):
        TokenNormalized([model[0].bank.prototypes, nn.Parameter(torch.zeros(2))]).watch(model)


def test_codes_that_move_inside_are_refused() -> None:
    quantizer = SoftVectorQuantizer(4, 3)
    with pytest.raises(ValueError, match=r"bank 'bank' of SoftVectorQuantizer moves them .*code_update='optimizer'"):
        TokenNormalized([quantizer.bank.prototypes]).watch(quantizer)
    quantizer = SoftVectorQuantizer(4, 3, code_update="optimizer")
    TokenNormalized([quantizer.bank.prototypes]).watch(quantizer)


def test_token_normalized_refuses_rates_out_of_range_and_unwatched_banks() -> None:
    prototypes = PrototypeBank(5, 3).prototypes
    for lr in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"lr .*must be (in \(0, 1\], a step size|a finite number)"):
            TokenNormalized([prototypes], lr=lr)
    with pytest.raises(RuntimeError, match=r"Call optimizer.watch\(module\)"):
        TokenNormalized([prototypes]).step()


def test_a_state_is_loaded_as_often_as_wanted_and_into_copies() -> None:
    _, optimizer = bank_and_optimizer(lr=0.2)
    state = optimizer.state_dict()
    for target in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for _ in range(2):
            target.load_state_dict(state)
        assert target.param_groups[0]["lr"] == 0.2
