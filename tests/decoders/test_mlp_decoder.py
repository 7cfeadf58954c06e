import pytest
import torch

from ddcl_lightning import MLPDecoder


def test_layers_mirror_those_of_the_backbone() -> None:
    decoder, tokens = MLPDecoder(5, widths=(4,)), torch.randn(2, 6, 3)
    decoder.build(3)
    first, last = (layer for layer in decoder.layers if isinstance(layer, torch.nn.Linear))
    torch.testing.assert_close(decoder(tokens), last(torch.relu(first(tokens))))


def test_padding_of_decoded_vectors_is_zero() -> None:
    decoder, tokens = MLPDecoder(5), torch.randn(2, 3, 4)
    decoder.build(4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens[~mask] = torch.nan
    decoded = decoder(tokens, mask)
    assert bool((decoded[~mask] == 0).all())
    assert bool(decoded.isfinite().all())


def test_mlp_decoder_refuses_sizes_of_zero_and_tokens_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="out_dim must be at least 1; got 0"):
        MLPDecoder(0)
    with pytest.raises(ValueError, match=r"widths must be at least 1 each; got \[0\]"):
        MLPDecoder(3, widths=[0])
    with pytest.raises(RuntimeError, match="MLPDecoder does not know the dimension of its tokens"):
        MLPDecoder(3)(torch.zeros(2, 1, 4))
