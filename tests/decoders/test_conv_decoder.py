"""Tokens of a grid become images of the right size, each token in its own place."""

import pytest
import torch

from ddcl_lightning import ConvBackbone
from ddcl_lightning.decoders import ConvDecoder


def built(*args: object, dim: int = 6, **options: object) -> ConvDecoder:
    decoder = ConvDecoder(*args, **options)  # type: ignore[arg-type]
    decoder.build(dim)
    return decoder


@pytest.mark.parametrize(
    ("tokens", "options", "shape"),
    [
        (64, {}, (3, 32, 32)),
        (16, {"widths": (4,)}, (3, 8, 8)),
        (16, {"widths": (4, 4, 4), "size": (28, 28)}, (3, 28, 28)),
        (8, {"widths": (4, 6), "size": (13, 6)}, (3, 13, 6)),
        (1, {"widths": (4,), "size": (1, 1)}, (3, 1, 1)),
    ],
)
def test_conv_decoder_doubles_each_side_per_width(
    tokens: int, options: dict[str, object], shape: tuple[int, ...]
) -> None:
    images = built(3, **options)(torch.randn(2, tokens, 6), torch.ones(2, tokens, dtype=torch.bool))
    assert images.shape == (2, *shape)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (9, 30), (5, 5)])
@pytest.mark.parametrize("widths", [(4,), (4, 8), (4, 8, 12)])
def test_takes_what_the_backbone_makes_of_any_size(size: tuple[int, int], widths: tuple[int, ...]) -> None:
    tokens = ConvBackbone(2, embed_dim=6, widths=widths)({"x": torch.rand(1, 2, *size)}).values
    assert built(2, widths[::-1], size=size)(tokens).shape == (1, 2, *size)


def test_every_token_is_decoded_in_its_own_place() -> None:
    decoder, tokens = built(1, (4, 4), size=(64, 32)), torch.randn(1, 16 * 8, 6)
    changed = tokens.clone()
    changed[0, 15 * 8] += 5  # the last row, the first column
    difference = (decoder(changed) - decoder(tokens)).detach().abs()[0, 0]
    row, column = divmod(int(difference.argmax()), 32)
    assert row >= 56
    assert column < 8


def test_output_is_linear_unless_a_sigmoid_is_asked_for() -> None:
    tokens = 50 * torch.randn(2, 16, 6)
    torch.manual_seed(1)
    linear = built(1, (4,))(tokens)
    torch.manual_seed(1)
    bounded = built(1, (4,), output="sigmoid")(tokens)
    assert float(linear.detach().min()) < 0
    torch.testing.assert_close(bounded, linear.sigmoid())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    decoder, tokens = built(1, (4,)).train(), torch.randn(3, 16, 6)
    torch.testing.assert_close(decoder(tokens)[:1], decoder(tokens[:1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 0}, "out_channels must be at least 1; got 0"),
        ({"widths": ()}, "widths must hold at least one number of channels"),
        ({"widths": (4, 0)}, r"widths must hold at least one .*got \(4, 0\)"),
        ({"size": (8, 0)}, r"size must be \(H, W\), both at least 1, or None; got \(8, 0\)"),
        ({"output": "tanh"}, "output must be one of .*got 'tanh'"),
    ],
)
def test_conv_decoder_refuses_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvDecoder(**{"out_channels": 1, **options})  # type: ignore[arg-type]


def test_conv_decoder_refuses_tokens_before_build_and_of_other_shapes() -> None:
    with pytest.raises(RuntimeError, match=r"ConvDecoder does not know .* Call build\(token_dim\)"):
        ConvDecoder(1)(torch.randn(2, 16, 6))
    with pytest.raises(ValueError, match=r"\(B, T, token_dim = 6\) with T >= 1; got \(2, 16, 5\)"):
        built(1)(torch.randn(2, 16, 5))
    with pytest.raises(ValueError, match=r"a square grid unless size is given; got T = 17.*\(CLS\) out"):
        built(1)(torch.randn(2, 17, 6))
    with pytest.raises(ValueError, match=r"fill 7 x 7 cells for images of size \(28, 28\) and 2 widths; got T = 16"):
        built(1, size=(28, 28))(torch.randn(2, 16, 6))
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 3:5] = False
    with pytest.raises(ValueError, match=r"mask must be True everywhere.*got 2 places of padding. Use SequenceDecoder"):
        built(1)(torch.randn(2, 16, 6), mask)
