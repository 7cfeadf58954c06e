"""Samples of batches as a person looks at them."""

from typing import Any

import numpy as np
import pytest
import torch
from explain_toys import PointsDataModule, ToyDataModule, images

from ddcl_lightning._utils.batch import class_labels
from ddcl_lightning.explain.samples import MAX_SIDE, Album, positions, take, thumbnail, to_image


def test_rows_of_batches() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "text": ["a", "b", "c"], "y": torch.tensor([4, 5, 6]), "scale": 2.0}
    row = take(batch, 1)
    assert row["x"].tolist() == [[2, 3]]
    assert row["text"] == ["b"]
    assert row["y"].tolist() == [5]
    assert row["scale"] == 2.0
    x, y = take((batch["x"], batch["y"]), 2)
    assert (x.tolist(), y.tolist()) == ([[4, 5]], [6])
    assert take(batch["x"], 0).tolist() == [[0, 1]]
    assert positions(batch, 7) == ([7, 8, 9], False)
    assert positions({**batch, "index": torch.tensor([5, 1, 8])}, 7) == ([5, 1, 8], True)
    assert class_labels({"x": batch["x"], "y": torch.rand(3)}).tolist() == [-1, -1, -1]


def test_album_prefers_text_then_the_data_module_then_the_batch() -> None:
    album = Album(PointsDataModule())
    batch: dict[str, Any] = {"x": images(2), "y": torch.tensor([1, -1])}
    assert album.sample({**batch, "text": ["so", "what"]}, 1, 3, True).content == "what"
    shown = album.sample(batch, 0, 3, True)
    assert shown.label == "<i>high</i>"
    assert isinstance(shown.content, np.ndarray)
    assert (shown.content == 60).all()
    counted = album.sample(batch, 1, 3, False).content  # a counted place is not looked up
    assert isinstance(counted, np.ndarray)
    assert counted.shape == (8, 8)
    assert album.sample(batch, 1, 3, False).label is None
    bare = Album(ToyDataModule([], []))
    assert bare.sample({"x": torch.rand(2, 5), "y": torch.tensor([7, 8])}, 1, 0, True).content is None
    assert bare.class_name(8) == "8"


def test_example_must_be_a_picture_or_a_text() -> None:
    with pytest.raises(ValueError, match=r"str or a uint8 array.*float64 of shape \(2, 2\)"):
        thumbnail(np.zeros((2, 2)))


def test_pictures_keep_their_values_and_large_ones_shrink() -> None:
    assert to_image(torch.tensor([[[0.0, 1.0], [0.2, 0.4]]])).tolist() == [[0, 255], [51, 102]]
    assert to_image(torch.tensor([[[-2.0, 2.0]]])).tolist() == [[0, 255]]
    assert to_image(torch.rand(3, 4, 5)).shape == (4, 5, 3)
    large = thumbnail(np.full((4 * MAX_SIDE, 2 * MAX_SIDE, 3), 7, dtype=np.uint8))
    assert large.shape == (MAX_SIDE, MAX_SIDE // 2, 3)
    assert (large == 7).all()
