"""Figures of a prototype bank. Each function returns a matplotlib Figure and touches no global state."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ddcl_lightning.functional import nearest_prototype

MAX_POINTS = 2000
MAX_LABELS = 40  # numbers written beside prototypes or bars before they hide the picture


def draw_history(points: Sequence[dict[str, float]], title: str) -> Figure:
    """Separation, entropy and T / T_c over optimizer steps, one panel each with its line of danger.

    Args:
        points: Readings with ``step``, ``delta_min``, ``delta_mean``, ``embedding_scale``, ``entropy_ratio`` and
            ``temperature_ratio``.
        title: Name of the bank.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    steps = [point["step"] for point in points]

    def curve(axis: "object", key: str, label: str, color: str) -> None:
        axis.plot(steps, [point[key] for point in points], label=label, color=color)  # type: ignore[attr-defined]

    curve(top, "delta_mean", "mean distance between prototypes", "tab:blue")
    curve(top, "delta_min", "Delta, smallest distance", "tab:red")
    top.plot(steps, [point["embedding_scale"] for point in points], ":", color="gray", label="spread of the embeddings")
    top.set_ylim(bottom=0)
    top.set_ylabel("distance")
    top.set_title(f"Health of {title}", loc="left")
    curve(middle, "entropy_ratio", "H / ln K", "tab:purple")
    middle.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="uniform: assignments say nothing")
    middle.set_ylim(0, 1.08)
    middle.set_ylabel("entropy of assignments")
    curve(bottom, "temperature_ratio", "T / T_c", "tab:orange")
    bottom.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="above: the bank collapses")
    bottom.set_yscale("log")
    bottom.set_ylabel("temperature / critical")
    bottom.set_xlabel("optimizer step")
    for axis in (top, middle, bottom):
        axis.legend(loc="best", fontsize="small", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_bank(tokens: Tensor, prototypes: Tensor, title: str) -> Figure:
    """Prototypes over tokens in the tokens' first two principal components.

    Args:
        tokens: ``(N, d)`` float32 on the CPU; at most 2,000 of them are drawn.
        prototypes: ``(K, d)`` float32 on the CPU.
        title: Name of the bank.
    """
    shown = tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), MAX_POINTS)).long()]
    codes = nearest_prototype(shown, prototypes)
    mean = shown.mean(0)
    _, singular, directions = torch.linalg.svd(shown - mean, full_matrices=False)
    plane = directions[:2] if len(directions) > 1 else torch.cat([directions, torch.zeros_like(directions)])
    share = float(singular[:2].square().sum() / singular.square().sum().clamp(min=1e-30))
    points, centers = (shown - mean) @ plane.T, (prototypes - mean) @ plane.T

    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axis = figure.subplots()
    axis.scatter(points[:, 0], points[:, 1], c=codes % 20, cmap="tab20", vmin=0, vmax=19, s=7, alpha=0.55, linewidths=0)
    used = torch.bincount(codes, minlength=len(prototypes)) > 0
    axis.scatter(
        centers[used, 0], centers[used, 1], marker="o", s=170, c="white", edgecolors="black", label="prototype"
    )
    if bool((~used).any()):
        axis.scatter(
            centers[~used, 0],
            centers[~used, 1],
            marker="X",
            s=150,
            c="red",
            edgecolors="black",
            label="prototype nearest to none of these tokens",
        )
    if len(prototypes) <= MAX_LABELS:
        for number, (x, y) in enumerate(centers.tolist()):
            axis.annotate(str(number), (x, y), ha="center", va="center", fontsize=8, weight="bold")
    axis.set_title(f"{title}: {len(prototypes)} prototypes over {len(shown)} tokens", loc="left")
    axis.set_xlabel(f"first principal component (both: {share:.0%} of the variance)")
    axis.set_ylabel("second principal component")
    axis.legend(loc="best", fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_usage(counts: Tensor, mass: Tensor, title: str) -> Figure:
    """Share of tokens per prototype, hard (bars) and soft (dots), sorted by use.

    Args:
        counts: Tokens nearest to each prototype, ``(K,)``.
        mass: Mean soft assignment, ``(K,)``.
        title: Name of the bank.
    """
    size = len(counts)
    share = counts.float() / counts.sum().clamp(min=1)
    order = share.argsort(descending=True)
    dead = int((counts == 0).sum())
    probabilities = share[share > 0]
    perplexity = float((-(probabilities * probabilities.log()).sum()).exp())
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(size), share[order], color="tab:blue", label="nearest prototype (hard)", width=0.85)
    axis.plot(range(size), mass[order], "o", color="tab:orange", markersize=4, label="mean assignment (soft)")
    axis.axhline(1 / size, color="black", linewidth=0.8, linestyle="--", label="even use")
    if size <= MAX_LABELS:
        axis.set_xticks(range(size), [str(int(k)) for k in order], fontsize=8)
        axis.set_xlabel("prototype, by use")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("prototypes, by use")
    axis.set_ylabel("share of the last batch's tokens")
    axis.set_title(f"{title}: {size - dead} of {size} prototypes used, perplexity {perplexity:.1f}", loc="left")
    axis.legend(fontsize="small", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
