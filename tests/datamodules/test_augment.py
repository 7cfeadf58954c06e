"""Random flips and crops: what they do, and that nothing but seed, epoch and row decides them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ddcl_lightning.datamodules._augment import RandomImages, crop_and_flip, random_bits


def images(count: int = 4, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side)


def zeros(count: int = 4) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_windows_are_those_of_padded_images() -> None:
    x = images()
    top, left = torch.tensor([0, 1, 2, 4]), torch.tensor([4, 3, 2, 0])
    flip = torch.tensor([False, True, False, True])
    windows = crop_and_flip(x, 2, top, left, flip)
    for place in range(4):
        padded = np.pad(x[place].numpy(), ((0, 0), (2, 2), (2, 2)))
        window = padded[:, top[place] : top[place] + 8, left[place] : left[place] + 8]
        expected = window[:, :, ::-1] if flip[place] else window
        np.testing.assert_array_equal(windows[place].numpy(), expected)


def test_rectangular_images_are_flipped_along_their_width() -> None:
    x = torch.rand(2, 1, 4, 6)
    assert crop_and_flip(x, 0, zeros(2), zeros(2), torch.tensor([False, True])).equal(
        torch.stack([x[0], x[1].flip(-1)])
    )


def test_flip_mirrors_half_of_the_images_and_no_more() -> None:
    x = images(400)
    out = RandomImages(seed=0, crop=False)({"x": x, "index": torch.arange(400)}, zeros(400))["x"]
    kept = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_crops_reach_every_place_and_no_other() -> None:
    x = torch.zeros(2000, 1, 16, 16)
    x[:, :, 8, 8] = 1  # in the middle, so no crop by up to 2 pixels loses it
    out = RandomImages(seed=0, crop=True)({"x": x, "index": torch.arange(2000)}, zeros(2000))["x"]
    places = out.flatten(1).argmax(1)
    rows, columns = (places // 16).bincount(minlength=16), (places % 16).bincount(minlength=16)
    assert rows.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]
    assert columns.nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10]  # mirrored columns are one to the left
    assert rows[6:11].min() > 320
    assert out.flatten(1).sum(1).eq(1).all()


@pytest.mark.parametrize("crop", [False, True])
def test_a_row_is_changed_alike_in_any_batch(crop: bool) -> None:
    x, index, epochs = images(10), torch.arange(100, 110), torch.full((10,), 3)
    augment = RandomImages(seed=5, crop=crop)
    whole = augment({"x": x, "index": index}, epochs)["x"]
    order = torch.randperm(10)
    shuffled = augment({"x": x[order], "index": index[order]}, epochs)["x"]
    assert shuffled.equal(whole[order])
    alone = augment({"x": x[7:8], "index": index[7:8]}, epochs[:1])["x"]
    assert alone.equal(whole[7:8])


def test_bits_differ_between_seeds_epochs_and_rows_and_are_uniform() -> None:
    rows = torch.arange(50_000)
    draws = [random_bits(seed, torch.full_like(rows, epoch), rows) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(torch.cat(draws).unique()) == 9 * 50_000
    assert min(draw.min() for draw in draws) >= 0
    for bit in range(41):
        share = torch.stack([(draw >> bit & 1).double().mean() for draw in draws])
        assert (share - 0.5).abs().max() < 0.01, bit  # four and a half standard deviations
    for other in draws[1:]:
        agree = ((draws[0] ^ other) & 1).double().mean()
        assert abs(agree - 0.5) < 0.01
