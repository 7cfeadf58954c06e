"""Banks are found wherever they are, and looking at them changes nothing."""

import pytest
import torch
from torch import nn

from ddcl_lightning import DDCLAttention, PrototypeBank, find_banks
from ddcl_lightning.monitoring.recording import CodebookRecord, bank_inputs, record_codebooks
from ddcl_lightning.nn.discovery import require_banks


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([DDCLAttention(4, 3), DDCLAttention(4, 2, num_heads=2)])
        self.same = self.levels[0]
        self.bank = PrototypeBank(5, 4)


def test_finds_every_bank_once() -> None:
    model = Nested()
    banks = find_banks(model)
    assert list(banks) == ["levels.0.bank", "levels.1.bank", "bank"]
    assert banks["bank"] is model.bank
    assert find_banks(model.bank) == {"": model.bank}
    assert find_banks(nn.Linear(2, 2)) == {}


def test_error_without_banks_names_the_caller() -> None:
    assert list(require_banks(Nested(), "Watcher")) == list(find_banks(Nested()))
    with pytest.raises(ValueError, match="Watcher found no PrototypeBank in Linear"):
        require_banks(nn.Linear(2, 2), "Watcher")


def observe() -> tuple[PrototypeBank, record_codebooks, list[CodebookRecord]]:
    bank, seen = PrototypeBank(3, 4, num_heads=2), []
    probe = record_codebooks({"it": bank}, lambda name, observed: seen.append(observed))
    return bank, probe, seen


def test_observes_only_while_armed() -> None:
    bank, probe, seen = observe()
    tokens = torch.randn(5, 8)
    bank(tokens)
    probe.armed = True
    bank(tokens)
    probe.armed = False
    bank(tokens)
    assert len(seen) == 1
    with probe:
        bank(tokens)
    bank(tokens)
    assert len(seen) == 2
    assert not bank._forward_hooks


def test_observation_is_what_the_call_saw() -> None:
    bank, probe, seen = observe()
    tokens, mask = torch.randn(3, 5, 8, requires_grad=True), torch.rand(3, 5) < 0.7
    with probe:
        output = bank(tokens, mask=mask)
    (observed,) = seen
    before = bank.prototypes.detach().clone()
    with torch.no_grad():
        bank.prototypes += 1  # the step that follows
    bank.set_temperature(9.0)
    assert torch.equal(observed.codebook, before)
    assert observed.temperature.tolist() == [1.0, 1.0]
    assert torch.equal(observed.tokens[1], tokens.detach()[..., 4:].reshape(15, 4))
    assert torch.equal(observed.terms.loss, output.terms.loss.detach())
    assert torch.equal(observed.valid_tokens()[0], tokens.detach()[mask][:, :4])
    assert not any(t.requires_grad for t in (observed.tokens, observed.codebook, *observed.terms))


def test_every_way_to_pass_the_arguments() -> None:
    bank, tokens, mask = PrototypeBank(3, 4), torch.randn(5, 4), torch.ones(5, dtype=torch.bool)
    assert bank_inputs(bank, (tokens,), {}) == (tokens, None)
    assert bank_inputs(bank, (tokens, mask, True), {}) == (tokens, mask)
    assert bank_inputs(bank, (), {"mask": mask, "tokens": tokens}) == (tokens, mask)
