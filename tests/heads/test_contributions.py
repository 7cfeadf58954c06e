"""What tokens and prototypes add to a classifier's logits: exact sums, for every head that has them."""

import itertools
from typing import Any

import pytest
import torch
from registry import DIM
from test_head_contract import batch, built, each_head
from torch import nn

from ddcl_lightning import DDCLReadout
from ddcl_lightning.heads import HierarchicalReadout, MeanPooling

# Summaries that are no sums over tokens and prototypes; all others must have contributions.
NO_SUM = ("PMAPooling", "PerceiverPooling", "SlotAttentionPooling", "ResidualVQ", "FurthestToken", "NormPooling")
NO_SUM_OPTIONS = ("hidden_dim=", "SoftVQ num_heads=2")
WEIGHTED = [
    {"pooling": pooling, "num_heads": heads, "token_weights": weights, "tokens": tokens, "residual": residual}
    for pooling, heads, weights, tokens, residual in itertools.product(
        ("centroid", "histogram", "both", "slots", "tokens", "tokens_histogram"),
        (1, 2),
        ("uniform", "salience", "mass"),
        ("all", "mean"),
        (False, True),
    )
    if not (residual and pooling not in ("centroid", "both"))
    and not (weights != "uniform" and (pooling == "slots" or tokens != "all"))
]


@each_head
def test_contributions_sum_to_the_logits(name: str) -> None:
    head = built(name).eval()
    tokens, mask = batch()
    classifier = nn.Linear(head.pooled_dim, 3)
    if name.startswith(NO_SUM) or any(option in name for option in NO_SUM_OPTIONS):
        with pytest.raises(ValueError, match="no exact contributions"):
            head.contributions(tokens, mask, classifier)
        return
    if isinstance(head, HierarchicalReadout) and head.pooling == "all":
        with pytest.raises(ValueError, match="level_contributions"):
            head.contributions(tokens, mask, classifier)
        levels = head.level_contributions(tokens, mask, classifier)
        total = torch.stack([terms.sum((1, 2, 3)) for terms in levels]).sum(0)
        torch.testing.assert_close(total + classifier.bias, classifier(head(tokens, mask).pooled))
        return
    dirty = tokens.masked_fill(~mask.unsqueeze(-1), torch.nan)
    for inputs, valid in ((dirty, mask), (tokens, None)):
        terms = head.contributions(inputs, valid, classifier)
        assert terms.dim() == 5
        expected = classifier(head(inputs, valid).pooled)
        torch.testing.assert_close(terms.sum((1, 2, 3)) + classifier.bias, expected, rtol=1e-4, atol=1e-5)
        if valid is not None and terms.shape[1] == valid.shape[1]:
            assert not bool(terms[~valid].any())


@pytest.mark.parametrize("options", WEIGHTED, ids=lambda options: " ".join(map(str, options.values())))
def test_every_pooling_of_prototypes_is_a_sum(options: dict[str, Any]) -> None:
    head = DDCLReadout(5, prototype_dim=3, embed_dim=DIM, **options).eval()
    tokens, mask = batch()
    classifier = nn.Linear(head.pooled_dim, 3)
    readout = head(tokens, mask)
    terms = head.contributions(tokens, mask, classifier)
    assert terms.shape == (4, 1 if options["tokens"] == "mean" else 6, options["num_heads"], 5, 3)
    torch.testing.assert_close(terms.sum((1, 2, 3)) + classifier.bias, classifier(readout.pooled), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(readout.token_weights.sum(1), torch.ones(4))
    torch.testing.assert_close(readout.assignments.sum(-1), torch.ones(4, options["num_heads"]))


@pytest.mark.parametrize("weights", ["salience", "mass"])
def test_token_weights_are_their_definition(weights: Any) -> None:
    head = DDCLReadout(5, 2, 3, pooling="histogram", token_weights=weights, embed_dim=DIM).eval()
    tokens, mask = batch()
    readout = head(tokens, mask)
    layer = head.attention(tokens, mask, need_weights=True)
    assert head.weighting is not None
    scores = head.weighting.scores
    for i in range(4):
        q = layer.weights[i, :, mask[i]]  # (H, T, K)
        if weights == "salience":
            a = torch.einsum("htk,hk->t", q, scores).softmax(0)
        else:
            a = torch.einsum("htk,hk->ht", q, scores.exp()).prod(0)
            a = a / a.sum()
        torch.testing.assert_close(readout.token_weights[i, mask[i]], a)
        torch.testing.assert_close(readout.pooled[i], torch.einsum("t,htk->hk", a, q).flatten())
        assert not bool(readout.token_weights[i, ~mask[i]].any())


def test_heads_that_cannot_take_a_prototype_out_say_none() -> None:
    head = MeanPooling(embed_dim=DIM).eval()
    assert head.logits_without(*batch(), nn.Linear(head.pooled_dim, 3)) is None


@pytest.mark.parametrize("pooling", ["centroid", "histogram", "both", "slots", "tokens_histogram"])
def test_a_prototype_that_is_left_out_gives_its_tokens_to_the_others(pooling: Any) -> None:
    head = DDCLReadout(5, 2, 3, pooling=pooling, embed_dim=DIM).eval()
    tokens, mask = batch()
    classifier = nn.Linear(head.pooled_dim, 3)
    without = head.logits_without(tokens, mask, classifier)
    assert without is not None
    assert without.shape == (4, 2, 5, 3)
    far = DDCLReadout(5, 2, 3, pooling=pooling, embed_dim=DIM).eval()
    far.load_state_dict(head.state_dict())
    with torch.no_grad():
        far.attention.bank.prototypes[1, 2] = 100.0
        if pooling == "slots":  # the slot of a prototype that is far from all tokens is still one of them
            classifier.weight.unflatten(-1, (2, 5, 3))[:, 1, 2] = 0.0
            without = head.logits_without(tokens, mask, classifier)
        torch.testing.assert_close(without[:, 1, 2], classifier(far(tokens, mask).pooled), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", WEIGHTED, ids=lambda options: " ".join(map(str, options.values())))
def test_what_pools_assignments_does_not_tell_tokens_apart(options: dict[str, Any]) -> None:
    """Mirror images, at equal distances from all prototypes, are one sample to such a head, and two to another."""
    head = DDCLReadout(5, prototype_dim=3, embed_dim=DIM, **options).eval()
    tokens, mask = batch()
    with torch.no_grad():
        head.attention.input_projection = nn.Linear(DIM, 3 * options["num_heads"], bias=False)
        head.attention.input_projection.weight.copy_(torch.eye(3 * options["num_heads"], DIM))
        head.attention.bank.prototypes[..., 0] = 0.0
    mirrored = tokens.clone()
    mirrored[..., [h * 3 for h in range(options["num_heads"])]] *= -1
    readouts = [head(inputs, mask) for inputs in (tokens, mirrored)]
    torch.testing.assert_close(readouts[0].assignments, readouts[1].assignments)
    assert torch.allclose(readouts[0].pooled, readouts[1].pooled, atol=1e-5) is head.pools_assignments


def test_wrong_classifiers_are_named() -> None:
    head = MeanPooling(embed_dim=DIM)
    with pytest.raises(ValueError, match=r"classifier must read pooled_dim = 8 numbers; got in_features = 5"):
        head.contributions(*batch(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"classifier must be an nn.Linear.* got Sequential"):
        head.contributions(*batch(), nn.Sequential(nn.Linear(DIM, 2)))  # type: ignore[arg-type]
