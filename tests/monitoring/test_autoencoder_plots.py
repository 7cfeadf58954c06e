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
    (axis,) = figure.axes
    assert len(axis.images) == len(axis.texts) == min(size, MAX_ATOMS)
    titles = [text.get_text() for text in axis.texts]
    expected = counts.argsort(descending=True, stable=True)[:MAX_ATOMS].tolist()
    assert [title.split(":")[0] for title in titles] == [str(code) for code in expected]
    assert [title for title in titles if title.endswith("unused")] == (["0: unused"] if 1 < size <= MAX_ATOMS else [])
    assert len(axis.lines) == (1 < size <= MAX_ATOMS)
    heading = figure.get_suptitle()
    assert ("the 128 most used" in heading) == (size > MAX_ATOMS)
    if size == 5:
        assert titles[0] == "4: 40.0%"


@pytest.mark.parametrize("shape", [(4, 4), (2, 8), (9, 3)], ids=str)
@pytest.mark.parametrize("size", [3, 40])
def test_every_atom_is_whole_in_a_place_of_its_own_and_undistorted(size: int, shape: tuple[int, int]) -> None:
    atoms = torch.rand(size, 1, *shape)
    figure = drawn(draw_atoms(atoms, torch.arange(size, 0, -1), 0.0, 1.0, "book"))
    (axis,) = figure.axes
    boxes = [image.get_window_extent() for image in axis.images]
    words = [text.get_window_extent() for text in axis.texts]
    everything = [*boxes, *words]
    for number, box in enumerate(everything):
        assert axis.bbox.padded(1).contains(box.x0, box.y0)
        assert axis.bbox.padded(1).contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in everything[number + 1 :])
    for code, (image, box) in enumerate(zip(axis.images, boxes, strict=True)):
        assert box.width / box.height == pytest.approx(shape[1] / shape[0], rel=1e-3)
        shown = torch.tensor(image.get_array().data)[..., 0]
        torch.testing.assert_close(shown, atoms[code, 0])


def test_a_share_that_rounds_to_zero_is_not_called_zero() -> None:
    figure = draw_atoms(torch.rand(2, 1, 2, 2), torch.tensor([9999, 1]), 0.0, 1.0, "book", tokens="one batch's tokens")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0: 100.0%", "1: < 0.1%"]
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
