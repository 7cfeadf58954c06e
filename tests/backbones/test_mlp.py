import pytest
import torch

from ddcl_lightning import MLPBackbone


def test_layers_have_relu_between_them_and_a_linear_end() -> None:
    backbone, x = MLPBackbone(5, embed_dim=3, widths=(4,)), torch.randn(6, 5)
    first, last = (layer for layer in backbone.layers if isinstance(layer, torch.nn.Linear))
    values, mask = backbone({"x": x})
    assert mask is None
    torch.testing.assert_close(values, last(torch.relu(first(x))).unsqueeze(1))
    assert [type(layer) for layer in MLPBackbone(5, 3, widths=()).layers] == [torch.nn.Linear]


def test_padding_passes_through_finite() -> None:
    x = torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x[~mask] = torch.nan
    values, returned = MLPBackbone(5, 3, widths=(4,))({"x": x, "mask": mask})
    assert torch.equal(returned, mask)
    assert bool(values.isfinite().all())


def test_mlp_backbone_refuses_sizes_of_zero_and_other_features() -> None:
    for name in ("in_features", "embed_dim"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            MLPBackbone(**{"in_features": 4, name: 0})
    with pytest.raises(ValueError, match=r"widths must be at least 1 each; got \[8, 0\]"):
        MLPBackbone(4, widths=[8, 0])
    with pytest.raises(ValueError, match=r"shape \(B, 4\) or \(B, T, 4\); got \(2, 3\)"):
        MLPBackbone(4)({"x": torch.zeros(2, 3)})
