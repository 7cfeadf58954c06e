"""Codebooks of vector-quantize-pytorch in quantizers of ours: the same codes, and dead ones that come back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

library = pytest.importorskip("vector_quantize_pytorch")

from ddcl_lightning.integrations.convert_vector_quantize import convert_quantizer  # noqa: E402

DIM, CODES = 8, 32


def tokens(size: int = 2000) -> Tensor:
    return torch.randn(1, size, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"codebook_dim": 4},
        {"codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True},
        {"codebook_dim": 4, "heads": 2},
        {"use_cosine_sim": True},
        {"kmeans_init": True},
    ],
    ids=lambda arguments: "+".join(arguments) or "plain",
)
def test_a_vector_quantize_gives_its_indices_and_vectors(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = library.VectorQuantize(dim=DIM, codebook_size=CODES, **arguments)
    layer(tokens())
    layer.eval()
    vq = convert_quantizer(layer)
    assert not vq.training
    quantized, indices, _ = layer(tokens())
    output = vq(tokens())
    assert float((output.indices == indices).float().mean()) > 0.999  # but for ties
    torch.testing.assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"codebook_dim": 4}, {"shared_codebook": True}])
def test_a_residual_vq_gives_its_indices_and_vectors(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = library.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, **arguments)
    layer(tokens())
    layer.eval()
    rvq = convert_quantizer(layer)
    quantized, indices, _ = layer(tokens())
    output = rvq(tokens())
    assert float((output.indices == indices).float().mean()) > 0.999
    torch.testing.assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-4)


def test_feature_maps_keep_their_channels_first() -> None:
    layer = library.VectorQuantize(dim=DIM, codebook_size=CODES, accept_image_fmap=True)
    maps = torch.randn(4, DIM, 8, 8)
    layer(maps)
    vq = convert_quantizer(layer.eval())
    assert torch.equal(vq(maps).indices, layer(maps)[1])


@pytest.mark.parametrize(
    ("option", "shape"),
    [
        ({"accept_image_fmap": True}, (4, DIM, 5, 6)),
        ({"accept_3d_fmap": True}, (4, DIM, 2, 5, 6)),
        ({"channel_last": False}, (4, DIM, 30)),
    ],
)
@pytest.mark.parametrize("projects", [False, True])
def test_a_residual_vq_of_maps_is_converted_where_the_library_itself_fails_on_maps(
    option: dict[str, bool], shape: tuple[int, ...], projects: bool
) -> None:
    arguments = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, "codebook_dim": 4 if projects else None}
    torch.manual_seed(0)
    layer, last = library.ResidualVQ(**arguments, **option).eval(), library.ResidualVQ(**arguments).eval()
    last.load_state_dict(layer.state_dict())
    maps = torch.randn(shape)
    vectors, indices, _ = last(maps.flatten(2).mT)
    output = convert_quantizer(layer)(maps)
    assert output.quantized.shape == maps.shape
    assert torch.equal(output.indices.flatten(1, -2), indices)
    torch.testing.assert_close(output.quantized.flatten(2).mT, vectors, rtol=1e-4, atol=1e-4)
    for module in (layer, *layer.layers):  # as it was
        assert all(getattr(module, name, value) == value for name, value in option.items())


def test_a_layer_whose_own_call_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = library.VectorQuantize(dim=DIM, codebook_size=CODES)
    monkeypatch.setattr(layer, "forward", lambda tokens: tokens @ tokens)
    with pytest.raises(
        ValueError, match=r"must take tokens \(1, 256, 8\) in evaluation mode, .* ends in RuntimeError: "
    ):
        convert_quantizer(layer)


@pytest.mark.parametrize("levels", [1, 3])
def test_dead_codes_are_revived_and_living_ones_stay(levels: int) -> None:
    layer: nn.Module
    if levels == 1:
        layer = library.VectorQuantize(dim=DIM, codebook_size=CODES, kmeans_init=True)
    else:
        layer = library.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=levels, kmeans_init=True)
    layer(tokens())
    layer.eval()
    for module in layer.modules():
        if isinstance(getattr(module, "embed", None), Tensor):
            module.embed[:, 4:] += 1e3
    dead = convert_quantizer(layer)
    revived = convert_quantizer(layer, tokens())

    def used(quantizer: nn.Module) -> list[int]:
        return [len(column.unique()) for column in quantizer(tokens()).indices.reshape(-1, levels).T]

    def error(quantizer: nn.Module) -> float:
        return float((quantizer(tokens()).quantized - tokens()).square().mean())

    assert used(dead) == [4] * levels
    assert used(revived) == [CODES] * levels
    assert error(revived) < 0.7 * error(dead)
    torch.testing.assert_close(revived.codebook[0, :4], dead.codebook[0, :4])
    revived.train()(tokens()).terms.loss.backward()  # and goes on from there
    revived.settle()
    assert used(revived.eval()) == [CODES] * levels


def test_layers_without_a_counterpart_are_refused() -> None:
    with pytest.raises(TypeError, match="layer must be a VectorQuantize or ResidualVQ of vector-quantize-pytorch; got"):
        convert_quantizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must project its tokens by a linear layer or not at all"):
        convert_quantizer(
            library.VectorQuantize(dim=DIM, codebook_size=CODES, codebook_dim=4, layernorm_after_project_in=True)
        )
    with pytest.raises(ValueError, match="has not started its codes yet"):
        convert_quantizer(library.VectorQuantize(dim=DIM, codebook_size=CODES, kmeans_init=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cosine_sim": True}, "use_cosine_sim=True at several levels"),
        ({"implicit_neural_codebook": True}, "implicit_neural_codebook=True"),
        ({"beam_size": 2}, "a beam search"),
        ({"diveq": True}, "other indices or vectors than its codes in our quantizer to 100% of random tokens"),
    ],
)
def test_layers_that_ours_cannot_repeat_are_refused(options: dict[str, Any], message: str) -> None:
    layer = library.ResidualVQ(dim=DIM, codebook_size=8, num_quantizers=3, **options)
    for _ in range(3):
        layer(torch.randn(4, 50, DIM))
    with pytest.raises(ValueError, match=message):
        convert_quantizer(layer)


def test_options_that_the_layer_decides_are_refused() -> None:
    layer = library.VectorQuantize(dim=DIM, codebook_size=8)
    layer(torch.randn(4, 50, DIM))
    with pytest.raises(ValueError, match="options must not name what the layer decides; got num_codes"):
        convert_quantizer(layer, num_codes=64)


def test_a_residual_layer_of_one_level_is_converted() -> None:
    layer = library.ResidualVQ(dim=DIM, codebook_size=8, num_quantizers=1)
    layer(torch.randn(4, 50, DIM))
    z = torch.randn(2, 64, DIM)
    quantized, indices, _ = layer.eval()(z)
    output = convert_quantizer(layer)(z)
    assert torch.equal(output.indices, indices[..., 0])
    torch.testing.assert_close(output.quantized, quantized)
