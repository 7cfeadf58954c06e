"""A feature map as tokens, row by row."""

import pytest
import torch

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.backbones import ConvBackbone
from ddcl_lightning.datamodules import DigitsDataModule
from tests.tiny import quiet_trainer


@pytest.mark.parametrize(
    ("widths", "size", "tokens"),
    [((32, 64), (32, 32), 64), ((8,), (32, 16), 16 * 8), ((8, 12, 30), (33, 10), 5 * 2), ((8, 8), (1, 1), 1)],
)
def test_conv_backbone_halves_each_side_per_width(widths: tuple[int, ...], size: tuple[int, int], tokens: int) -> None:
    backbone = ConvBackbone(3, embed_dim=10, widths=widths)
    values, mask = backbone({"x": torch.rand(2, 3, *size)})
    assert values.shape == (2, tokens, 10)
    assert mask is None


def test_tokens_lie_row_by_row() -> None:
    """A change in one corner of the image reaches the tokens of that corner most."""
    backbone = ConvBackbone(1, 8).eval()
    x = torch.rand(1, 1, 64, 32)
    changed = x.clone()
    changed[..., 60:, :4] += 1  # the last rows, the first columns
    difference = (backbone({"x": changed}).values - backbone({"x": x}).values).norm(dim=-1).view(16, 8)
    row, column = divmod(int(difference.argmax()), 8)
    assert row >= 14
    assert column <= 1


def test_a_sample_does_not_depend_on_its_batch() -> None:
    backbone = ConvBackbone(3).train()
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(backbone({"x": x}).values[:1], backbone({"x": x[:1]}).values)


def test_tokens_take_both_signs() -> None:
    values = ConvBackbone(3)({"x": torch.rand(4, 3, 16, 16)}).values.detach()
    assert float(values.min()) < 0 < float(values.max())


def test_flat_squares_and_bytes() -> None:
    backbone = ConvBackbone(1)
    x = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    expected = backbone({"x": x.float() / 255}).values
    assert torch.equal(backbone({"x": x}).values, expected)
    assert torch.equal(backbone({"x": x.flatten(1)}).values, expected)
    assert torch.equal(backbone((x, torch.zeros(2))).values, expected)


def test_every_parameter_of_the_conv_backbone_trains() -> None:
    module = DDCLReadoutModule(ConvBackbone(1, 8, (8, 8)), DDCLReadout(10), Classification(10))
    before = [parameter.detach().clone() for parameter in module.backbone.parameters()]
    quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(module, datamodule=DigitsDataModule())
    assert all(not torch.equal(a, b) for a, b in zip(before, module.backbone.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 192), (3, 8, 8), (2, 8, 8, 3)])
def test_conv_backbone_refuses_images_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, in_channels = 3, H, W\); got"):
        ConvBackbone(3)({"x": torch.rand(shape)})


def test_refuses_a_flat_image_that_is_no_square() -> None:
    with pytest.raises(ValueError, match=r"or \(B, H \* W\) with H = W; got \(2, 63\)"):
        ConvBackbone(1)({"x": torch.rand(2, 63)})


def test_conv_backbone_refuses_integer_images() -> None:
    with pytest.raises(TypeError, match=r"floating-point numbers or bytes; got torch.int64"):
        ConvBackbone(1)({"x": torch.ones(2, 64, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0,), "in_channels must be at least 1; got 0"),
        ((1, 0), "embed_dim must be at least 1; got 0"),
        ((1, 8, ()), "widths must hold at least one number of channels"),
        ((1, 8, (8, 0)), r"widths must hold at least one .*got \(8, 0\)"),
    ],
)
def test_conv_backbone_refuses_sizes_below_one(arguments: tuple[int, ...], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ConvBackbone(*arguments)  # type: ignore[arg-type]
