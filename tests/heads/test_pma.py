"""PMA against the Set Transformer's equations, written out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ddcl_lightning.heads import PMAPooling

TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()


def written_out(head: PMAPooling, tokens: Tensor, mask: Tensor) -> Tensor:
    """``MAB(S, rFF(Z))`` (eq. 6, 7, 11) by einsum, ``(B, k, d)``."""
    block, heads = head.block, head.num_heads
    d = head.seeds.shape[-1]
    z = torch.relu(head.feed_forward(tokens))
    w_q, w_k, w_v = block.attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = block.attention.in_proj_bias.chunk(3)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, d // heads))

    q, k, v = split(head.seeds[0] @ w_q.mT + b_q), split(z @ w_k.mT + b_k), split(z @ w_v.mT + b_v)
    scores = torch.einsum("shc,bthc->bhst", q, k) / (d // heads) ** 0.5
    weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
    read = torch.einsum("bhst,bthc->bshc", weights, v).flatten(-2)
    read = read @ block.attention.out_proj.weight.mT + block.attention.out_proj.bias
    h = layer_norm(head.seeds + read, (d,), block.norm_attention.weight, block.norm_attention.bias)
    rff = torch.relu(h @ block.feed_forward.weight.mT + block.feed_forward.bias)
    return layer_norm(h + rff, (d,), block.norm_output.weight, block.norm_output.bias)


@pytest.mark.parametrize(("num_heads", "dim"), [(1, None), (2, 4), (4, 8)])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_follows_the_equations(num_heads: int, dim: int | None, num_seeds: int) -> None:
    for pooling in ("flatten", "mean"):
        head = PMAPooling(num_seeds, num_heads, pooling, dim=dim, embed_dim=6)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)  # torch starts biases at zero, which would hide them
        seeds = written_out(head, TOKENS, MASK)
        expected = seeds.flatten(1) if pooling == "flatten" else seeds.mean(1)
        pooled = head(TOKENS, MASK).pooled
        assert pooled.shape == (3, head.pooled_dim)
        torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "num_seeds must be at least 1; got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"num_heads": 4}, r"dim \(by default embed_dim\) must be a multiple of num_heads = 4; got 6"),
        ({"num_heads": 4, "dim": 10}, "must be a multiple of num_heads = 4; got 10"),
    ],
)
def test_pma_pooling_refuses_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMAPooling(**{"embed_dim": 6, **options})
