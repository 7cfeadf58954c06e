"""Inputs of any rank, with their channels first or last."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning import ResidualVectorQuantizer, SoftVectorQuantizer

D = 6


@pytest.fixture(params=["soft", "residual"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def create(kind: str, **kwargs: object) -> SoftVectorQuantizer | ResidualVectorQuantizer:
    torch.manual_seed(0)
    if kind == "soft":
        return SoftVectorQuantizer(D, 5, **kwargs)  # type: ignore[arg-type]
    return ResidualVectorQuantizer(D, 5, 2, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((40, D), None),
        ((4, 10, D), None),
        ((4, D, 10), None),
        ((4, 10, D), "last"),
        ((4, D, 10), "first"),
        ((4, D, 3, 5), None),
        ((4, 3, 5, D), None),
        ((4, D, 3, 5), "first"),
        ((4, D, 2, 3, 5), None),
        ((4, 2, 3, 5, D), "last"),
    ],
)
def test_every_rank_is_its_tokens(kind: str, shape: tuple[int, ...], channels: str | None) -> None:
    vq = create(kind, channels=channels)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    axis = shape.index(D)
    tokens = z.movedim(axis, -1)
    levels = (2,) if kind == "residual" else ()
    for training in (True, False):
        output = vq.train(training)(z)
        assert output.quantized.shape == z.shape
        assert output.indices.shape == (*tokens.shape[:-1], *levels)
        expected = vq(tokens.reshape(-1, D))
        torch.testing.assert_close(output.quantized.movedim(axis, -1).reshape(-1, D), expected.quantized)
    assert torch.equal(vq.encode(z), output.indices)
    torch.testing.assert_close(vq.decode(output.indices), output.quantized)
    mask = torch.rand(tokens.shape[:-1]) < 0.7
    masked = vq(z, mask)
    assert torch.equal((masked.indices == -1).reshape(*mask.shape, -1).all(-1), ~mask)
    assert not masked.quantized.movedim(axis, -1)[~mask].any()
    assert torch.equal(vq.encode(z, mask), masked.indices)


def test_square_inputs_must_say_where_their_channels_are(kind: str) -> None:
    square = torch.randn(4, D, D)
    with pytest.raises(ValueError, match=r"\(4, 6, 6\) has dim = 6 in dimension 1 and in the last: say which"):
        create(kind)(square)
    first, last = create(kind, channels="first"), create(kind, channels="last")
    first.load_state_dict(last.state_dict())
    torch.testing.assert_close(first.eval()(square.mT).quantized, last.eval()(square).quantized.mT)


def test_the_layout_of_the_first_input_stays(kind: str) -> None:
    vq = create(kind).eval()
    z: Tensor = torch.randn(4, 9, D)
    vq(z)
    square = torch.randn(4, D, D)
    torch.testing.assert_close(vq(square).quantized, vq(square.reshape(-1, D)).quantized.view(4, D, D))
    with pytest.raises(ValueError, match=r"must have its channels, dim = 6, last; got shape \(4, 6, 9\)"):
        vq(z.mT)


def test_channels_that_are_nowhere_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"dim = 6, in dimension 1 or last; got shape \(4, 5, 7\)"):
        create(kind)(torch.randn(4, 5, 7))
    with pytest.raises(ValueError, match=r"dim = 6, in dimension 1; got shape \(4, 5, 6\)"):
        create(kind, channels="first")(torch.randn(4, 5, 6))
    with pytest.raises(ValueError, match=r"channels must be (one of|'first')"):
        create(kind, channels="middle")
