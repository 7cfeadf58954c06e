"""Attention pooling against the formulas of Yang et al. 2016 and Lin et al. 2017."""

import pytest
import torch

from ddcl_lightning.heads import AttentionPooling, MeanPooling

TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()


@pytest.mark.parametrize("num_heads", [1, 3])
def test_follows_the_formula(num_heads: int) -> None:
    head = AttentionPooling(num_heads, dim=4, embed_dim=6)
    pooled = head(TOKENS, MASK).pooled
    assert pooled.shape == (3, head.pooled_dim) == (3, 6 * num_heads)
    for i in range(3):
        z = TOKENS[i, MASK[i]]
        u = torch.tanh(z @ head.hidden.weight.mT + head.hidden.bias)
        a = torch.softmax(head.queries.weight @ u.mT, -1)  # (H, T)
        torch.testing.assert_close(pooled[i], (a @ z).flatten())


def test_weights_are_a_distribution_over_valid_tokens() -> None:
    weights = AttentionPooling(2, embed_dim=6).weights(TOKENS, MASK)
    assert weights.shape == (3, 2, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2))
    assert bool((weights[~MASK.unsqueeze(1).expand(-1, 2, -1)] == 0).all())
    assert bool((weights[MASK.unsqueeze(1).expand(-1, 2, -1)] > 0).all())


def test_without_a_query_it_is_the_mean() -> None:
    head = AttentionPooling(embed_dim=6)
    torch.nn.init.zeros_(head.queries.weight)
    torch.testing.assert_close(head(TOKENS, MASK).pooled, MeanPooling(embed_dim=6)(TOKENS, MASK).pooled)


def test_attention_pooling_refuses_sizes_of_zero() -> None:
    with pytest.raises(ValueError, match="num_heads must be at least 1; got 0"):
        AttentionPooling(0)
    with pytest.raises(ValueError, match="dim must be at least 1, or None; got 0"):
        AttentionPooling(dim=0)
