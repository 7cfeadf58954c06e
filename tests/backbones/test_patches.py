import pytest
import torch

from ddcl_lightning.backbones import ConvBackbone, PatchBackbone


def test_tokens_are_the_pixels_of_the_patches_row_by_row():
    x = torch.rand(3, 2, 4, 6)
    tokens, mask = PatchBackbone(in_channels=2, patch_size=2)({"x": x})
    assert mask is None
    assert tokens.shape == (3, 6, 8)
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())


def test_patches_overlap_by_a_smaller_stride_and_bytes_are_scaled():
    x = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    backbone = PatchBackbone(patch_size=4, stride=2)
    pieces = backbone.pieces({"x": x})
    assert backbone.embed_dim == 16
    assert pieces.shape == (2, 9, 1, 4, 4)
    assert torch.equal(pieces[0, 5], x[0, :, 2:6, 4:8] / 255)
    assert torch.equal(backbone({"x": x}).values, pieces.flatten(2))


def test_other_backbones_have_no_pieces():
    assert ConvBackbone(1).pieces({"x": torch.rand(1, 1, 8, 8)}) is None


@pytest.mark.parametrize("shape", [(2, 64), (2, 3, 8, 8), (2, 1, 3, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"batch x must have shape \(B, in_channels = 1, H, W\)"):
        PatchBackbone()({"x": torch.rand(shape)})


@pytest.mark.parametrize("name", ["in_channels", "patch_size", "stride"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        PatchBackbone(**{name: 0})


def test_token_grid_counts_the_tokens():
    batch = {"x": torch.rand(2, 1, 8, 12)}
    assert PatchBackbone(1, 4).token_grid(batch) == (0, 2, 3)
    assert PatchBackbone(1, 4)(batch).values.shape[1] == 6
    assert PatchBackbone(1, 4, stride=2).token_grid(batch) is None  # patches that overlap are no cells
    assert ConvBackbone(1, widths=(8, 8, 8)).token_grid(batch) == (0, 1, 2)
    assert ConvBackbone(1, widths=(8, 8, 8))(batch).values.shape[1] == 2
