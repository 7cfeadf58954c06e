"""Every usual form of a batch is read the same way."""

import pytest
import torch

from ddcl_lightning import ConvBackbone, IdentityBackbone, PatchBackbone, PCABackbone
from ddcl_lightning._utils import batch as batches
from tests.tiny import clustering_module

X, Y = torch.randn(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], (X,), {"x": X, "y": Y}])
def test_inputs_are_found_in_every_kind_of_batch(batch: batches.Batch) -> None:
    assert batches.inputs(batch) is X


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ({"image": X, 3: Y}, r"a dict with keys \['3', 'image'\]"),
        ((), "tuple"),
        (("a", "b"), "tuple"),
        (None, "NoneType"),
    ],
)
def test_inputs_refusal_describes_the_batch(batch: batches.Batch, described: str) -> None:
    with pytest.raises(TypeError, match=f"got {described}. Change the collate function"):
        batches.inputs(batch)


def test_labels_are_found_in_every_kind_of_batch() -> None:
    assert batches.labels((X, Y)) is Y
    assert batches.labels({"x": X, "y": Y}) is Y
    for without in (X, (X,), {"x": X}):
        assert batches.labels(without) is None


def test_mask_and_index_are_found_in_dictionaries_only() -> None:
    batch = {"x": X, "mask": X > 0, "index": Y}
    assert batches.token_mask(batch) is batch["mask"]
    assert batches.index(batch) is Y
    for without in (X, (X, Y), {"x": X}):
        assert batches.token_mask(without) is None
        assert batches.index(without) is None


TOKENS = torch.randn(3, 4, 2)
VALID = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])


def test_a_mask_is_boolean_or_that_of_a_tokenizer() -> None:
    assert batches.token_mask({"mask": VALID}, TOKENS) is VALID
    for told in (VALID, VALID.long(), VALID.to(torch.uint8)):
        assert torch.equal(batches.token_mask({"attention_mask": told}, TOKENS), VALID)
    assert batches.token_mask({"mask": VALID, "padding_mask": ~VALID, "attention_mask": None}, TOKENS) is VALID
    bystanders = {"mask": None, "special_tokens_mask": VALID, "loss_mask": torch.ones(3), "lengths": TOKENS, 3: X}
    for batch in (TOKENS, (TOKENS, Y), (TOKENS, VALID[:, 0]), {"x": TOKENS}, {"x": TOKENS, **bystanders}):
        assert batches.token_mask(batch, TOKENS) is None
    assert batches.token_mask({"padding_mask": VALID[:, :1]}, TOKENS[:, :1]) is None  # a single vector needs none


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"mask": VALID.long()},
            r"mask must be boolean of the shape of x, \(3, 4\); got torch.int64 of",
        ),
        ({"mask": VALID.float()}, "got torch.float32"),
        ({"mask": VALID.tolist()}, "got list. Convert it"),
        ({"mask": VALID[:, :3]}, r"got torch.bool of shape \(3, 3\)"),
        ({"mask": VALID[:2]}, r"got torch.bool of shape \(2, 4\)"),
        ({"mask": VALID[:, None, None]}, r"got torch.bool of shape \(3, 1, 1, 4\)"),
        ({"mask": VALID & (torch.arange(3) > 1)[:, None]}, "mask leaves no token in 2 samples; drop them"),
        ({"attention_mask": (~VALID).float() * -1e4}, "attention_mask must be boolean.*got torch.float32"),
        ({"attention_mask": 2 * VALID.long()}, "attention_mask must be boolean.*got torch.int64"),
        ({"attention_mask": VALID[:, None, None].long()}, r"got torch.bool of shape \(3, 1, 1, 4\)"),
        ({"attention_mask": torch.zeros(3, 4, dtype=torch.int64)}, "attention_mask leaves no token in 3 samples"),
        ({"mask": VALID, "attention_mask": VALID}, "must have one mask; got 'mask' and 'attention_mask'"),
        ({"padding_mask": ~VALID}, "got 'padding_mask'. Rename it, and turn it over"),
        ({"key_padding_mask": ~VALID[:, :2]}, "got 'key_padding_mask'"),
        ({"token_mask": VALID.float()}, "got 'token_mask'"),
        ({"lengths": torch.tensor([2, 4, 1])}, "got 'lengths'"),
        ((TOKENS, Y, VALID), "a pair holds x and y alone; got a boolean tensor"),
        ([TOKENS, VALID], "a pair holds x and y alone"),
    ],
)
def test_padding_told_in_another_way_is_refused(batch: batches.Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches.token_mask({"x": TOKENS, **batch} if isinstance(batch, dict) else batch, TOKENS)


@pytest.mark.parametrize("name", ["mask", "attention_mask"])
def test_backbones_of_images_refuse_masks_of_tokens(name: str) -> None:
    images = torch.rand(3, 1, 8, 8)
    for backbone in (ConvBackbone(1, 4, (4,)), PatchBackbone()):
        backbone({"x": images, name: images > 0.5})  # of pixels: a target of something else
        with pytest.raises(ValueError, match=rf"{type(backbone).__name__} reads whole images.*got '{name}' .*\(3, 4\)"):
            backbone({"x": images, name: VALID})


def test_padding_is_read_by_no_backbone_whatever_it_holds() -> None:
    padded = TOKENS.masked_fill(~VALID.unsqueeze(-1), float("nan"))
    expected = TOKENS[VALID]
    for name in ("mask", "attention_mask"):
        values, valid = IdentityBackbone(2)({"x": padded, name: VALID})
        assert valid is VALID
        assert torch.equal(values[VALID], expected)
        assert not values.isnan().any()
        fitted = [PCABackbone(2, 1), PCABackbone(2, 1)]
        fitted[0].prepare([{"x": padded, name: VALID}])
        fitted[1].prepare([expected])
        assert torch.equal(fitted[0].weight, fitted[1].weight)
        assert torch.equal(fitted[0].bias, fitted[1].bias)


def test_nan_at_padding_leaves_the_gradients_of_an_encoder_alone() -> None:
    gradients = []
    for filling in (0.0, float("nan"), float("inf")):
        torch.manual_seed(0)
        module = clustering_module()
        x = torch.randn(3, 4, 4).masked_fill(~VALID.unsqueeze(-1), filling)
        batch = {"x": x, "attention_mask": VALID.long()}
        module.task.losses(module(batch), batch)["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
