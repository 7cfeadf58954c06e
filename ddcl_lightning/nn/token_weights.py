"""Weights of the tokens of a sample, read from their assignments."""

from typing import Literal

import torch
from torch import Tensor, nn

TokenWeighting = Literal["uniform", "salience", "mass"]
SPREAD = 0.1  # standard deviation of scores at the start: nearly uniform weights


class TokenWeights(nn.Module):
    """One weight per token, shared by all heads, from the prototypes that the token belongs to.

    Every prototype has a learned score ``s_hk``, and tokens t of a sample have weights ``a_t`` that sum to 1:

        salience:  a_t = softmax_t( sum_hk s_hk q_thk )
        mass:      a_t = prod_h sum_k q_thk exp(s_hk), divided by its sum over t

    With salience the score of a token is bounded by those of the prototypes. The
    mass is that of a product of experts: a token counts if every head finds it in a prototype of a high score.

    Args:
        num_heads: H.
        num_prototypes: K.
        weighting: ``"salience"`` or ``"mass"``.

    Attributes:
        scores: Parameter ``(H, K)``.
    """

    def __init__(self, num_heads: int, num_prototypes: int, weighting: Literal["salience", "mass"]) -> None:
        super().__init__()
        self.weighting = weighting
        self.scores = nn.Parameter(SPREAD * torch.randn(num_heads, num_prototypes))

    def forward(self, log_assignments: Tensor, mask: Tensor | None) -> Tensor:
        """Weights ``(B, T)``, zero at padding.

        Args:
            log_assignments: ``ln q``, ``(B, H, T, K)``.
            mask: ``(B, T)`` boolean, True for valid tokens; None where all are.
        """
        scores = self.scores.to(log_assignments.dtype).unsqueeze(1)
        if self.weighting == "salience":
            logits = (log_assignments.exp() * scores).sum((1, -1))
        else:
            logits = (log_assignments + scores).logsumexp(-1).sum(1)
        return logits.softmax(-1) if mask is None else logits.masked_fill(~mask, -torch.inf).softmax(-1)

    def extra_repr(self) -> str:
        """The weighting, for ``print``."""
        return f"{self.weighting!r}, num_heads={self.scores.shape[0]}, num_prototypes={self.scores.shape[1]}"


def uniform_weights(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Weights ``(B, T)`` of a mean over the valid tokens ``(B, T, D)``, in float32 or wider."""
    valid = tokens.new_ones(tokens.shape[:-1], dtype=torch.promote_types(tokens.dtype, torch.float32))
    if mask is not None:
        valid = valid * mask
    return valid / valid.sum(-1, keepdim=True)
