"""Figures of an autoencoder can be drawn, and say what they show. (What they look like was looked at by a person.)"""

import io

import pytest
import torch
from matplotlib.figure import Figure

from ddcl_lightning.monitoring.autoencoder_plots import MAX_ATOMS, draw_atoms, draw_codebook_history, draw_images


def drawn(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 8])
def test_images_lie_above_what_came_back(channels: int, count: int) -> None:
    originals = torch.rand(count, channels, 4, 6)
    decoded = originals + 0.5
    figure = drawn(draw_images(originals, decoded, "validation"))
    top, bottom = figure.axes[:count], figure.axes[count:]
    assert [axis.get_xlabel() for axis in bottom] == ["0.2500"] * count
    low, high = originals.aminmax()
    for axes, images in ((top, originals), (bottom, decoded)):
        shown = torch.tensor(axes[-1].images[0].get_array().data)
        image = images[-1].mean(0, keepdim=True) if channels == 2 else images[-1]
        expected = ((image - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
        torch.testing.assert_close(shown, expected)


def test_a_constant_image_can_be_drawn() -> None:
    drawn(draw_images(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), "white"))


@pytest.mark.parametrize("size", [1, 5, 40, MAX_ATOMS + 10])
def test_atoms_are_sorted_by_use_and_unused_ones_crossed_out(size: int) -> None:
    counts = torch.arange(size)
    counts[0] = 1 if size == 1 else 0
    figure = drawn(draw_atoms(torch.rand(size, 1, 2, 2), counts, 0.0, 1.0, "book"))
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == min(size, MAX_ATOMS)
    titles = [axis.get_title().split(":")[0] for axis in shown]
    assert titles[:2] == [str(code) for code in counts.argsort(descending=True)[:2].tolist()]
    crossed = [axis for axis in shown if axis.lines]
    assert [axis.get_title() for axis in crossed] == (["0: unused"] if 1 < size <= MAX_ATOMS else [])
    title = figure.get_suptitle()
    assert ("the 128 most used" in title) == (size > MAX_ATOMS)
    if size == 5:
        assert shown[0].get_title() == "4: 40.0%"


def test_a_share_that_rounds_to_zero_is_not_called_zero() -> None:
    figure = draw_atoms(torch.rand(2, 1, 2, 2), torch.tensor([9999, 1]), 0.0, 1.0, "book", tokens="one batch's tokens")
    assert [axis.get_title() for axis in figure.axes] == ["0: 100.0%", "1: < 0.1%"]
    assert figure.get_suptitle() == "book: each code and its share of one batch's tokens"


def test_history_of_images_and_of_vectors() -> None:
    points = [{"step": 10.0 * i, "perplexity": 3.0 + i, "usage": 0.5, "mse": 0.1, "psnr": 10.0} for i in range(3)]
    figure = drawn(draw_codebook_history(points, 16, "Validation"))
    assert [axis.get_ylabel() for axis in figure.axes] == ["perplexity", "share of codes used", "PSNR [dB]"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [3.0, 4.0, 5.0]
    assert figure.axes[0].get_ylim()[1] > 16
    without = [{name: value for name, value in point.items() if name != "psnr"} for point in points]
    assert draw_codebook_history(without, 16, "Validation").axes[2].get_ylabel() == "squared error"
    assert draw_codebook_history(points[:1], 16, "Validation").axes[0].lines[0].get_marker() == "o"
