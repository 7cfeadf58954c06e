"""Figures of an autoencoder and its codebook. Each function returns a matplotlib Figure and touches no global state."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

MAX_ATOMS = 128  # each is an axis of its own, which takes matplotlib 10 ms
COLUMNS = 16  # of a sheet of atoms


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
    figure = Figure(figsize=(max(6.0, 0.75 * columns), 0.95 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(order) :]:
        axis.set_axis_off()
    for axis, code in zip(axes, order.tolist(), strict=False):
        if int(counts[code]):
            _picture(axis, atoms[code], low, high)
            share = float(counts[code] / counts.sum())
            axis.set_title(f"{code}: {share:.1%}" if share >= 0.001 else f"{code}: < 0.1%", fontsize=7, pad=2)
        else:
            _picture(axis, torch.full_like(atoms[code], high), low, high)
            axis.plot([0, 1], [0, 1], transform=axis.transAxes, color="tab:red", linewidth=0.8)
            axis.set_title(f"{code}: unused", fontsize=7, pad=2, color="tab:red")
    shown = "" if len(order) == len(counts) else f", the {len(order)} most used"
    figure.suptitle(f"{title}: each {noun} and its share of {tokens}{shown}", x=0.01, ha="left", fontsize="medium")
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


def _picture(axis: Axes, image: Tensor, low: float, high: float) -> None:
    """One image ``(C, H, W)`` in a bare frame."""
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    scaled = ((image - low) / max(high - low, 1e-12)).clamp(0, 1)
    pixels: npt.NDArray[np.float32] = scaled.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
