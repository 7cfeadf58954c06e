"""Banks are found wherever they are, and looking at them changes nothing."""

import copy
import pickle

import pytest
import torch
from tiny import absolute
from torch import nn

from ddcl_lightning import DDCLAttention, PrototypeBank, find_banks, find_codebooks
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
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
    bank, records = PrototypeBank(3, 4, num_heads=2, temperature=absolute()), []
    recording = record_codebooks({"it": bank}, lambda name, observed: records.append(observed))
    return bank, recording, records


def test_observes_only_while_armed() -> None:
    bank, recording, records = observe()
    tokens = torch.randn(5, 8)
    bank(tokens)
    recording.armed = True
    bank(tokens)
    recording.armed = False
    bank(tokens)
    assert len(records) == 1
    with recording:
        bank(tokens)
    bank(tokens)
    assert len(records) == 2
    assert not bank._observers


def test_observation_is_what_the_call_saw() -> None:
    bank, recording, records = observe()
    tokens, mask = torch.randn(3, 5, 8, requires_grad=True), torch.rand(3, 5) < 0.7
    with recording:
        output = bank(tokens, mask=mask)
    (observed,) = records
    before = bank.prototypes.detach().clone()
    with torch.no_grad():
        bank.prototypes += 1  # the step that follows
    bank.set_temperature(absolute(9.0))
    assert torch.equal(observed.codebook, before)
    assert observed.temperature.tolist() == [1.0, 1.0]
    assert torch.equal(observed.tokens[1], tokens.detach()[..., 4:].reshape(15, 4))
    assert torch.equal(observed.terms.loss, output.terms.loss.detach())
    assert torch.equal(observed.valid_tokens()[0], tokens.detach()[mask][:, :4])
    assert observed.codes is None
    torch.testing.assert_close(observed.rows(), tokens.detach()[mask].view(-1, 2, 4))
    assert not any(t.requires_grad for t in (observed.tokens, observed.codebook, *observed.terms))


def test_every_way_to_call_a_bank_is_recorded() -> None:
    bank, recording, records = observe()
    tokens, mask = torch.randn(5, 8), torch.tensor([True, True, False, True, True])
    with recording:
        bank(tokens, mask)
        bank.forward(tokens=tokens, mask=mask, need_weights=True)
        output = bank.quantize(tokens, mask)
        bank.quantize(tokens, mask=mask, straight_through=False)
        bank.encode(tokens)  # no loss, nothing to record
    assert len(records) == 4
    for record in records:
        assert torch.equal(record.tokens.transpose(0, 1).flatten(1), tokens)
        assert record.mask is not None
        assert torch.equal(record.mask, mask.expand(2, -1))
        torch.testing.assert_close(record.terms.loss, output.terms.loss.detach())
    assert [record.codes is None for record in records] == [True, True, False, False]
    for record in records[2:]:
        assert record.codes is not None
        assert torch.equal(record.codes.T, output.codes)


def test_nothing_is_recorded_of_copies_nor_after_the_end() -> None:
    model, tokens, names = Nested(), torch.randn(5, 4), []
    with record_codebooks(model, lambda name, record: names.append(name)) as recording:
        for layer in (*model.levels, model.bank):
            layer(tokens)
        assert names == list(find_banks(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.bank(tokens)
            other.bank.quantize(tokens)
        assert len(names) == 3
        recording.close()
        model.bank(tokens)
        model.bank.quantize(tokens)
    model.bank(tokens)
    assert len(names) == 3
    assert not any(bank._observers for bank in find_banks(model).values())


def test_an_error_ends_it_too_and_one_that_is_gone_records_nothing() -> None:
    bank, recording, records = observe()
    with pytest.raises(RuntimeError, match="mine"), recording:
        raise RuntimeError("mine")
    bank(torch.randn(5, 8))
    gone = record_codebooks({"it": bank}, lambda name, record: records.append(record), armed=True)
    bank(torch.randn(5, 8))
    assert len(records) == 1
    del gone
    bank(torch.randn(5, 8))
    assert len(records) == 1


class Nearest(nn.Module):
    """A codebook of nobody that we know."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(torch.cdist(tokens, self.embedding.weight).argmin(-1))


class NearestVectorQuantizer(Nearest):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cdist(tokens, self.embedding.weight).argmin(-1)


def test_two_recorders_of_one_class_end_in_any_order() -> None:
    forward, first, second = NearestVectorQuantizer.forward, NearestVectorQuantizer(), NearestVectorQuantizer()
    names: list[str] = []
    outer = record_codebooks(find_codebooks(first), lambda name, record: names.append("first"), armed=True)
    inner = record_codebooks(find_codebooks(second), lambda name, record: names.append("second"), armed=True)
    both = record_codebooks(find_codebooks(first), lambda name, record: names.append("also first"), armed=True)
    for model in (first, second):
        model(torch.randn(5, 3))
    assert names == ["first", "also first", "second"]
    outer.close()
    for model in (first, second):
        model(torch.randn(5, 3))
    assert names[3:] == ["also first", "second"]
    both.armed = False
    inner.close()
    assert NearestVectorQuantizer.forward is forward


def test_the_method_that_a_class_inherits_is_given_back() -> None:
    class InheritingVectorQuantizer(NearestVectorQuantizer):
        pass

    model, calls = InheritingVectorQuantizer(), []
    with record_codebooks(model, lambda name, record: calls.append(record)):
        assert "forward" in vars(InheritingVectorQuantizer)
        model(torch.randn(5, 3))
        NearestVectorQuantizer()(torch.randn(5, 3))
    assert len(calls) == 1
    assert "forward" not in vars(InheritingVectorQuantizer)


def test_an_error_inside_of_a_call_leaves_the_next_ones_recorded() -> None:
    model, calls = nn.ModuleDict({"vq": Nearest()}), []
    with record_codebooks(find_codebooks(model, ["vq.embedding"]), lambda name, record: calls.append(record)):
        with pytest.raises(RuntimeError):
            model["vq"](torch.randn(5, 7))
        model["vq"](torch.randn(5, 3))
    assert [record.tokens is not None for record in calls] == [True]


def test_recorders_leave_gradients_and_compiled_modules_alone() -> None:
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(3, 3), Nearest()), []
    tokens = torch.randn(5, 3)
    expected = model(tokens).sum()
    expected.backward()
    gradient = model[1].embedding.weight.grad.clone()
    model.zero_grad()
    with record_codebooks(find_codebooks(model, ["1.embedding"]), lambda name, record: calls.append(record)):
        model(tokens).sum().backward()
        assert torch.equal(model[1].embedding.weight.grad, gradient)
        assert not any(tensor.requires_grad for tensor in (calls[0].tokens, calls[0].codebook))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens).sum(), expected)
    assert len(calls) == 1


def test_records_refuse_what_does_not_fit() -> None:
    codes, book = torch.zeros(6, dtype=torch.int64), torch.randn(4, 3)
    record = CodebookRecord.of_codes(None, book, codes)
    assert (record.num_codes, record.num_heads) == (4, 1)
    with pytest.raises(ValueError, match=r"tokens were not recorded; got None"):
        record.valid_tokens()
    with pytest.raises(ValueError, match=r"geometry must be 'euclidean' or 'cosine'; got 'angular'"):
        CodebookRecord.of_codes(None, book, codes, geometry="angular")
    with pytest.raises(ValueError, match=r"mask must have an entry for each of the 6 tokens; got shape \(5,\)"):
        CodebookRecord.of_codes(None, book, codes, torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be boolean .* got torch.float32"):
        CodebookRecord.of_codes(None, book, codes, torch.ones(6))
    with pytest.raises(ValueError, match="every_n_calls must be at least 1; got 0"):
        record_codebooks({}, print, every_n_calls=0)


def test_calls_that_are_not_due_read_no_value() -> None:
    """A value of a tensor on the meta device cannot be read, as one on another device only by waiting for it."""
    model, records = NearestVectorQuantizer().to("meta"), []
    recording = record_codebooks(model, lambda name, record: records.append(int(record.codes.sum())), every_n_calls=3)
    model(torch.randn(5, 3, device="meta"))
    recording.armed = True
    with pytest.raises(RuntimeError, match="meta"):
        model(torch.randn(5, 3, device="meta"))  # the first call is due
    for _ in range(3):
        model(torch.randn(5, 3, device="meta"))
    assert not records
    recording.close()
