"""What holds for every quantizer: shapes, padding, codes, gradients, copies, and a place in an autoencoder."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from registry import DIM, classes, make
from tiny import LinearBackbone, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ddcl_lightning import (
    DDCLReadoutModule,
    Quantizer,
    QuantizerReadout,
    QuantizerTerms,
    Reconstruction,
    SequenceDecoder,
)
from ddcl_lightning.nn.settled_state import settle

QUANTIZERS = {kind.__name__: kind for kind in classes(Quantizer)}
each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
each_mode = pytest.mark.parametrize("training", [True, False])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    mask[:, 0] = True
    return torch.randn(4, 9, DIM, generator=generator), mask


def values(quantizer: Quantizer, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Everything in the output, of a quantizer that stays as it is."""
    torch.manual_seed(0)
    output = copy.deepcopy(quantizer)(tokens, mask)
    return [
        value
        for value in (output.quantized, output.indices, output.terms.loss, *output.terms.signals.values())
        if value is not None
    ]


@each_mode
@each_quantizer
def test_shapes_and_codes(name: str, training: bool) -> None:
    quantizer = make(QUANTIZERS[name]).train(training)
    tokens, mask = batch()
    for given in (None, mask):
        output = quantizer(tokens, given)
        assert output.quantized.shape == (4, 9, quantizer.output_dim)
        assert output.quantized.dtype == tokens.dtype
        books = (quantizer.num_codebooks,) if quantizer.num_codebooks > 1 else ()
        assert output.indices.shape == (4, 9, *books)
        assert output.indices.dtype == torch.int64
        assert int(output.indices.max()) < quantizer.num_codes
        assert output.terms.loss is None or output.terms.loss.shape == ()
        assert all(value.numel() in (1, quantizer.num_codebooks) for value in output.terms.signals.values())
        codes = output.indices.reshape(4, 9, quantizer.num_codebooks)
        valid = torch.ones_like(mask) if given is None else given
        assert torch.equal(codes == -1, ~valid.unsqueeze(-1).expand_as(codes))
        assert bool((codes >= -1).all())
        assert not output.quantized[~valid].any()


@each_mode
@each_quantizer
def test_padding_never_matters(name: str, training: bool) -> None:
    quantizer = make(QUANTIZERS[name]).train(training)
    tokens, mask = batch()
    expected = values(quantizer, tokens, mask)
    for garbage in (1e6, torch.nan, torch.inf):
        dirty = tokens.masked_fill(~mask.unsqueeze(-1), garbage)
        torch.testing.assert_close(values(quantizer, dirty, mask), expected)


BAD_MASKS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "float": (Tensor.float, TypeError, "mask must be boolean.*got torch.float32"),
    "integer": (Tensor.long, TypeError, "mask must be boolean.*got torch.int64"),
    "shape": (lambda mask: mask.T, ValueError, r"mask must have the shape of (tokens|z).*got \(9, 4\)"),
    "all padding": (torch.zeros_like, ValueError, "mask leaves no valid token"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
@each_mode
@each_quantizer
def test_masks_that_cannot_be_meant_are_refused(name: str, training: bool, kind: str) -> None:
    """As ``Quantizer.check_mask`` does for those that call it."""
    change, error, message = BAD_MASKS[kind]
    quantizer = make(QUANTIZERS[name]).train(training)
    tokens, mask = batch()
    with pytest.raises(error, match=message):
        quantizer(tokens, change(mask))


@each_quantizer
def test_encode_and_decode_agree_with_the_forward_pass(name: str) -> None:
    quantizer = make(QUANTIZERS[name]).eval()
    if not hasattr(quantizer, "encode"):
        pytest.skip("codes come from the forward pass alone")
    tokens, mask = batch()
    for given in (None, mask):
        output, indices = quantizer(tokens, given), quantizer.encode(tokens, given)
        assert torch.equal(indices, output.indices)
        assert not indices.requires_grad
        torch.testing.assert_close(quantizer.decode(indices), output.quantized)
    with pytest.raises(TypeError, match="mask must be boolean"):
        quantizer.encode(tokens, mask.float())
    with pytest.raises(ValueError, match=r"indices must be in \[0, num_codes"):
        quantizer.decode(indices + quantizer.num_codes)
    with pytest.raises(ValueError, match="indices must be integers of shape"):
        quantizer.decode(indices.float())


def test_our_quantizers_of_a_codebook_encode_and_decode() -> None:
    ours = {name for name, kind in QUANTIZERS.items() if kind.__module__.startswith("ddcl_lightning.nn.")}
    assert {"ResidualVectorQuantizer", "SoftVectorQuantizer", "VectorQuantizer"} <= ours
    assert {name for name in ours if not hasattr(QUANTIZERS[name], "encode")} == set()


@each_quantizer
def test_gradients_reach_the_tokens_and_every_parameter(name: str) -> None:
    quantizer = make(QUANTIZERS[name])
    tokens, mask = batch()
    output = quantizer(tokens.requires_grad_(), mask)
    output.quantized.square().sum().backward(retain_graph=True)
    assert bool(tokens.grad[mask].any()), "what is decoded passes no gradient to the encoder"
    assert not tokens.grad[~mask].any()
    loss = output.terms.loss
    if loss is not None:
        assert loss.requires_grad or not loss.any(), "the loss passes no gradient to anything"
        if loss.requires_grad:
            loss.backward()
    assert not tokens.grad[~mask].any()
    assert [name for name, parameter in quantizer.named_parameters() if parameter.grad is None] == []
    known = {id(parameter) for parameter in quantizer.parameters()}
    listed = [*quantizer.prototype_parameters(), *quantizer.embedding_parameters()]
    assert {id(parameter) for parameter in listed} <= known


@each_quantizer
def test_copies_and_states_agree(name: str) -> None:
    quantizer, (tokens, mask) = make(QUANTIZERS[name]), batch()
    quantizer(tokens, mask)
    expected = values(quantizer.eval(), tokens, mask)
    again = make(QUANTIZERS[name]).eval()
    again.load_state_dict(quantizer.state_dict())
    for twin in (quantizer, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), again):
        torch.testing.assert_close(values(twin, tokens, mask), expected, rtol=0, atol=0)


@each_quantizer
def test_a_run_goes_on_from_a_state(name: str) -> None:
    """Also what only training reads, such as moving averages, is in the state."""
    quantizer, again = make(QUANTIZERS[name]), make(QUANTIZERS[name])
    tokens, mask = batch()
    for call in range(3):
        quantizer(tokens + call, mask)
        settle(quantizer)
    again.load_state_dict(quantizer.state_dict())
    ends = []
    for twin in (quantizer, again):
        torch.manual_seed(0)
        for call in range(3):
            twin(tokens - call, mask)
            settle(twin)
        ends.append(values(twin.eval(), tokens, mask))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@each_quantizer
def test_losses_and_signals_are_means_over_tokens(name: str) -> None:
    """Twice the same tokens give the same."""
    quantizer, (tokens, mask) = make(QUANTIZERS[name]), batch()
    quantizer(tokens, mask)
    quantizer.eval()
    once, twice = values(quantizer, tokens, mask), values(quantizer, tokens.repeat(2, 1, 1), mask.repeat(2, 1))
    torch.testing.assert_close(once[2:], twice[2:])


@each_quantizer
def test_it_sits_between_an_encoder_and_a_decoder_by_the_general_head(name: str) -> None:
    quantizer = make(QUANTIZERS[name])
    untouched = copy.deepcopy(quantizer)  # the library's codes move in every call
    head, task = QuantizerReadout(quantizer, weight=0.5), Reconstruction(SequenceDecoder(DIM))
    module = DDCLReadoutModule(LinearBackbone(DIM, DIM), head, task, rho=0.1, lr_task=0.01)
    tokens, mask = batch()
    readout = module({"x": tokens, "mask": mask})
    alone = untouched(module.backbone.linear(tokens), mask)
    if alone.terms.loss is not None:
        torch.testing.assert_close(readout.regularization, 0.5 * alone.terms.loss)
    assert set(readout.signals) == set(alone.terms.signals)
    data = DataLoader([{"x": row} for row in torch.randn(64, 5, DIM)], batch_size=16)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data, data)
    assert 0 < float(trainer.callback_metrics["val/usage"]) <= 1
    assert {f"train/{signal}" for signal in alone.terms.signals} <= trainer.callback_metrics.keys()
    with pytest.raises(ValueError, match=rf"dim of the quantizer must be that of the tokens, embed_dim = 5; got {DIM}"):
        QuantizerReadout(quantizer, embed_dim=5)


@pytest.mark.parametrize("loss", [torch.tensor(6.0), None])
def test_terms_stand_for_their_loss_in_a_sum_and_at_a_weight(loss: Tensor | None) -> None:
    terms, value = QuantizerTerms(loss), 0.0 if loss is None else 6.0
    assert [float(each) for each in (1.0 + terms, terms + 1.0, 2 * terms, terms * 2, terms / 4)] == [
        1 + value,
        1 + value,
        2 * value,
        2 * value,
        value / 4,
    ]
