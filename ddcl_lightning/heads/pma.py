"""Pooling by multi-head attention, from the Set Transformer."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.heads.pooling import PoolingHead
from ddcl_lightning.heads.width import check_width

SeedPooling = Literal["flatten", "mean"]


class MultiheadAttentionBlock(nn.Module):
    """``MAB(X, Y) = LayerNorm(H + rFF(H))`` with ``H = LayerNorm(X + Multihead(X, Y, Y))`` (Lee et al. 2019, eq. 6, 7).

    The row-wise layer is ``relu(W h + b)``, as in the authors' code.

    Args:
        dim: Width of X and Y.
        num_heads: Heads of the attention; must divide ``dim``.
    """

    @typed
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm_attention, self.norm_output = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed_forward = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries ``(B, k, d)`` that have read keys ``(B, T, d)`` with mask ``(B, T)``; ``(B, k, d)``."""
        read, _ = self.attention(queries, keys, keys, None if mask is None else ~mask, need_weights=False)
        hidden = self.norm_attention(queries + read)
        output: Tensor = self.norm_output(hidden + relu(self.feed_forward(hidden)))
        return output


class PMAPooling(PoolingHead):
    """Pooling by multi-head attention, from the Set Transformer (Lee et al. 2019, eq. 11).

    ``PMA_k(Z) = MAB(S, rFF(Z))`` with k learned seeds S; ``rFF`` also maps the tokens to the width of the block.

    Args:
        num_seeds: k, learned queries, at least 1.
        num_heads: Heads of the attention (4 in the paper).
        pooling: ``"flatten"`` lays the k outputs side by side, ``"mean"`` averages them.
        dim: Width of the block, a multiple of ``num_heads``; by default ``embed_dim``.
        max_parameters: Parameters that the head may have, instead of ``dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If a size is below 1, both widths are given or the pooling is unknown; in ``build``, if the width is
            not a multiple of ``num_heads`` or ``max_parameters`` too small.
    """

    seeds: nn.Parameter
    feed_forward: nn.Linear
    block: MultiheadAttentionBlock

    @typed
    def __init__(
        self,
        num_seeds: int = 1,
        num_heads: int = 4,
        pooling: SeedPooling = "flatten",
        dim: int | None = None,
        max_parameters: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_width("dim", dim, max_parameters)
        for name, value in (("num_seeds", num_seeds), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Pass 1 or more.")
        if pooling not in get_args(SeedPooling):
            raise ValueError(f"pooling must be one of {get_args(SeedPooling)}; got {pooling!r}. Choose one of them.")
        self.num_seeds, self.num_heads, self.pooling = num_seeds, num_heads, pooling
        self.dim, self.max_parameters, self.width_step = dim, max_parameters, num_heads
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int, width: int | None) -> int:
        """Seeds and a block of ``width``."""
        width = divisible(width or embed_dim, self.num_heads)
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, self.num_seeds, width)))
        self.feed_forward = nn.Linear(embed_dim, width)
        self.block = MultiheadAttentionBlock(width, self.num_heads)
        return self.num_seeds * width if self.pooling == "flatten" else width

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Seeds that have read the tokens, ``(B, k * d)`` or ``(B, d)``."""
        keys = relu(self.feed_forward(tokens))
        output: Tensor = self.block(self.seeds.expand(tokens.shape[0], -1, -1), keys, mask)
        return output.flatten(1) if self.pooling == "flatten" else output.mean(1)


def divisible(dim: int, num_heads: int) -> int:
    """``dim``, unless the heads cannot share it.

    Raises:
        ValueError: If it is no multiple of ``num_heads``.
    """
    if dim % num_heads:
        raise ValueError(
            f"dim (by default embed_dim) must be a multiple of num_heads = {num_heads}; got {dim}. Set one of them."
        )
    return dim
