"""Figures of an autoencoder and its codebook. Each function returns a matplotlib Figure and touches no global state."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

MAX_ATOMS = 128
COLUMNS = 16  # of a sheet of atoms
ROW = 0.95  # inches of a row of it, of which a title takes the upper part
INNER = (0.86, 0.74)  # largest part of a cell, across and down, that its image covers


def draw_images(originals: Tensor, decoded: Tensor, title: str) -> Figure:
    """Originals above what came back, and the mean squared error of each below.

    Args:
        originals: ``(N, C, H, W)`` float32 on the CPU; C = 1 is shown in grey, C = 3 in colour, of others the mean.
        decoded: Reconstructions of the same shape; values beyond the range of the originals are shown as its ends.
        title: What is shown.
    """
    low, high = (float(value) for value in originals.aminmax())
    figure = Figure(figsize=(max(4.5, 1.2 * len(originals) + 1), 3.2), layout="constrained")
    axes = figure.subplots(2, len(originals), squeeze=False)
    for column, (before, after) in enumerate(zip(originals, decoded, strict=True)):
        _picture(axes[0, column], before, low, high)
        _picture(axes[1, column], after, low, high)
        axes[1, column].set_xlabel(f"{float((before - after).square().mean()):.4f}", fontsize=8)
    axes[0, 0].set_ylabel("original")
    axes[1, 0].set_ylabel("decoded")
    figure.suptitle(f"{title} (mean squared error below)", x=0.01, ha="left", fontsize="medium")
    return figure


def draw_atoms(
    atoms: Tensor,
    counts: Tensor,
    low: float,
    high: float,
    title: str,
    *,
    noun: str = "code",
    tokens: str = "the tokens",
) -> Figure:
    """Decoded image of each code, by falling use; codes without one are crossed out.

    All are in one axis: one for each would take matplotlib 30 times as long.

    Args:
        atoms: ``(K, C, H, W)`` float32 on the CPU; at most 128 of them are drawn.
        counts: Tokens on each code, ``(K,)``; zero where there is no atom.
        low: Value shown in black.
        high: Value shown in white.
        title: Name of the codebook.
        noun: What the K are called.
        tokens: Whose shares these are.
    """
    order = counts.argsort(descending=True, stable=True)[:MAX_ATOMS]
    columns = min(COLUMNS, len(order))
    rows = math.ceil(len(order) / columns)
    width, height = max(6.0, 0.75 * columns), ROW * rows + 0.4
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, ROW * rows / height), xlim=(0, columns), ylim=(rows, 0))
    axis.set_axis_off()
    across, down = _half_size(atoms.shape[-1] / atoms.shape[-2], width / columns)
    for number, code in enumerate(order.tolist()):
        row, column = divmod(number, columns)
        x, y = column + 0.5, row + 0.6
        box = (x - across, x + across, y + down, y - down)
        used = bool(counts[code])
        share = float(counts[code] / counts.sum()) if used else 0.0
        text = f"{share:.1%}" if share >= 0.001 else "< 0.1%" if used else "unused"
        color = "black" if used else "tab:red"
        axis.text(x, y - down - 0.03, f"{code}: {text}", fontsize=7, ha="center", va="bottom", color=color)
        pixels = _pixels(atoms[code], low, high) if used else np.ones((1, 1, 3), dtype=np.float32)
        axis.imshow(pixels, interpolation="nearest", extent=box, aspect="auto")
        axis.add_patch(Rectangle((x - across, y - down), 2 * across, 2 * down, fill=False, linewidth=0.8))
        if not used:
            axis.plot(box[:2], box[2:], color="tab:red", linewidth=0.8)
    axis.set(xlim=(0, columns), ylim=(rows, 0))  # which every image has set to its own
    shown = "" if len(order) == len(counts) else f", the {len(order)} most used"
    heading = f"{title}: each {noun} and its share of {tokens}{shown}"
    figure.suptitle(heading, x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize="medium")
    return figure


def draw_codebook_history(points: Sequence[dict[str, float]], num_codes: int, title: str) -> Figure:
    """Perplexity, use, and the quality of what comes back over optimizer steps, one panel each.

    Args:
        points: Readings with ``step`` and any of ``perplexity``, ``usage`` and ``psnr`` (or, without it, ``mse``).
        num_codes: K, the perplexity of a codebook in even use.
        title: What is shown.
    """
    quality, label = ("psnr", "PSNR [dB]") if any("psnr" in point for point in points) else ("mse", "squared error")
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for axis, key, name, color in (
        (top, "perplexity", "perplexity", "tab:purple"),
        (middle, "usage", "share of codes used", "tab:green"),
        (bottom, quality, label, "tab:blue"),
    ):
        known = [(point["step"], point[key]) for point in points if key in point]
        marker = "o" if len(known) < 20 else ""
        axis.plot([step for step, _ in known], [value for _, value in known], color=color, marker=marker, markersize=4)
        axis.set_ylabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    top.axhline(num_codes, color="black", linewidth=0.8, linestyle="--")
    top.annotate(
        f"K = {num_codes}: even use", (1, num_codes), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    top.set_ylim(0, 1.15 * num_codes)
    middle.set_ylim(0, 1.08)
    top.set_title(title, loc="left")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set_xlabel("optimizer step")
    return figure


def _half_size(aspect: float, cell: float) -> tuple[float, float]:
    """Half the width and height of an image in a cell, in units of the cell.

    Args:
        aspect: Its width over its height.
        cell: Width of the cell in inches.
    """
    height = min(INNER[1] * ROW, INNER[0] * cell / aspect)
    return height * aspect / cell / 2, height / ROW / 2


def _pixels(image: Tensor, low: float, high: float) -> npt.NDArray[np.float32]:
    """An image ``(C, H, W)`` as ``(H, W, 3)`` in [0, 1]."""
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    scaled = ((image - low) / max(high - low, 1e-12)).clamp(0, 1)
    pixels: npt.NDArray[np.float32] = scaled.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    return pixels


def _picture(axis: Axes, image: Tensor, low: float, high: float) -> None:
    """One image ``(C, H, W)`` in a bare frame."""
    axis.imshow(_pixels(image, low, high), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
