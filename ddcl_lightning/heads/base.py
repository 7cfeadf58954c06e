"""The head protocol."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddcl_lightning.functional import Decomposition
from ddcl_lightning.probe import find_banks


@dataclass(frozen=True)
class ReadoutOutput:
    """What a head makes of ``(B, T, embed_dim)`` tokens.

    Attributes:
        tokens: One vector per token, ``(B, T, *)``.
        pooled: One vector per sample, ``(B, pooled_dim)``.
        levels: Loss terms per level, each ``(H,)``; empty for a head without prototypes.
        assignments: Mean soft assignment of each sample to the prototypes of the last level,
            ``(B, H, K)``; None while training and for a head without prototypes.
        regularization: A scalar that the task adds to its loss as it is (a repulsion, say), or None.
    """

    tokens: Tensor
    pooled: Tensor
    levels: list[Decomposition] = field(default_factory=list)
    assignments: Tensor | None = None
    regularization: Tensor | None = None

    def quantization_loss(self) -> Tensor:
        """``L_q`` summed over levels (eq. 17) and heads, a scalar; without the regularisation.

        Raises:
            ValueError: If the head has no prototypes.
        """
        if not self.levels:
            raise ValueError(
                "the head returned no loss terms, so there is no quantisation loss to train on. Use a head with "
                "prototypes (DDCLReadout), or set the task's quantization_weight to 0."
            )
        return torch.stack([terms.loss.sum() for terms in self.levels]).sum()


class Head(nn.Module, ABC):
    """Turns tokens into a readout. Subclass it, write ``forward``, and set ``pooled_dim`` by the end of ``build``.

    Attributes:
        pooled_dim: Dimension of ``pooled``.
    """

    pooled_dim: int

    def build(self, embed_dim: int) -> None:
        """Create what depends on the backbone's ``embed_dim``; called once, before the optimizers exist."""

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens with mask ``(B, T)``, True for valid tokens."""

    def bound_scale(self) -> None:
        """Bound the scale of the embeddings if the user left the choice open.

        The module calls it when an encoder is trained without a task loss, the case where embeddings shrink.
        """

    def prototype_parameters(self) -> list[nn.Parameter]:
        """Parameters that step at ``lr_prototypes``: by default the prototypes of every bank inside."""
        return [bank.prototypes for bank in find_banks(self).values()]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Parameters that move the tokens which a bank sees; they step with the encoder, at rho * lr_prototypes.

        Whatever is in neither list belongs to the task and steps at ``lr_task``.
        """
        return []
