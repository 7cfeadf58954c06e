"""Features as timm itself gives them, from images as timm itself prepares them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from ddcl_lightning.backbones import TimmBackbone

timm = pytest.importorskip("timm")


def images(batch: int = 2, channels: int = 3, side: int = 40) -> torch.Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def build(model: str = "test_resnet", **kwargs: Any) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(model, pretrained=False, **kwargs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a classifier, in both formats."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    for model in ("test_resnet", "test_vit"):
        state = timm.create_model(model, pretrained=False).state_dict()
        torch.save(state, folder / f"{model}.pth")
        save_file(state, folder / f"{model}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("model", "size", "cells", "has_class_token"),
    [
        ("test_resnet", None, 25, False),  # (B, D, H, W)
        ("test_convnext", 96, 9, False),
        ("swin_tiny_patch4_window7_224", 64, 4, False),  # (B, H, W, D)
        ("test_vit", None, 100, True),
        ("test_vit", 96, 36, True),
        ("test_vit2", 96, 36, False),  # a register but no class token
        ("vit_tiny_patch16_224", 64, 16, True),
        ("deit_tiny_distilled_patch16_224", 64, 16, True),  # a distillation token after the class token
    ],
)
def test_tokens_of_every_layout(model: str, size: int | None, cells: int, has_class_token: bool) -> None:
    backbone = build(model, image_size=size).eval()
    x = images()
    values, mask = backbone({"x": x})
    assert mask is None
    assert values.shape == (2, cells + has_class_token, backbone.embed_dim)
    grid = backbone.token_grid({"x": x})
    side = round(cells**0.5)
    assert grid == ((int(has_class_token), side, side) if "vit" in model or "deit" in model else None)
    with torch.no_grad():
        features: Any = backbone.encoder.forward_features(backbone.preprocess(x))  # type: ignore[operator]
    if features.dim() == 4:
        side = features.shape[1] if features.shape[-1] == backbone.embed_dim else features.shape[-1]
        cell = features[0, 1, side - 1] if features.shape[-1] == backbone.embed_dim else features[0, :, 1, side - 1]
        assert torch.equal(values[0, 2 * side - 1], cell)  # the end of the second row
    else:
        assert torch.equal(values[:, -cells:], features[:, -cells:])
    mean = build(model, image_size=size, tokens="mean")({"x": x}).values
    torch.testing.assert_close(mean[:, 0], values[:, -cells:].mean(1), rtol=1e-4, atol=1e-5)
    if has_class_token:
        assert torch.equal(values[:, 0], features[:, 0])
        assert torch.equal(build(model, image_size=size, tokens="cls")({"x": x}).values, values[:, :1])
    else:
        with pytest.raises(ValueError, match=r"tokens='cls' needs a model with a class token.*use 'mean'"):
            build(model, image_size=size, tokens="cls")


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])  # bilinear and bicubic
def test_preprocessing_is_that_of_the_model(model: str) -> None:
    from torchvision.transforms import functional as vision

    backbone = build(model)
    config = timm.data.resolve_model_data_config(timm.create_model(model))
    x = images(side=200)
    mode = vision.InterpolationMode(config["interpolation"])
    expected = vision.resize(x, list(config["input_size"][1:]), mode, antialias=True).clamp(0, 1)
    expected = vision.normalize(expected, config["mean"], config["std"])
    torch.testing.assert_close(backbone.preprocess(x), expected, rtol=1e-4, atol=1e-5)
    plain = interpolate(x, config["input_size"][1:], mode=config["interpolation"], align_corners=False)
    assert (vision.normalize(plain, config["mean"], config["std"]) - expected).abs().max() > 0.1  # antialiasing counts


def test_grey_bytes_and_odd_shapes() -> None:
    backbone = build()
    grey = images(channels=1)
    torch.testing.assert_close(backbone({"x": grey}).values, backbone({"x": grey.expand(-1, 3, -1, -1)}).values)
    pixels = (images() * 255).to(torch.uint8)
    torch.testing.assert_close(backbone({"x": pixels}).values, backbone({"x": pixels / 255}).values)
    assert backbone({"x": images()[..., :25]}).values.shape == (2, 25, 96)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_timm_backbone_loads_checkpoint_files(weights: Path, model: str, suffix: str) -> None:
    backbone = TimmBackbone(model, checkpoint=str(weights / f"{model}.{suffix}"))
    state = torch.load(weights / f"{model}.pth", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in backbone.encoder.state_dict().items())


def test_a_checkpoint_of_another_image_size(weights: Path) -> None:
    backbone = TimmBackbone("test_vit", checkpoint=str(weights / "test_vit.pth"), image_size=96)
    assert backbone({"x": images()}).values.shape == (2, 37, 64)


def test_refuses_checkpoints_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit model 'test_vit': of its weights 78 are missing \(cls_token"):
        TimmBackbone("test_vit", checkpoint=str(weights / "test_resnet.pth"))
    state = torch.load(weights / "test_resnet.pth", weights_only=True)
    torch.save({**state, "neck.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"1 are unknown \(neck.weight\)"):
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "more.pth"))
    torch.save({**state, "conv1.0.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"does not fit model 'test_resnet'.*size mismatch"):
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "shape.pth"))
    names = {f"_{name}": value for name, value in state.items()}
    torch.save(names, tmp_path / "names.pth")
    with pytest.raises(ValueError, match=r"are unknown \(_.*All its shapes come in the order of that model.*dict\(zip"):
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "names.pth"))
    torch.save(dict(reversed(names.items())), tmp_path / "names.pth")
    with pytest.raises(ValueError, match=r"are unknown \(.*\)\. Name the model that it was saved from\.$"):
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "names.pth"))
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file with weights of 'test_resnet'"):
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\r\n<!doctype html>\r\n<p>Not found", r"a.pth is no file of weights but text: '<!doctype html>'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r".*but text: 'version https://git-lfs"),
        (b"", "a.pth is empty"),
        (b"\x80\x02\x00\xff", r"\w+: [^.]+"),
    ],
)
def test_refuses_files_that_hold_no_weights(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"holds no weights that can be read \({why}.*\)\. It must be a \.safetensors"
    ):
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "a.pth"))


def test_no_advice_to_run_the_code_in_a_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"non-allowlisted pickle globals\)\. It must be .*torch\.save\(model\.state"
    ) as caught:
        TimmBackbone("test_resnet", checkpoint=str(tmp_path / "a.pth"))
    assert "weights_only=False" not in str(caught.value)


# Freezing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "unfreeze", "expected"),
    [
        ("test_vit", 0, ()),
        ("test_vit", 1, ("blocks.5.", "norm.")),
        ("test_vit", "all", ("",)),
        ("test_resnet", 1, ("layer4.",)),
        ("test_convnext", 1, ("stages.3.blocks.1.",)),  # the norm of its head takes no part
        ("test_efficientnet", 1, ("blocks.4.", "conv_head.", "bn2.")),
    ],
)
def test_what_is_unfrozen_gets_gradients(model: str, unfreeze: Any, expected: tuple[str, ...]) -> None:
    backbone = build(model, unfreeze=unfreeze, image_size=96).train()
    trainable = {name for name, parameter in backbone.encoder.named_parameters() if parameter.requires_grad}
    names = [name for name, _ in backbone.encoder.named_parameters()]
    assert trainable == ({name for name in names if name.startswith(expected)} if expected else set())
    values = backbone({"x": images()}).values
    assert values.requires_grad == (unfreeze != 0)
    if unfreeze != 0:
        values.square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in backbone.encoder.parameters())


def test_frozen_batch_statistics_stay() -> None:
    backbone = build(unfreeze=1).train()
    before = {name: value.clone() for name, value in backbone.encoder.named_buffers()}
    backbone({"x": images()})
    changed = {name for name, value in backbone.encoder.named_buffers() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("layer4.") for name in changed)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = build("test_vit", unfreeze=2, image_size=96, gradient_checkpointing=checkpointing).train()
        backbone({"x": images()}).values.square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# Cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "mean"])
def test_cached_tokens_are_those_of_the_encoder(tokens: Any, tmp_path: Path) -> None:
    x = images(5)
    expected = build(tokens=tokens)({"x": x}).values
    for dtype, tolerance in (("float16", 2e-3), ("float32", 1e-5)):
        backbone = build(tokens=tokens, cache_dir=str(tmp_path), cache_dtype=dtype)
        assert backbone.fill_cache([{"x": x[:3]}, {"x": x[2:]}], progress=False) == 5
        backbone.encoder.forward_features = None  # type: ignore[assignment]  # not touched again
        values, mask = backbone({"x": x.flip(0)})
        assert mask is None
        torch.testing.assert_close(values.flip(0), expected, rtol=tolerance, atol=tolerance)


def test_whatever_decides_the_tokens_decides_the_cache(tmp_path: Path) -> None:
    def folder(**kwargs: Any) -> str:
        return build(cache_dir=str(tmp_path), **kwargs)._open_cache().path.name

    first = folder()
    torch.manual_seed(1)
    other = TimmBackbone("test_resnet", pretrained=False, cache_dir=str(tmp_path))._open_cache().path.name
    assert folder() == first
    assert len({first, other, folder(tokens="mean"), folder(image_size=96), folder(cache_dtype="float32")}) == 5


def test_images_of_other_shape_or_type_are_other_samples() -> None:
    backbone = build()
    x = torch.zeros(1, 1, 2, 8)
    variants = [x, x.view(1, 1, 8, 2), x.double(), x.to(torch.uint8), x.view(1, 1, 4, 4)]
    assert len({backbone.keys(variant)[0] for variant in variants}) == len(variants)


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kwargs", "error"),
    [
        ("resnet5o", {}, r"one of timm.list_models\(\), such as resnet50.*; got 'resnet5o'"),
        ("resnet10t.nobody", {}, r"one of \['resnet10t.*, or 'resnet10t'; got 'resnet10t.nobody'"),
        ("test_resnet", {"tokens": "last"}, r"tokens must be one of \('all', 'cls', 'mean'\); got 'last'"),
        ("test_resnet", {"image_size": 0}, "image_size must be at least 1 pixel.*got 0"),
        ("test_vit", {"image_size": 100}, "image_size must be a multiple of 'test_vit''s patches of 16; got 100"),
        ("test_resnet", {"unfreeze": 5}, "unfreeze must be at most the 4 blocks"),
        ("test_resnet", {"gradient_checkpointing": True}, "gradient_checkpointing saves memory for gradients"),
        ("poolformer_s12", {"unfreeze": 1}, "unfreeze=1 needs a model with a list of blocks.*use 0 or 'all'"),
    ],
)
def test_timm_backbone_refuses_arguments_out_of_range(model: str, kwargs: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        build(model, **kwargs)


def test_refuses_a_model_without_weights() -> None:
    with pytest.raises(ValueError, match=r"timm has no weights for model 'mixer_s16_224'.*pretrained=False"):
        TimmBackbone("mixer_s16_224")


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (images() * 2, r"must be in \[0, 1\].*got values from .* to 2.*divide by 255"),
        (images() - 1, r"must be in \[0, 1\].*got values from -1"),
        (images() * float("nan"), r"must be in \[0, 1\].*got values from nan"),
        (images(channels=4), r"C = 1 or 3; got shape \(2, 4, 40, 40\)"),
        (images().permute(0, 2, 3, 1), r"C = 1 or 3; got shape \(2, 40, 40, 3\)"),
        (images().flatten(1), r"images \(B, C, H, W\)"),
    ],
)
def test_timm_backbone_refuses_images_out_of_range_or_shape(x: torch.Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        build()({"x": x})


def test_timm_backbone_refuses_integer_images() -> None:
    with pytest.raises(TypeError, match=r"floating-point numbers or bytes; got torch.int64"):
        build()({"x": torch.ones(1, 3, 8, 8, dtype=torch.int64)})
