"""Every usual form of a batch is read the same way."""

import pytest
import torch

from ddcl_lightning import batch as batches

X, Y = torch.randn(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], (X,), {"x": X, "y": Y}])
def test_inputs(batch: batches.Batch) -> None:
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


def test_labels() -> None:
    assert batches.labels((X, Y)) is Y
    assert batches.labels({"x": X, "y": Y}) is Y
    for without in (X, (X,), {"x": X}):
        assert batches.labels(without) is None


def test_mask_and_index() -> None:
    batch = {"x": X, "mask": X > 0, "index": Y}
    assert batches.mask(batch) is batch["mask"]
    assert batches.index(batch) is Y
    for without in (X, (X, Y), {"x": X}):
        assert batches.mask(without) is None
        assert batches.index(without) is None
