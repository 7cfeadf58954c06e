"""What holds for every decoder: shapes, padding, gradients, each sample by itself, copies."""

import copy
import pickle

import pytest
import torch
from registry import classes, make
from torch import Tensor

from ddcl_lightning import Decoder

DECODERS = {kind.__name__: kind for kind in classes(Decoder)}
each_decoder = pytest.mark.parametrize("name", DECODERS)


def built(name: str) -> Decoder:
    decoder: Decoder = make(DECODERS[name])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        decoder.build(5)
    return decoder


def tokens() -> Tensor:
    """A square number of them, for decoders of images."""
    return torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0))


@each_decoder
def test_images_or_one_vector_per_token(name: str) -> None:
    decoded = built(name)(tokens(), torch.ones(3, 16, dtype=torch.bool))
    assert decoded.dim() in (3, 4)
    assert len(decoded) == 3
    assert decoded.dim() == 4 or decoded.shape[1] == 16
    assert bool(decoded.isfinite().all())


@each_decoder
def test_every_parameter_and_every_token_takes_part(name: str) -> None:
    decoder, inputs = built(name), tokens().requires_grad_()
    decoder(inputs).square().sum().backward()
    assert [key for key, parameter in decoder.named_parameters() if parameter.grad is None] == []
    assert inputs.grad is not None
    assert bool(inputs.grad.any(-1).all())


@each_decoder
def test_padding_never_matters_to_a_decoder_of_sequences(name: str) -> None:
    decoder, inputs = built(name), tokens()
    if decoder(inputs).dim() == 4:
        pytest.skip("a grid of tokens has no padding")
    mask = torch.rand(3, 16) < 0.6
    expected = decoder(inputs)
    for garbage in (1e6, torch.nan, torch.inf):
        decoded = decoder(inputs.masked_fill(~mask.unsqueeze(-1), garbage), mask)
        torch.testing.assert_close(decoded[mask], expected[mask])
        assert bool(decoded.isfinite().all())


@each_decoder
def test_a_sample_does_not_depend_on_its_batch_and_copies_agree(name: str) -> None:
    decoder, inputs = built(name).eval(), tokens()
    expected = decoder(inputs)
    torch.testing.assert_close(decoder(inputs[1:2]), expected[1:2])
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(twin(inputs), expected)
    again = make(DECODERS[name]).eval()
    again.build(5)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again(inputs), expected)
