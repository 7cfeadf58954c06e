"""Figures can be drawn of any bank, and say what they show. (What they look like was looked at by a person.)"""

import io
import math
from collections.abc import Callable

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddcl_lightning.functional import assignment_statistics
from ddcl_lightning.monitoring.plots import MAX_LABELS, MAX_POINTS, draw_bank, draw_course, draw_history, draw_usage


def render(figure: Figure) -> str:
    """All text of a figure, after it was really drawn."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    words = []
    for axis in figure.axes:
        words += [axis.get_title("left"), axis.get_xlabel(), axis.get_ylabel()]
        words += [text.get_text() for text in axis.texts]
        legend = axis.get_legend()
        words += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(words).replace("\n", " ")


def points(n: int, **changes: float) -> list[dict[str, float]]:
    reading = {
        "delta_min": 1.0,
        "delta_mean": 2.0,
        "embedding_scale": 3.0,
        "entropy_ratio": 0.5,
        "used_in_batch": 0.75,
        "temperature_ratio": 0.1,
    }
    return [{"step": 10.0 * i, **reading, **changes} for i in range(n)]


@pytest.mark.parametrize("n", [1, 5, 500])
def test_history_shows_every_signal(n: int) -> None:
    text = render(draw_history(points(n), "head.bank"))
    for phrase in ("Health of head.bank", "T / T_c", "H / ln K", "optimizer step", "above: the bank collapses"):
        assert phrase in text
    assert "undefined" not in text


def test_history_shows_a_single_reading() -> None:
    for axis in draw_history(points(1), "bank").axes:
        assert axis.lines[0].get_marker() == "o"  # a line through one point is invisible


def test_history_of_one_prototype_says_what_is_undefined() -> None:
    nothing = points(30, delta_min=math.inf, delta_mean=math.nan, entropy_ratio=math.nan, temperature_ratio=math.inf)
    assert render(draw_history(nothing, "bank")).count("(undefined here)") == 4


def course(n: int) -> list[dict[str, float]]:
    reading = {"num_codes": 8.0, "perplexity": 6.0, "usage": 1.0, "separation": 0.5, "commitment": 0.3}
    known = {"token_rank": 7.0, "code_rank": 5.0}
    return [{"step": 10.0 * i, **reading, **(known if i > 1 else {})} for i in range(n)]


@pytest.mark.parametrize("n", [1, 5, 500])
def test_course_shows_its_signals_with_the_moments_of_notices_and_alarms(n: int) -> None:
    moments = [(0.0, "merged", False), (20.0, "falling", False), (30.0, "falling", True)]
    figure = draw_course(course(n), moments, "quantizer.level0")
    text = render(figure)
    for phrase in (
        "optimizer step",
        "perplexity / K",
        "share in use",
        "closest pair of codes",
        "merged",
        "ALARM: falling",
    ):
        assert phrase in text
    assert figure.get_suptitle() == "Health of quantizer.level0"
    assert "explained" not in text  # there was no probe
    for axis in figure.axes:
        vertical = [line for line in axis.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
        assert sum(line.get_color() == "tab:red" and line.get_linestyle() == "-" for line in vertical) == 1
        assert sum(line.get_color() == "gray" and line.get_linestyle() == ":" for line in vertical) == 2


def test_course_scales_perplexity_by_the_number_of_codes_and_ranks_by_their_best() -> None:
    top, middle, _ = draw_course(course(30), [], "bank").axes
    assert top.lines[0].get_ydata()[0] == pytest.approx(6 / 8)
    assert middle.lines[0].get_xdata()[0] == 20.0  # known from there on
    assert max(middle.lines[0].get_ydata()) == 1.0


def test_course_without_a_reading_can_be_drawn() -> None:
    assert render(draw_course([], [], "bank"))


@pytest.mark.parametrize("dim", [1, 2, 16])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_bank_plot_shows_tokens_and_prototypes(size: int, dim: int) -> None:
    tokens, prototypes = torch.randn(300, dim), torch.randn(size, dim)
    text = render(draw_bank(tokens, prototypes, "head.bank"))
    assert f"head.bank: K = {size} prototypes over 300 tokens" in text
    assert ("(both: 100% of the variance)" in text) == (dim <= 2)
    if size <= MAX_LABELS:
        assert str(size - 1) in text


def test_bank_marks_prototypes_that_no_token_is_near() -> None:
    tokens, prototypes = torch.randn(50, 4), torch.randn(6, 4)
    prototypes[4:] += 100
    assert "nearest to none of these tokens" in render(draw_bank(tokens, prototypes, "bank"))
    assert "nearest to none" not in render(draw_bank(tokens, tokens[:3], "bank"))


@pytest.mark.parametrize("tokens", [torch.randn(1, 3), torch.ones(9, 3), torch.randn(MAX_POINTS + 500, 3)])
def test_bank_over_few_equal_or_many_tokens(tokens: Tensor) -> None:
    assert f"over {min(len(tokens), MAX_POINTS)} tokens" in render(draw_bank(tokens, torch.randn(2, 3), "bank"))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_usage_plot_counts_used_prototypes(size: int) -> None:
    tokens, prototypes = torch.randn(500, 4), torch.randn(size, 4)
    prototypes[3:5] += 100  # dead
    use = assignment_statistics(tokens, prototypes, 0.5)
    text = render(draw_usage(use.counts, use.mass, "head.bank"))
    used = int((use.counts > 0).sum())
    shares = use.counts[use.counts > 0] / 500
    perplexity = float((-(shares * shares.log()).sum()).exp())
    assert f"head.bank: {used} of {size} prototypes used, perplexity {perplexity:.1f}" in text
    assert used < size or size == 1


def test_usage_of_hard_codes() -> None:
    figure = draw_usage(torch.tensor([1, 5, 0]), None, "book", noun="code", tokens="the validation tokens")
    text = render(figure)
    assert "book: 2 of 3 codes used" in text
    assert "share of the validation tokens" in text
    assert "soft" not in text


def test_usage_is_sorted() -> None:
    axis = draw_usage(torch.tensor([1, 5, 2]), torch.tensor([0.2, 0.5, 0.3]), "bank").axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0.625, 0.25, 0.125]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "0"]
    soft = next(line for line in axis.lines if len(line.get_xdata()) == 3)
    assert list(soft.get_ydata()) == pytest.approx([0.5, 0.3, 0.2])


FIGURES: dict[str, Callable[[], Figure]] = {
    "history": lambda: draw_history(points(30, delta_mean=1.2e5, temperature_ratio=1e-3), "head.bank/head1"),
    "undefined history": lambda: draw_history(points(3, delta_min=math.inf, entropy_ratio=math.nan), "head.bank"),
    "course": lambda: draw_course(
        [{**reading, "explained": 0.5} for reading in course(30)],
        [(0.0, "merged", False), (120.0, "flat_codes", False), (130.0, "falling", True)],
        "quantizer.level0",
    ),
    "bank": lambda: draw_bank(torch.randn(50, 4), torch.cat([torch.randn(2, 4), torch.full((1, 4), 9e4)]), "bank"),
    "usage": lambda: draw_usage(torch.arange(MAX_LABELS), torch.rand(MAX_LABELS), "head.bank"),
    "usage of many": lambda: draw_usage(torch.arange(300), None, "head.bank"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_and_no_legend_hides_what_is_drawn(name: str) -> None:
    figure = FIGURES[name]()
    render(figure)
    whole = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(whole.x0, whole.y0) >= 0
    assert whole.x1 <= width
    assert whole.y1 <= height
    for axis in figure.axes:
        assert not axis.get_legend().get_window_extent().overlaps(axis.bbox)
    titles = [text.get_window_extent() for text in figure.texts]
    moments = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() in ("merged",)]
    assert not any(title.overlaps(moment) for title in titles for moment in moments)
