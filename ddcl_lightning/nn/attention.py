"""The DDCL-Attention layer (eq. 4 to 7) as a plain nn.Module."""

from typing import NamedTuple

from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed, width_per_head
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.functional._common import check_mask, require_floating, zero_padding
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.scaling import EmbeddingScale, ScaleMode, check_scale_mode
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature


class DDCLAttentionOutput(NamedTuple):
    """Output of :class:`DDCLAttention` for ``(B, T, embed_dim)`` embeddings.

    Attributes:
        tokens: Layer output ``(B, T, output_dim)``: soft centroids, projected and added to the input as configured
            (sampled prototypes in their place, in training with ``sampling``).
        centroids: Soft centroids of all heads, concatenated, ``(B, T, num_heads * prototype_dim)``; with a context,
            those of the moved prototypes.
        terms: Loss terms per head, ``(num_heads,)`` each.
        weights: Assignments ``(B, num_heads, T, num_prototypes)`` or None.
        embedded: Tokens as the bank read them: projected, scaled, and moved by the context,
            ``(B, T, num_heads * prototype_dim)``.
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
        num_prototypes: K, prototypes per head; not with ``bank``.
        num_heads: H, independent banks.
        prototype_dim: d, dimension of one head's prototypes, free of D. By default D for one head and
            ``D // num_heads`` for several.
        temperature: Softness of the assignments; a number is a fraction of the critical temperature of the tokens, see
            :class:`~ddcl_lightning.Temperature`.
        residual: Return ``X + C W_o`` instead of the mixture alone (eq. 5).
        output_projection: Whether ``W_o`` exists. By default it does with a residual or several heads;
            switch it off where only the centroids are used (an unused parameter stops plain DDP).
        embedding_scale: Bound on the scale of the projected tokens, see :class:`~ddcl_lightning.EmbeddingScale`.
        detach_assignments: Hold assignments constant in the backward pass (eq. 10).
        bank: The bank of another layer, to share its prototypes and temperature (cross-layer sharing, section 8.7). The
            projections and the scale stay the layer's own. The arguments that make a bank belong to the layer that
            made it.
        sampling: In training, give out one prototype per token and head, drawn from its assignments, in place of the
            soft centroid (section 8.7). Its mean is the soft centroid exactly, its gradient that of the soft centroid
            (straight-through), and the loss terms stay those of the soft assignments. In evaluation nothing is drawn.
            No gain was measured (``docs/measurements.md``, "Prototypes inside a network"); at a high temperature its
            noise does harm.
        context_dim: Size of a context vector per sample that moves all prototypes, ``p_k + W_c context``, with
            ``W_c`` zero at the start (section 8.7). Distances see only ``z - W_c context``, so that the
            layer stays one attention call and the decomposition holds exactly for every sample. Anneal from T_c: from
            a colder start, prototypes divide the contexts among themselves before the shift has been learned.
        measure_variance: Follow the variance of the tokens for temperatures that need none too; not with ``bank``.

    Raises:
        ValueError: If sizes do not fit: ``embed_dim`` not divisible by ``num_heads`` without a ``prototype_dim``,
            or a residual without its projection; if there is neither ``num_prototypes`` nor a bank, or a bank and what
            would make another.
    """

    @typed
    def __init__(
        self,
        embed_dim: int,
        num_prototypes: int | None = None,
        *,
        num_heads: int = 1,
        prototype_dim: int | None = None,
        temperature: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        residual: bool = False,
        output_projection: bool | None = None,
        embedding_scale: ScaleMode = "none",
        detach_assignments: bool = False,
        bank: PrototypeBank | None = None,
        sampling: bool = False,
        context_dim: int | None = None,
        measure_variance: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, embed_dim=embed_dim, prototype_dim=prototype_dim, context_dim=context_dim)
        if bank is not None:
            refuse_bank_arguments(
                num_prototypes=num_prototypes,
                num_heads=None if num_heads == 1 else num_heads,
                prototype_dim=prototype_dim,
                temperature=None if temperature == DEFAULT_TEMPERATURE else temperature,
                detach_assignments=detach_assignments or None,
                measure_variance=measure_variance or None,
            )
        elif num_prototypes is None:
            raise ValueError("num_prototypes must be given, or a bank to share; got neither. Give one of them.")
        else:
            bank = PrototypeBank(
                num_prototypes,
                prototype_dim or width_per_head(num_heads, "prototype_dim", embed_dim=embed_dim),
                num_heads=num_heads,
                temperature=temperature,
                detach_assignments=detach_assignments,
                measure_variance=measure_variance,
            )
        if output_projection is None:
            output_projection = residual or bank.num_heads > 1
        if residual and not output_projection:
            raise ValueError("output_projection must not be False with residual=True: eq. 5 adds C W_o to the input.")
        width = bank.num_heads * bank.dim
        self.embed_dim, self.residual, self.sampling, self.context_dim = embed_dim, residual, sampling, context_dim
        self.output_dim = embed_dim if output_projection else width
        self.input_projection: nn.Linear | None = None
        if bank.num_heads > 1 or bank.dim != embed_dim:
            self.input_projection = nn.Linear(embed_dim, width, bias=False)
            nn.init.orthogonal_(self.input_projection.weight)
        check_scale_mode("embedding_scale", embedding_scale)
        self.scale = EmbeddingScale(width, embedding_scale)
        self.bank = bank
        self.output_projection = nn.Linear(width, embed_dim, bias=False) if output_projection else None
        self.context_projection: nn.Linear | None = None
        if context_dim is not None:
            self.context_projection = nn.Linear(context_dim, width, bias=False)
            nn.init.zeros_(self.context_projection.weight)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, need_weights: bool = False, *, context: Tensor | None = None
    ) -> DDCLAttentionOutput:
        """Read tokens out through the bank.

        Args:
            tokens: ``(B, T, embed_dim)``; any leading dimensions work.
            mask: ``(B, T)`` boolean, True for valid tokens. Padding takes no part in any mean or gradient and comes
                out as zero.
            need_weights: Return the assignments, which stores them.
            context: ``(B, context_dim)``, one vector per sample, for a layer that was built with ``context_dim``.

        Returns:
            See :class:`DDCLAttentionOutput`.

        Raises:
            TypeError: If the tokens are no floating-point tensor.
            ValueError: If the last dimension is not ``embed_dim``, the mask or the context does not fit, or a value is
                not finite.
        """
        require_floating(tokens)
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"tokens must have last dimension embed_dim = {self.embed_dim}; got shape {tuple(tokens.shape)}. "
                "Project them, or build the layer for their dimension."
            )
        check_mask(tokens, mask)
        shift = self._shift(tokens, context)
        # A NaN left in the padding would reach the gradients of the projection, as 0 * NaN.
        tokens = zero_padding(tokens, mask)
        embedded = self.embed(tokens, mask)
        if shift is not None:
            embedded = zero_padding(embedded - shift, mask)
        output = self.bank(embedded, mask, need_weights)
        centroids = result = output.centroids
        if self.sampling and self.training:
            result = centroids + (self._sample(embedded, mask) - centroids).detach()
        if shift is not None:
            centroids, result = zero_padding(centroids + shift, mask), zero_padding(result + shift, mask)
        if self.output_projection is not None:
            result = self.output_projection(result)
        if self.residual:
            result = tokens + result
        return DDCLAttentionOutput(result, centroids, output.terms, output.weights, embedded)

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens as the bank reads them: projected and scaled, ``(*, num_heads * prototype_dim)``.

        Args:
            tokens: ``(*, embed_dim)``, zero at padding.
            mask: ``(*)`` boolean, True for valid tokens.
        """
        projected = tokens if self.input_projection is None else self.input_projection(tokens)
        embedded: Tensor = self.scale(projected, mask)
        return embedded

    def _sample(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """A prototype per token and head from its assignments, heads side by side, ``(B, T, num_heads * d)``."""
        drawn = self.bank.vectors(self.bank.sample(embedded))
        return zero_padding(drawn.to(embedded.dtype), mask)

    def _shift(self, tokens: Tensor, context: Tensor | None) -> Tensor | None:
        """Shift of a sample's prototypes by its context, ``(B, 1, num_heads * d)``; None without a context."""
        if self.context_projection is None:
            if context is not None:
                raise ValueError(
                    f"context belongs to a layer with context_dim; got shape {tuple(context.shape)}. Build the layer "
                    f"with context_dim={context.shape[-1] if context.dim() else 1}."
                )
            return None
        expected = (*tokens.shape[:-2], self.context_dim)
        if context is None or context.shape != expected:
            raise ValueError(
                f"context must have shape {expected}, one vector of context_dim = {self.context_dim} per sample; got "
                f"{None if context is None else tuple(context.shape)}. Pool the context to one vector per sample."
            )
        shift: Tensor = self.context_projection(context).unsqueeze(-2)
        return shift


def refuse_bank_arguments(**given: object) -> None:
    """Raise if an argument that makes a bank is not None beside a bank that exists."""
    superfluous = {name: value for name, value in given.items() if value is not None}
    if superfluous:
        listed = ", ".join(f"{name} = {value!r}" for name, value in superfluous.items())
        raise ValueError(
            f"bank brings its own prototypes and temperature, so what makes a bank must be left out; got {listed}. "
            "Give it to the layer that made the bank."
        )
