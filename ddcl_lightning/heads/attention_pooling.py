"""Attention pooling: learned queries weight the tokens."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.heads.pooling import PoolingHead
from ddcl_lightning.heads.width import check_width


class AttentionPooling(PoolingHead):
    """Learned queries weight the tokens of a sample.

    One head is the word attention of Yang et al. 2016 (Hierarchical Attention Networks, eq. 5 to 7): ``u = tanh(W z +
    b)``, ``a = softmax(u^T u_w)``, ``s = sum a z``. Several are the hops of Lin et al. 2017 (A Structured
    Self-Attentive Sentence Embedding, eq. 5 to 8), ``A = softmax(W_s2 tanh(W_s1 Z^T))``, ``M = A Z``, with Yang's bias
    and without Lin's penalty; the hops lie side by side in ``pooled``.

    Args:
        num_heads: H, queries, at least 1; ``pooled_dim`` is ``H * embed_dim``.
        dim: Width of the hidden layer; by default ``embed_dim``.
        max_parameters: Parameters that the head may have, instead of ``dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If a size is below 1 or both widths are given; in ``build``, if ``max_parameters`` is too small.
    """

    hidden: nn.Linear
    queries: nn.Linear

    @typed
    def __init__(
        self,
        num_heads: int = 1,
        dim: int | None = None,
        max_parameters: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_width("dim", dim, max_parameters)
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}. Pass 1 or more.")
        self.num_heads, self.dim, self.max_parameters = num_heads, dim, max_parameters
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int, width: int | None) -> int:
        """A hidden layer of ``width``, and the queries."""
        width = width or embed_dim
        self.hidden = nn.Linear(embed_dim, width)
        self.queries = nn.Linear(width, self.num_heads, bias=False)
        return self.num_heads * embed_dim

    def weights(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weight of each token per query, ``(B, H, T)``: rows sum to 1, padding has none."""
        scores: Tensor = self.queries(torch.tanh(self.hidden(tokens))).mT
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        return scores.softmax(-1)

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Weighted means of the tokens, side by side, ``(B, H * embed_dim)``."""
        return (self.weights(tokens, mask).to(tokens.dtype) @ tokens).flatten(1)
