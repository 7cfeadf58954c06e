"""The DDCL-Attention layer (eq. 4 to 7) as a plain nn.Module."""

from typing import NamedTuple

from torch import Tensor, nn

from ddcl_lightning.bank import PrototypeBank
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.functional._common import check_mask, zero_padding
from ddcl_lightning.scale import EmbeddingScale, ScaleMode


class DDCLAttentionOutput(NamedTuple):
    """Output of :class:`DDCLAttention` for ``(B, T, embed_dim)`` embeddings.

    Attributes:
        tokens: Layer output ``(B, T, output_dim)``: soft centroids, projected and added to the input as configured.
        centroids: Soft centroids of all heads, concatenated, ``(B, T, num_heads * prototype_dim)``.
        terms: Loss terms per head, ``(num_heads,)`` each.
        weights: Assignments ``(B, num_heads, T, num_prototypes)`` or None.
        embedded: Tokens as the bank read them, projected and scaled, ``(B, T, num_heads * prototype_dim)``.
    """

    tokens: Tensor
    centroids: Tensor
    terms: Decomposition
    weights: Tensor | None
    embedded: Tensor


class DDCLAttention(nn.Module):
    """Prototype attention: every token becomes a mixture of a small bank of learned prototypes.

    With one head whose prototypes live in the embedding space and no residual, the output is the soft centroid itself
    (eq. 4). Otherwise tokens are projected into the heads' spaces (eq. 6) by a matrix that starts orthogonal, so that
    distances survive; with several heads or a residual the centroids return through ``W_o`` (eq. 5 and 7).

    Args:
        embed_dim: D, dimension of the incoming tokens.
        num_prototypes: K, prototypes per head.
        num_heads: H, independent banks.
        prototype_dim: d, dimension of one head's prototypes, free of D. By default D for one head and
            ``D // num_heads`` for several.
        temperature: Initial T > 0, in units of squared distance.
        residual: Return ``X + C W_o`` instead of the mixture alone (eq. 5).
        output_projection: Whether ``W_o`` exists. By default it does with a residual or several heads;
            switch it off where only the centroids are used (an unused parameter stops plain DDP).
        embedding_scale: Bound on the scale of the projected tokens, see :class:`~ddcl_lightning.EmbeddingScale`.
        detach_assignments: Hold assignments constant in the backward pass (eq. 10).

    Raises:
        ValueError: If sizes do not fit: ``embed_dim`` not divisible by ``num_heads`` without a ``prototype_dim``,
            or a residual without its projection.
    """

    def __init__(
        self,
        embed_dim: int,
        num_prototypes: int,
        *,
        num_heads: int = 1,
        prototype_dim: int | None = None,
        temperature: float = 1.0,
        residual: bool = False,
        output_projection: bool | None = None,
        embedding_scale: ScaleMode = "none",
        detach_assignments: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1; got {embed_dim}.")
        if prototype_dim is None:
            if num_heads < 1 or embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be divisible by num_heads; got {embed_dim} and {num_heads}. "
                    "Set prototype_dim to choose the heads' dimension yourself."
                )
            prototype_dim = embed_dim // num_heads
        if output_projection is None:
            output_projection = residual or num_heads > 1
        if residual and not output_projection:
            raise ValueError("output_projection must not be False with residual=True: eq. 5 adds C W_o to the input.")

        bank = PrototypeBank(
            num_prototypes,
            prototype_dim,
            num_heads=num_heads,
            temperature=temperature,
            detach_assignments=detach_assignments,
        )
        width = num_heads * prototype_dim
        self.embed_dim, self.residual = embed_dim, residual
        self.output_dim = embed_dim if output_projection else width
        self.input_projection: nn.Linear | None = None
        if num_heads > 1 or prototype_dim != embed_dim:
            self.input_projection = nn.Linear(embed_dim, width, bias=False)
            nn.init.orthogonal_(self.input_projection.weight)
        self.scale = EmbeddingScale(width, embedding_scale)
        self.bank = bank
        self.output_projection = nn.Linear(width, embed_dim, bias=False) if output_projection else None

    def forward(self, tokens: Tensor, mask: Tensor | None = None, need_weights: bool = False) -> DDCLAttentionOutput:
        """Read tokens out through the bank.

        Args:
            tokens: ``(B, T, embed_dim)``; any leading dimensions work.
            mask: ``(B, T)`` boolean, True for valid tokens. Padding takes no part in any mean or gradient and comes
                out as zero.
            need_weights: Return the assignments, which stores them.

        Returns:
            See :class:`DDCLAttentionOutput`.

        Raises:
            ValueError: If the last dimension is not ``embed_dim``, the mask does not fit, or a value is not finite.
        """
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"tokens must have last dimension embed_dim = {self.embed_dim}; got shape {tuple(tokens.shape)}."
            )
        check_mask(tokens, mask)
        # A NaN left in the padding would reach the gradients of the projection, as 0 * NaN.
        tokens = zero_padding(tokens, mask)
        embedded = tokens if self.input_projection is None else self.input_projection(tokens)
        embedded = self.scale(embedded, mask)
        output = self.bank(embedded, mask, need_weights)
        result = output.centroids
        if self.output_projection is not None:
            result = self.output_projection(result)
        if self.residual:
            result = tokens + result
        return DDCLAttentionOutput(result, output.centroids, output.terms, output.weights, embedded)
