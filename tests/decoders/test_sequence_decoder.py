"""Every vector is decoded from its own token; padding has no part in it."""

import math

import pytest
import torch

from ddcl_lightning.decoders import SequenceDecoder


def built() -> SequenceDecoder:
    decoder = SequenceDecoder(out_dim=3, hidden_dim=5)
    decoder.build(4)
    return decoder


def test_sequence_decoder_is_a_hidden_layer_on_each_token() -> None:
    decoder, tokens = built(), torch.randn(2, 6, 4)
    hidden = torch.nn.functional.gelu(tokens @ decoder.hidden.weight.T + decoder.hidden.bias)
    torch.testing.assert_close(decoder(tokens), hidden @ decoder.output.weight.T + decoder.output.bias)


def test_padding_is_zero_and_reaches_nothing() -> None:
    decoder, tokens = built(), torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, True]])
    expected = decoder(tokens)
    tokens[~mask] = math.nan
    decoded = decoder(tokens, mask)
    torch.testing.assert_close(decoded[mask], expected[mask])
    assert bool((decoded[~mask] == 0).all())
    decoded.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in decoder.parameters())


def test_half_precision_tokens() -> None:
    assert built()(torch.randn(2, 6, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_sequence_decoder_refuses_sizes_of_zero_and_tokens_that_do_not_fit() -> None:
    for name in ("out_dim", "hidden_dim"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            SequenceDecoder(**{"out_dim": 3, name: 0})
    with pytest.raises(RuntimeError, match="SequenceDecoder does not know the dimension of its tokens"):
        SequenceDecoder(3)(torch.randn(2, 6, 4))
    with pytest.raises(ValueError, match=r"token_dim = 4\) with T >= 1; got \(2, 4\)"):
        built()(torch.randn(2, 4))
