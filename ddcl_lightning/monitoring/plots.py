"""Figures of a prototype bank. Each function returns a matplotlib Figure and touches no global state."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import Tensor

from ddcl_lightning._utils.reservoir import evenly_spaced
from ddcl_lightning.functional import nearest_prototype

MAX_POINTS = 2000
MAX_LABELS = 40  # numbers written beside prototypes or bars before they hide the picture


def figure_with_legends(width: float, height: float, top: float = 0.45) -> Figure:
    """A figure with room for labels and for legends on the right; a layout that looks for room takes twice as long.

    Args:
        width: In inches.
        height: In inches.
        top: Room for titles in inches.
    """
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.9 / width, right=1 - 2.3 / width, bottom=0.6 / height, top=1 - top / height, hspace=0.12
    )
    return figure


def draw_history(points: Sequence[dict[str, float]], title: str) -> Figure:
    """Separation, entropy and use, and T / T_c over optimizer steps, one panel each with its line of danger.

    Args:
        points: Readings with ``step``, ``delta_min``, ``delta_mean``, ``embedding_scale``, ``entropy_ratio``,
            ``used_in_batch`` and ``temperature_ratio``.
        title: Name of the bank.
    """
    figure = figure_with_legends(10, 8)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    steps = [point["step"] for point in points]

    def curve(axis: Axes, key: str, label: str, color: str, style: str = "-") -> None:
        values = [point[key] for point in points]
        if not any(math.isfinite(value) for value in values):
            label += "\n(undefined here)"
        marker = "o" if len(points) < 20 else ""
        axis.plot(steps, values, label=label, color=color, linestyle=style, marker=marker, markersize=4)

    curve(top, "delta_mean", "mean distance\nbetween prototypes", "tab:blue")
    curve(top, "delta_min", "Delta, the smallest", "tab:red")
    curve(top, "embedding_scale", "spread of the\nembeddings", "gray", ":")
    top.set_ylim(bottom=0)
    top.set_ylabel("distance")
    top.set_title(f"Health of {title}", loc="left")
    curve(middle, "entropy_ratio", "H / ln K", "tab:purple")
    middle.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="uniform: assignments\nsay nothing")
    curve(middle, "used_in_batch", "share of prototypes\nused in the batch", "tab:green")
    middle.set_ylim(0, 1.08)
    middle.set_ylabel("share")
    curve(bottom, "temperature_ratio", "T / T_c", "tab:orange")
    bottom.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="above: the bank\ncollapses")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))
    bottom.set_ylabel("T / T_c, log scale")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set_xlabel("optimizer step")
    for axis in (top, middle, bottom):
        _finish(axis)
    return figure


COURSES = {
    "codes in use": {
        "perplexity": "perplexity / K",
        "usage": "share in use",
        "explained": "variance of the probe's\nfirst embeddings explained",
    },
    "directions, relative to the best": {"token_rank": "rank of the tokens", "code_rank": "rank of the codes"},
    "distances over the tokens' spread": {
        "separation": "closest pair of codes",
        "commitment": "token to code, squared",
    },
}


def draw_course(
    readings: Sequence[dict[str, float]],
    moments: Sequence[tuple[float, str, bool]],
    title: str,
) -> Figure:
    """Signals of any codebook over steps, with the moments of its notices and alarms.

    Args:
        readings: Numbers with ``step`` and ``num_codes``, as :class:`~ddcl_lightning.CollapseWarning` keeps them.
        moments: Step, sign, and whether it was an alarm.
        title: Name of the codebook.
    """
    figure = figure_with_legends(10, 8, top=0.8)
    axes = figure.subplots(len(COURSES), 1, sharex=True)
    for axis, (label, names) in zip(axes, COURSES.items(), strict=True):
        for name, text in names.items():
            points = [(reading["step"], _scaled(name, reading)) for reading in readings if name in reading]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            best = max(values) if name.endswith("rank") else 1.0
            marker = "o" if len(points) < 20 else ""
            axis.plot(steps, [value / best for value in values], label=text, marker=marker, markersize=4)
        for number, (step, sign, alarm) in enumerate(moments):
            axis.axvline(step, color="tab:red" if alarm else "gray", linestyle="-" if alarm else ":", linewidth=1.2)
            if axis is axes[0]:
                axis.annotate(
                    f"{'ALARM: ' if alarm else ''}{sign}",
                    (step, 1.02 + 0.06 * (number % 3)),
                    xycoords=("data", "axes fraction"),
                    fontsize="small",
                    color="tab:red" if alarm else "gray",
                )
        axis.set_ylim(bottom=0)
        axis.set_ylabel(label, fontsize="small")
        if axis.get_legend_handles_labels()[0]:  # the moments have none
            _finish(axis)
    figure.suptitle(f"Health of {title}", x=0.01, ha="left")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[-1].set_xlabel("optimizer step")
    return figure


def _scaled(name: str, reading: dict[str, float]) -> float:
    return reading[name] / reading["num_codes"] if name == "perplexity" else reading[name]


def draw_bank(tokens: Tensor, prototypes: Tensor, title: str) -> Figure:
    """Prototypes over tokens in the tokens' first two principal components.

    Args:
        tokens: ``(N, d)`` float32 on the CPU; at most 2,000 of them are drawn.
        prototypes: ``(K, d)`` float32 on the CPU.
        title: Name of the bank.
    """
    shown = evenly_spaced(tokens, MAX_POINTS)
    codes = nearest_prototype(shown, prototypes)
    mean = shown.mean(0)
    _, singular, directions = torch.linalg.svd(shown - mean, full_matrices=False)
    plane = directions[:2] if len(directions) > 1 else torch.cat([directions, torch.zeros_like(directions)])
    share = float(singular[:2].square().sum() / singular.square().sum().clamp(min=1e-30))
    points, centers = (shown - mean) @ plane.T, (prototypes - mean) @ plane.T

    figure = figure_with_legends(10, 6.5)
    axis = figure.subplots()
    axis.scatter(points[:, 0], points[:, 1], c=codes % 20, cmap="tab20", vmin=0, vmax=19, s=7, alpha=0.55, linewidths=0)
    axis.scatter([], [], c="gray", s=20, label="token, in the colour\nof its prototype")
    used = torch.bincount(codes, minlength=len(prototypes)) > 0
    numbered = len(prototypes) <= MAX_LABELS
    for chosen, edge, label in (
        (used, "black", "prototype"),
        (~used, "red", "prototype nearest to\nnone of these tokens"),
    ):
        if bool(chosen.any()):
            x, y = centers[chosen].T
            axis.scatter(x, y, s=170 if numbered else 30, c="white", edgecolors=edge, linewidths=1.5, label=label)
    if numbered:
        for number, (x, y) in enumerate(centers.tolist()):
            axis.annotate(str(number), (x, y), ha="center", va="center", fontsize=8, weight="bold")
    axis.set_title(f"{title}: K = {len(prototypes)} prototypes over {len(shown)} tokens", loc="left")
    axis.set_xlabel(f"first principal component (both: {share:.0%} of the variance)")
    axis.set_ylabel("second principal component")
    _finish(axis)
    return figure


def draw_usage(
    counts: Tensor, mass: Tensor | None, title: str, *, noun: str = "prototype", tokens: str = "the last batch's tokens"
) -> Figure:
    """Share of tokens per prototype, hard (bars) and soft (dots), sorted by use.

    Args:
        counts: Tokens nearest to each prototype, ``(K,)``.
        mass: Mean soft assignment, ``(K,)``; None draws the bars alone.
        title: Name of the bank.
        noun: What the K are called.
        tokens: Whose shares these are.
    """
    size = len(counts)
    share = counts.float() / counts.sum().clamp(min=1)
    order = share.argsort(descending=True)
    dead = int((counts == 0).sum())
    probabilities = share[share > 0]
    perplexity = float((-(probabilities * probabilities.log()).sum()).exp())
    figure = figure_with_legends(10, 4)
    axis = figure.subplots()
    axis.bar(range(size), share[order].tolist(), color="tab:blue", alpha=0.6, label=f"nearest {noun}\n(hard)")
    if mass is not None:
        axis.plot(range(size), mass[order].tolist(), "o", color="black", markersize=3, label="mean assignment\n(soft)")
    axis.axhline(1 / size, color="black", linewidth=0.8, linestyle="--", label="even use")
    if size <= MAX_LABELS:
        axis.set_xticks(range(size), [str(int(k)) for k in order], fontsize=8)
        axis.set_xlabel(f"number of the {noun}, sorted by use")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(f"rank of the {noun} by use")
    axis.set_ylabel(f"share of {tokens}")
    axis.set_title(f"{title}: {size - dead} of {size} {noun}s used, perplexity {perplexity:.1f}", loc="left")
    _finish(axis)
    return figure


def _finish(axis: Axes) -> None:
    """Put the legend beside the data, where it hides nothing."""
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
