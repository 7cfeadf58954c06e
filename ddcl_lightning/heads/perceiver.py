"""The Perceiver's latents as a readout."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.heads.pma import divisible
from ddcl_lightning.heads.pooling import PoolingHead
from ddcl_lightning.heads.width import check_width


class PerceiverBlock(nn.Module):
    """Pre-norm attention and a GELU layer, each added to its input; no hidden layer is wider than the block.

    Args:
        dim: Width of the queries.
        num_heads: Heads; must divide ``dim``.
        source_dim: Width of what is read; None for self-attention.
    """

    def __init__(self, dim: int, num_heads: int, source_dim: int | None = None) -> None:
        super().__init__()
        self.norm_queries, self.norm_hidden = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_source = None if source_dim is None else nn.LayerNorm(source_dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, kdim=source_dim, vdim=source_dim, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, queries: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Queries ``(B, L, d)`` after reading themselves, or ``source`` ``(B, T, D)`` with mask ``(B, T)``."""
        normed = self.norm_queries(queries)
        keys = normed
        if self.norm_source is not None:
            assert source is not None
            keys = self.norm_source(source)
        read, _ = self.attention(normed, keys, keys, None if mask is None else ~mask, need_weights=False)
        queries = queries + read
        output: Tensor = queries + self.hidden(self.norm_hidden(queries))
        return output


class PerceiverPooling(PoolingHead):
    """A small Perceiver: cross-attention into latents, self-attention among them, their mean (Jaegle et al. 2021).

    Latents cross-attend to the inputs, then pass a latent transformer (section 3 and figure 1); their average is the
    output. They start as a truncated normal of deviation 0.02, and hidden layers are as wide as the latents, as in the
    authors' later code. Positions are the backbone's business.

    Args:
        num_latents: L, at least 1.
        num_heads: Heads of every attention.
        num_blocks: Self-attention blocks, at least 0.
        dim: Width of the latents, a multiple of ``num_heads``; by default ``embed_dim``.
        max_parameters: Parameters that the head may have, instead of ``dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If a size is out of its range or both widths are given; in ``build``, if the width is not a multiple
            of ``num_heads`` or ``max_parameters`` too small.
    """

    latents: nn.Parameter
    read: PerceiverBlock
    blocks: nn.ModuleList

    @typed
    def __init__(
        self,
        num_latents: int = 8,
        num_heads: int = 4,
        num_blocks: int = 1,
        dim: int | None = None,
        max_parameters: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_width("dim", dim, max_parameters)
        for name, value, least in (
            ("num_latents", num_latents, 1),
            ("num_heads", num_heads, 1),
            ("num_blocks", num_blocks, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}. Raise it.")
        self.num_latents, self.num_heads, self.num_blocks = num_latents, num_heads, num_blocks
        self.dim, self.max_parameters, self.width_step = dim, max_parameters, num_heads
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int, width: int | None) -> int:
        """Latents of ``width``, the block in which they read the tokens and those in which they read each other."""
        width = divisible(width or embed_dim, self.num_heads)
        self.latents = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.num_latents, width), std=0.02))
        self.read = PerceiverBlock(width, self.num_heads, embed_dim)
        self.blocks = nn.ModuleList(PerceiverBlock(width, self.num_heads) for _ in range(self.num_blocks))
        return width

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Mean of the latents that have read the tokens, ``(B, d)``."""
        latents: Tensor = self.read(self.latents.expand(tokens.shape[0], -1, -1), tokens, mask)
        for block in self.blocks:
            latents = block(latents)
        return latents.mean(1)
