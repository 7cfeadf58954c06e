"""Measures of faithfulness against toys whose curves are computed by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from ddcl_lightning import DDCLReadout
from ddcl_lightning.explain.faithfulness import area, deletion_curves, insertion_curves, knock_out_falls, measure
from ddcl_lightning.explain.token_scores import (
    contribution_scores,
    gradient_times_input,
    leave_one_out,
    margins,
    prototype_scores,
    readout_logits,
    weight_scores,
)
from ddcl_lightning.heads import AttentionPooling, PMAPooling
from tests.tiny import absolute


def sums(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (sum of the valid tokens, 0)."""
    valid = tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
    first = valid.sum((1, 2))
    return torch.stack([first, torch.zeros_like(first)], -1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


TOKENS = torch.tensor([[[3.0], [-1.0], [2.0], [9.0]]])  # the last one is padding
MASK = torch.tensor([[True, True, True, False]])
CLASS = torch.tensor([0])


def test_deletion_takes_the_largest_scores_out_first() -> None:
    curve = deletion_curves(sums, TOKENS, MASK, TOKENS[..., 0], CLASS, steps=2)
    expected = [sigmoid(4.0), sigmoid(1.0), sigmoid(-1.0)]  # all; without 3; without 3 and 2
    torch.testing.assert_close(curve, torch.tensor([expected], dtype=torch.float64))
    assert float(area(curve)) == pytest.approx((expected[0] + expected[2]) / 4 + expected[1] / 2)


def test_insertion_puts_the_largest_scores_in_first() -> None:
    curve = insertion_curves(sums, TOKENS, MASK, TOKENS[..., 0], CLASS, steps=2)
    torch.testing.assert_close(curve, torch.tensor([[sigmoid(3.0), sigmoid(5.0), sigmoid(4.0)]], dtype=torch.float64))


def test_scores_of_padding_and_infinite_ones_change_nothing() -> None:
    scores = torch.tensor([[3.0, -torch.inf, 2.0, torch.inf]])
    same = torch.tensor([[3.0, -1.0, 2.0, 0.0]])
    for curves in (deletion_curves, insertion_curves):
        assert torch.equal(curves(sums, TOKENS, MASK, scores, CLASS), curves(sums, TOKENS, MASK, same, CLASS))


def test_more_steps_than_tokens_repeat_points() -> None:
    curve = deletion_curves(sums, TOKENS, MASK, TOKENS[..., 0], CLASS, steps=10)
    assert curve.shape == (1, 11)
    assert sorted({round(float(value), 6) for value in curve[0]}) == sorted(
        round(sigmoid(x), 6) for x in (4.0, 1.0, -1.0)
    )


def test_wrong_scores_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores must have one number per token, shape \(1, 4\); got \(1, 3\)"):
        deletion_curves(sums, TOKENS, MASK, torch.zeros(1, 3), CLASS)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        deletion_curves(sums, TOKENS, MASK, torch.full((1, 4), torch.nan), CLASS)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        deletion_curves(sums, TOKENS, MASK, torch.zeros(1, 4), CLASS, steps=0)


def test_scores_of_a_sum_are_its_terms() -> None:
    expected = torch.tensor([[3.0, -1.0, 2.0, 0.0]])
    torch.testing.assert_close(gradient_times_input(sums, TOKENS, MASK, CLASS), expected)
    torch.testing.assert_close(leave_one_out(sums, TOKENS, MASK, CLASS), expected)
    torch.testing.assert_close(gradient_times_input(sums, TOKENS, MASK, torch.tensor([1]), CLASS), -expected)
    torch.testing.assert_close(leave_one_out(sums, TOKENS, MASK, torch.tensor([1]), CLASS), -expected)
    alone = torch.tensor([[True, False, False, False]])
    assert not bool(leave_one_out(sums, TOKENS, alone, CLASS).any())


def hard_histogram() -> tuple[DDCLReadout, nn.Linear]:
    """Head with prototypes at 0, 10 and 20 that counts tokens: the first speaks for class 0, the others for class 1."""
    head = DDCLReadout(3, pooling="histogram", temperature=absolute(1e-3), embed_dim=1).eval()
    head.attention.bank.set_prototypes(torch.tensor([[[0.0], [10.0], [20.0]]]))
    classifier = nn.Linear(3, 2)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        classifier.bias.zero_()
    return head, classifier


def test_contributions_weights_and_knock_outs_of_a_toy() -> None:
    head, classifier = hard_histogram()
    tokens = torch.tensor([[[0.0], [0.0], [10.0], [20.0]]])
    scores = contribution_scores(head, classifier, tokens, None, CLASS, torch.tensor([1]))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 2.0, -1.0, 0.0]]))
    by_prototype = prototype_scores(head, classifier, tokens, None, CLASS, torch.tensor([1]))
    torch.testing.assert_close(by_prototype, torch.tensor([[[4.0, -1.0, 0.0]]]))
    torch.testing.assert_close(weight_scores(head, tokens, None), torch.full((1, 4), 0.25))
    falls = knock_out_falls(head, classifier, tokens, None, CLASS, torch.tensor([1]))
    # Margin 4 - 1; without the first its two tokens count for the second, 0 - 3; without the second for a neighbour.
    assert float(falls[0, 0, 0]) == pytest.approx(3 - (0 - 3))
    assert float(falls[0, 0, 2]) == pytest.approx(3 - (4 - 2))
    assert float(margins(readout_logits(head, classifier)(tokens, None), CLASS).detach()) == pytest.approx(4.0)


def test_weights_of_attention_are_the_mean_over_its_queries() -> None:
    head = AttentionPooling(num_heads=2, embed_dim=1).eval()
    weights = weight_scores(head, TOKENS, MASK)
    torch.testing.assert_close(weights, head.weights(TOKENS, MASK).mean(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(1))
    assert float(weights[0, 3]) == 0.0
    with pytest.raises(ValueError, match="head must return one weight per token; PMAPooling does not"):
        weight_scores(PMAPooling(num_heads=1, embed_dim=1), TOKENS, MASK)


def test_measure_agrees_with_its_pieces() -> None:
    head, classifier = hard_histogram()
    tokens = torch.tensor([[0.0], [0.0], [10.0], [20.0]])
    faithfulness = measure(head, classifier, [(tokens, None)] * 40 + [(tokens[:1], None)], steps=3)
    assert (faithfulness.samples, faithfulness.knock_out_samples, faithfulness.tokens) == (40, 41, 4.0)
    assert faithfulness.deletion is not None
    assert faithfulness.insertion is not None
    assert faithfulness.knock_out is not None
    curve = [sigmoid(3.0), sigmoid(8 / 3 - 4 / 3), sigmoid(-2.0), sigmoid(-4.0)]
    assert faithfulness.deletion.value == pytest.approx((sum(curve) - (curve[0] + curve[3]) / 2) / 3)
    assert faithfulness.deletion.value < faithfulness.deletion.random
    assert faithfulness.deletion.better
    assert faithfulness.insertion.better
    assert faithfulness.knock_out.better
    assert measure(head, classifier, [(tokens, None)] * 40 + [(tokens[:1], None)], steps=3) == faithfulness


def test_contributions_that_are_wrong_are_no_better_than_chance() -> None:
    """The measure can fail: the terms of another classifier say nothing about this one."""
    head, classifier = hard_histogram()

    class Liar(DDCLReadout):
        def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
            return -super().contributions(tokens, mask, classifier)

    liar = Liar(3, pooling="histogram", temperature=absolute(1e-3), embed_dim=1).eval()
    liar.load_state_dict(head.state_dict())
    tokens = torch.tensor([[0.0], [0.0], [10.0], [20.0]])
    faithfulness = measure(liar, classifier, [(tokens, None)] * 40)
    for comparison in (faithfulness.deletion, faithfulness.insertion, faithfulness.knock_out):
        assert comparison is not None
        assert not comparison.better


def test_lengths_of_samples_may_differ() -> None:
    head, classifier = hard_histogram()
    short = (torch.tensor([[0.0], [10.0]]), None)
    long = (torch.tensor([[0.0], [0.0], [10.0], [99.0]]), torch.tensor([True, True, True, False]))
    together = measure(head, classifier, [short, long])
    assert together.tokens == 2.5
    alone = [measure(head, classifier, [sample]).deletion for sample in (short, long)]
    assert together.deletion is not None
    assert together.deletion.value == pytest.approx(sum(each.value for each in alone if each) / 2)


def test_one_token_per_sample_has_knock_outs_alone() -> None:
    head = DDCLReadout(3, pooling="both", tokens="mean", embed_dim=4).eval()
    classifier = nn.Linear(head.pooled_dim, 3)
    faithfulness = measure(head, classifier, [(torch.randn(5, 4), None)] * 3)
    assert (faithfulness.samples, faithfulness.deletion, faithfulness.insertion) == (0, None, None)
    assert faithfulness.knock_out_samples == 3
