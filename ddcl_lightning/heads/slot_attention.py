"""Slot attention as a readout."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional._common import accumulation_dtype
from ddcl_lightning.heads.pooling import PoolingHead
from ddcl_lightning.heads.width import check_width

EPSILON = 1e-8  # added to the attention before it is normalized over tokens, as in the paper


class SlotAttentionPooling(PoolingHead):
    """Slot attention: a softmax over slots makes them compete for tokens (Locatello et al. 2020, algorithm 1).

    Slots start from one learned Gaussian, as in the paper: random in training. Evaluation starts from a fixed sample
    of it that is saved with the weights, so that equal inputs give equal outputs; the Gaussian's mean would not
    do, because equal slots stay equal. ``pooled`` is the mean of the slots: their order carries no meaning.

    Args:
        num_slots: S, at least 1.
        num_iterations: Rounds, at least 1 (3 in the paper).
        dim: Width of the slots; by default ``embed_dim``.
        max_parameters: Parameters that the head may have, instead of ``dim``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Attributes:
        noise: Buffer ``(S, d)``, saved with the state: the sample that evaluation starts the slots from.

    Raises:
        ValueError: If a size is below 1 or both widths are given; in ``build``, if ``max_parameters`` is too small.
    """

    noise: Tensor

    @typed
    def __init__(
        self,
        num_slots: int = 4,
        num_iterations: int = 3,
        dim: int | None = None,
        max_parameters: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_width("dim", dim, max_parameters)
        for name, value in (("num_slots", num_slots), ("num_iterations", num_iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Pass 1 or more.")
        self.num_slots, self.num_iterations = num_slots, num_iterations
        self.dim, self.max_parameters = dim, max_parameters
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int, width: int | None) -> int:
        """The Gaussian of the slots, and what they compete and are updated by, of ``width``."""
        width = width or embed_dim
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.log_deviation = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.register_buffer("noise", torch.randn(self.num_slots, width))
        self.norm_tokens = nn.LayerNorm(embed_dim)
        self.norm_slots, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(embed_dim, width, bias=False)
        self.value = nn.Linear(embed_dim, width, bias=False)
        self.gru = nn.GRUCell(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        return width

    def initial_slots(self, batch_size: int) -> Tensor:
        """Starting slots ``(B, S, d)``: drawn anew for every sample in training, the same sample always otherwise."""
        noise = self.noise.expand(batch_size, -1, -1)
        if self.training:
            noise = torch.randn_like(noise)
        return self.mean + self.log_deviation.exp() * noise

    def attention(self, slots: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weight of each token in each slot's mean, ``(B, T, S)``: slots share a token, columns sum to 1."""
        scores = keys @ self.query(self.norm_slots(slots)).mT * self.pooled_dim**-0.5
        # In half precision the epsilon would round away, and an abandoned slot divide by zero.
        shares = scores.to(accumulation_dtype(scores)).softmax(-1) + EPSILON
        if mask is not None:
            shares = shares.masked_fill(~mask.unsqueeze(-1), 0.0)
        normalized: Tensor = shares / shares.sum(1, keepdim=True)
        return normalized

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Mean of the slots after the last round, ``(B, d)``."""
        tokens = self.norm_tokens(tokens)
        keys, values = self.key(tokens), self.value(tokens)
        slots = self.initial_slots(tokens.shape[0])
        for _ in range(self.num_iterations):
            update = self.attention(slots, keys, mask).mT.to(values.dtype) @ values
            state = self.gru(update.flatten(0, 1).to(slots.dtype), slots.flatten(0, 1)).view_as(slots)
            slots = state + self.hidden(self.norm_hidden(state))
        return slots.mean(1)
