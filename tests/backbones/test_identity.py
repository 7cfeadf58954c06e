import pytest
import torch

from ddcl_lightning import Backbone, IdentityBackbone


def test_passes_features_through() -> None:
    backbone = IdentityBackbone(3)
    assert backbone.embed_dim == 3
    assert not list(backbone.parameters())
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) < 0.5
    values, returned_mask = backbone({"x": x, "mask": mask})
    assert torch.equal(values, x)
    assert returned_mask is mask
    values, returned_mask = backbone((x[:, 0], torch.zeros(4)))
    assert torch.equal(values, x[:, :1])
    assert returned_mask is None


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 5, 2), (4, 5, 6, 3)])
def test_identity_backbone_refuses_features_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 3\) or \(B, T, 3\); got"):
        IdentityBackbone(3)(torch.randn(shape))


def test_identity_backbone_refuses_a_dimension_of_zero() -> None:
    with pytest.raises(ValueError, match="in_features must be at least 1; got 0"):
        IdentityBackbone(0)


def test_a_backbone_must_have_a_forward() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Backbone()  # type: ignore[abstract]
