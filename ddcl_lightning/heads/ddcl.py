"""The DDCL-Attention readout."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning.attention import DDCLAttention
from ddcl_lightning.functional import log_barrier
from ddcl_lightning.functional._common import masked_mean
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.scale import EmbeddingScale, ScaleMode

Pooling = Literal["centroid", "histogram", "both"]


class DDCLReadout(Head):
    """Prototype readout: tokens become mixtures of prototypes, a sample the mean of its tokens' mixtures.

    Args:
        num_prototypes: K, prototypes per head.
        num_heads: H, independent banks.
        prototype_dim: Dimension of one head's prototypes; by default the backbone's ``embed_dim // num_heads``.
        temperature: Initial T > 0, in units of squared distance. A ``TemperatureAnnealing`` callback replaces it.
        pooling: ``"centroid"``: mean of the soft centroids (what the tokens look like);
            ``"histogram"``: mean assignment (which prototypes occur, ``H * K`` numbers); ``"both"``: concatenated.
            The last two store the assignments while training.
        residual: Add the tokens themselves to their mixtures (eq. 5).
        embedding_scale: ``"none"``, ``"per_dimension"``, ``"total"`` or ``"whiten"``, see
            :class:`~ddcl_lightning.EmbeddingScale`; ``"auto"`` whitens exactly when an encoder is trained without a
            task loss (of the four, the one that kept both the separation and the accuracy at every rho; see
            docs/measurements.md), and does nothing otherwise.
        detach_assignments: Hold assignments constant in the backward pass (eq. 10).
        repulsion: Weight >= 0 of the log-barrier repulsion between prototypes.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If an argument is out of its range.
    """

    attention: DDCLAttention

    def __init__(
        self,
        num_prototypes: int,
        num_heads: int = 1,
        prototype_dim: int | None = None,
        temperature: float = 1.0,
        pooling: Pooling = "centroid",
        residual: bool = False,
        embedding_scale: ScaleMode | Literal["auto"] = "auto",
        detach_assignments: bool = False,
        repulsion: float = 0.0,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {get_args(Pooling)}; got {pooling!r}.")
        if repulsion < 0:
            raise ValueError(f"repulsion must be >= 0; got {repulsion}.")
        if repulsion > 0 and num_prototypes < 2:
            raise ValueError(f"repulsion needs at least 2 prototypes; got num_prototypes = {num_prototypes}.")
        self.num_prototypes, self.num_heads, self.prototype_dim = num_prototypes, num_heads, prototype_dim
        self.temperature, self.pooling, self.residual = temperature, pooling, residual
        self.embedding_scale, self.detach_assignments, self.repulsion = (
            embedding_scale,
            detach_assignments,
            repulsion,
        )
        if embed_dim is not None:
            self.build(embed_dim)

    def build(self, embed_dim: int) -> None:
        """Create the layer for tokens of dimension ``embed_dim``."""
        if hasattr(self, "attention"):
            if self.attention.embed_dim != embed_dim:
                raise ValueError(
                    f"embed_dim of the head is {self.attention.embed_dim} but the backbone gives {embed_dim}. "
                    "Leave the head's embed_dim out."
                )
            return
        self.attention = DDCLAttention(
            embed_dim,
            self.num_prototypes,
            num_heads=self.num_heads,
            prototype_dim=self.prototype_dim,
            temperature=self.temperature,
            residual=self.residual,
            # The task reads the concatenated centroids; a projection before it would be redundant or unused.
            output_projection=self.residual,
            embedding_scale="none" if self.embedding_scale == "auto" else self.embedding_scale,
            detach_assignments=self.detach_assignments,
        )
        centroid, histogram = self.attention.output_dim, self.num_heads * self.num_prototypes
        self.pooled_dim = {"centroid": centroid, "histogram": histogram, "both": centroid + histogram}[self.pooling]

    def bound_scale(self) -> None:
        """Whiten the embeddings, if ``embedding_scale`` is ``"auto"``."""
        if self.embedding_scale == "auto":
            self.attention.scale = EmbeddingScale(self.attention.scale.dim, "whiten")

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The projection into the heads' spaces, where there is one."""
        projection = self.attention.input_projection
        return [] if projection is None else list(projection.parameters())

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens; assignments are returned in evaluation mode."""
        if not hasattr(self, "attention"):
            raise RuntimeError(
                "DDCLReadout does not know its input dimension. Pass embed_dim or call build(embed_dim)."
            )
        if mask is not None and not torch.compiler.is_compiling() and mask.device.type == "cpu":
            _require_tokens(mask)
        need_weights = not self.training or self.pooling != "centroid"
        output = self.attention(tokens, mask, need_weights)
        assignments = None
        if output.weights is not None:
            lengths = None if mask is None else mask[:, None, None, :].expand(output.weights.mT.shape)
            assignments = masked_mean(output.weights.mT, lengths)
        pooled = self._pool(output.tokens, assignments, mask)
        regularization = None
        if self.repulsion > 0:
            regularization = self.repulsion * log_barrier(self.attention.bank.prototypes).sum()
        return ReadoutOutput(output.tokens, pooled, [output.terms], assignments, regularization)

    def _pool(self, tokens: Tensor, assignments: Tensor | None, mask: Tensor | None) -> Tensor:
        parts = []
        if self.pooling != "histogram":
            parts.append(masked_mean(tokens.mT, None if mask is None else mask[:, None, :].expand(tokens.mT.shape)))
        if self.pooling != "centroid":
            assert assignments is not None
            parts.append(assignments.flatten(1).to(tokens.dtype))
        return torch.cat(parts, -1)


def _require_tokens(mask: Tensor) -> None:
    """Raise unless every sample has a valid token: the others have no mean to pool."""
    empty = torch.nonzero(~mask.any(-1)).flatten().tolist()
    if empty:
        raise ValueError(
            f"mask must leave at least one valid token in every sample; got none in {len(empty)} of {len(mask)} (the "
            f"first is number {empty[0]} of the batch). Drop empty samples from the data."
        )
