"""The DDCL-Attention readout."""

from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.functional import repulsion_energy
from ddcl_lightning.functional._common import zero_padding
from ddcl_lightning.heads.base import (
    Head,
    ReadoutOutput,
    check_classifier,
    check_rebuild,
    check_tokens,
    fill_padding,
)
from ddcl_lightning.heads.ddcl_pooling import SUMMARIES, Reading, contributions, pool
from ddcl_lightning.heads.pooling import first_token, mean_token
from ddcl_lightning.heads.width import check_width, widest
from ddcl_lightning.nn.attention import DDCLAttention
from ddcl_lightning.nn.scaling import EmbeddingScale, ScaleMode
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature
from ddcl_lightning.nn.token_weights import TokenWeighting, TokenWeights

Pooling = Literal["centroid", "histogram", "both", "slots", "tokens", "tokens_histogram"]
TokenChoice = Literal["all", "first", "mean"]


class DDCLReadout(Head):
    """Prototype readout: tokens become mixtures of prototypes, a sample the mean of its tokens' mixtures.

    ``tokens`` says what is read: every token, or one vector per sample that stands for it. ``pooling`` says what
    is kept of the reading: where the mixtures lie, which prototypes they are of, or both.

    Args:
        num_prototypes: K, prototypes per head.
        num_heads: H, independent banks.
        prototype_dim: Dimension of one head's prototypes; by default the backbone's ``embed_dim // num_heads``.
        temperature: Initial softness of the assignments, a number as a fraction of the critical temperature of the
            tokens, see :class:`~ddcl_lightning.Temperature`. A ``TemperatureAnnealing`` callback replaces it.
        pooling: What is kept of a sample; means are over its tokens, weighted by ``token_weights``.
            ``"centroid"``: mean of the soft centroids (what the tokens look like);
            ``"histogram"``: mean assignment (which prototypes occur, ``H * K`` numbers); ``"both"``: concatenated;
            ``"tokens"``: mean of the tokens themselves; ``"tokens_histogram"``: that and the mean assignment;
            ``"slots"``: for every prototype the mean of the tokens that it is responsible for
            (``H * K * d`` numbers), as projected. All but the first store the assignments while training. See
            docs/measurements.md for which is good at what.
        residual: Add the tokens themselves to their mixtures (eq. 5).
        embedding_scale: ``"none"``, ``"unit"``, ``"per_dimension"``, ``"total"`` or ``"whiten"``, see
            :class:`~ddcl_lightning.EmbeddingScale`; ``"auto"`` whitens exactly when an encoder is trained without a
            task loss (of the four, the one that kept both the separation and the accuracy at every rho; see
            docs/measurements.md), and does nothing otherwise.
        detach_assignments: Hold assignments constant in the backward pass (eq. 10).
        repulsion: Weight >= 0 of the repulsion between prototypes that are nearer than the tokens' standard deviation
            (:func:`~ddcl_lightning.functional.repulsion_energy`), which is held constant in the backward pass.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.
        tokens: ``"all"`` reads every valid token; ``"first"`` only the first valid one (the encoder's CLS vector, as
            the paper does); ``"mean"`` the mean valid token, one vector per document to cluster. With the last two
            the bank sees one token per sample: its losses, its k-means start and the assignments are those of samples.
        max_parameters: Parameters that the head may have, classifier not included, instead of ``prototype_dim``: the
            largest dimension within it is found by ``build``. Such a head always projects.
        token_weights: Weights of the tokens in the means: ``"uniform"``, or read from their assignments by a learned
            score of every prototype, ``"salience"`` or ``"mass"``
            (:class:`~ddcl_lightning.nn.token_weights.TokenWeights`): one weight per token, which says how much the
            token counts. They learn from a task's loss alone. Not with
            slots, or one token per sample.

    Raises:
        ValueError: If an argument is out of its range, or ``prototype_dim`` and ``max_parameters`` are both given; in
            ``build``, if sizes do not fit each other or ``max_parameters`` is too small.
    """

    attention: DDCLAttention
    weighting: TokenWeights | None

    @typed
    def __init__(
        self,
        num_prototypes: int,
        num_heads: int = 1,
        prototype_dim: int | None = None,
        temperature: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        pooling: Pooling = "centroid",
        residual: bool = False,
        embedding_scale: ScaleMode | Literal["auto"] = "auto",
        detach_assignments: bool = False,
        repulsion: float = 0.0,
        embed_dim: int | None = None,
        tokens: TokenChoice = "all",
        max_parameters: int | None = None,
        token_weights: TokenWeighting = "uniform",
    ) -> None:
        super().__init__()
        require_at_least(1, num_prototypes=num_prototypes, num_heads=num_heads)
        Temperature.of(temperature).per_head(num_heads)  # refuse early
        check_width("prototype_dim", prototype_dim, max_parameters)
        if tokens not in get_args(TokenChoice):
            raise ValueError(f"tokens must be one of {get_args(TokenChoice)}; got {tokens!r}. Choose one of them.")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {get_args(Pooling)}; got {pooling!r}. Choose one of them.")
        if token_weights not in get_args(TokenWeighting):
            raise ValueError(
                f"token_weights must be one of {get_args(TokenWeighting)}; got {token_weights!r}. Choose one of them."
            )
        if pooling not in ("centroid", "both") and residual:
            raise ValueError(f"residual must be False with pooling={pooling!r}, which does not read the mixtures.")
        if token_weights != "uniform" and (pooling == "slots" or tokens != "all"):
            reason = "slots, which weigh tokens themselves" if pooling == "slots" else f"tokens={tokens!r}"
            raise ValueError(
                f"token_weights must be 'uniform' with {reason}; got {token_weights!r}. Leave token_weights out, or "
                "choose another pooling."
            )
        if repulsion < 0:
            raise ValueError(f"repulsion must be >= 0; got {repulsion}. Pass 0 or more.")
        if repulsion > 0 and num_prototypes < 2:
            raise ValueError(
                f"repulsion needs at least 2 prototypes; got num_prototypes = {num_prototypes}. Pass 2 or more."
            )
        self._num_prototypes, self.num_heads, self.prototype_dim = num_prototypes, num_heads, prototype_dim
        self.temperature, self.pooling, self.residual = temperature, pooling, residual
        self.embedding_scale, self.detach_assignments, self.repulsion = (
            embedding_scale,
            detach_assignments,
            repulsion,
        )
        self.tokens, self.max_parameters, self.token_weights = tokens, max_parameters, token_weights
        if embed_dim is not None:
            self.build(embed_dim)

    def build(self, embed_dim: int) -> None:
        """Create the layer for tokens of dimension ``embed_dim``."""
        if check_rebuild(self, embed_dim):
            return
        self.attention = DDCLAttention(
            embed_dim,
            self.num_prototypes,
            num_heads=self.num_heads,
            prototype_dim=self.prototype_dim
            if self.max_parameters is None
            else self._widest(embed_dim, self.max_parameters),
            temperature=self.temperature,
            residual=self.residual,
            # The task reads the concatenated centroids; a projection before it would be redundant or unused.
            output_projection=self.residual,
            embedding_scale="none" if self.embedding_scale == "auto" else self.embedding_scale,
            detach_assignments=self.detach_assignments,
            measure_variance=self.repulsion > 0,
        )
        self.weighting = None
        if self.token_weights != "uniform":
            self.weighting = TokenWeights(self.num_heads, self.num_prototypes, self.token_weights)
        self.pooled_dim = sum(summary.width(self.attention) for summary in SUMMARIES[self.pooling])
        super().build(embed_dim)

    def _widest(self, embed_dim: int, max_parameters: int) -> int:
        """The prototypes' largest dimension d: the parameters are the projection, the prototypes and ``W_o``."""
        per_dim = self.num_heads * (embed_dim + self.num_prototypes + (embed_dim if self.residual else 0))
        scores = self.num_heads * self.num_prototypes if self.token_weights != "uniform" else 0
        dim = widest(lambda width: per_dim * width + scores, max_parameters)
        # One head in the tokens' own space has no projection, and would leave most of max_parameters unused.
        return dim - 1 if self.num_heads == 1 and dim == embed_dim > 1 else dim

    @property
    def num_prototypes(self) -> int:
        """K of the bank as it is now, which may have grown."""
        return self._num_prototypes if self.input_dim is None else self.attention.bank.num_prototypes

    @property
    def token_dim(self) -> int:
        """Dimension of the mixtures."""
        return self.attention.output_dim

    @property
    def pools_assignments(self) -> bool:
        """True where the mean assignment or the mean centroid is all that is kept."""
        return self.pooling in ("centroid", "histogram", "both") and not self.residual

    def fixed_bank_size(self) -> str | None:
        """Reason why K must stay: all but the pooling of centroids has a width that depends on it."""
        if self.pooling != "centroid":
            return f"pooling={self.pooling!r} has a width that depends on it (pooling='centroid' has not)"
        return None

    def init_args(self) -> dict[str, Any]:
        """The arguments, with the scale that an ``"auto"`` one became."""
        args = super().init_args()
        if self.input_dim is not None and self.attention.scale.mode != "none":
            args["embedding_scale"] = self.attention.scale.mode
        if self.max_parameters is not None and self.num_prototypes != self._num_prototypes:
            # max_parameters was spent on another number of prototypes, and would give another dimension now.
            args["max_parameters"], args["prototype_dim"] = None, self.attention.bank.dim
        return args

    def bound_scale(self) -> None:
        """Whiten the embeddings, if ``embedding_scale`` is ``"auto"``."""
        if self.embedding_scale == "auto":
            self.attention.scale = EmbeddingScale(self.attention.scale.dim, "whiten")

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The projection into the heads' spaces, where there is one."""
        projection = self.attention.input_projection
        return [] if projection is None else list(projection.parameters())

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens; assignments are returned in evaluation mode.

        With ``tokens`` other than ``"all"`` the readout's tokens are ``(B, 1, *)``.
        """
        tokens, mask = self._read(tokens, mask)
        output = self.attention(tokens, mask)
        # The mean centroid alone needs no assignments, and training stores none for it.
        plain = self.pooling == "centroid" and self.weighting is None
        reading = None if plain and self.training else self._reading(tokens, mask, output.embedded)
        if plain or reading is None:
            pooled = mean_token(output.tokens, mask)
        else:
            pooled = pool(reading, SUMMARIES[self.pooling]).to(tokens.dtype)
        regularization = None
        if self.repulsion > 0:
            bank = self.attention.bank
            scale = bank.temperature_state.variance.sqrt()  # 0 before the first tokens, and no repulsion then
            regularization = self.repulsion * repulsion_energy(bank.prototypes, scale).sum()
        return ReadoutOutput(
            output.tokens,
            pooled,
            [output.terms],
            None if reading is None or self.training else reading.histogram,
            regularization,
            token_weights=None if reading is None else reading.weights,
        )

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Exact terms of a linear classifier's logits: what each token adds through each prototype.

        A term that belongs to a token as such, not to one of its prototypes (``"tokens"``, ``"tokens_histogram"`` and
        ``residual``), is divided among them as the token is assigned. With ``tokens`` other than ``"all"`` there is one
        token per sample, the one that is read.

        Args:
            tokens: ``(B, T, embed_dim)``.
            mask: ``(B, T)`` boolean, True for valid tokens.
            classifier: Reads ``pooled``.

        Returns:
            ``(B, T, H, K, C)``, whose sum over tokens, heads and prototypes is the logits less the bias.

        Raises:
            ValueError: If a shape does not fit.
        """
        check_classifier(self, classifier)
        tokens, mask = self._read(tokens, mask)
        return contributions(self._reading(tokens, mask), SUMMARIES[self.pooling], classifier)

    @torch.no_grad()
    def logits_without(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Logits with one prototype taken out of the bank, whose tokens go to the others of its head.

        Args:
            tokens: ``(B, T, embed_dim)``.
            mask: ``(B, T)`` boolean, True for valid tokens.
            classifier: Reads ``pooled``.

        Returns:
            ``(B, H, K, C)``; NaN for the only prototype of a head.

        Raises:
            ValueError: If a shape does not fit.
        """
        check_classifier(self, classifier)
        tokens, mask = self._read(tokens, mask)
        reading = self._reading(tokens, mask)
        logits = []
        for head, number in product(range(self.num_heads), range(self.num_prototypes)):
            pooled = pool(reading.without(head, number), SUMMARIES[self.pooling])
            logits.append(classifier(pooled.to(classifier.weight.dtype)))
        return torch.unflatten(torch.stack(logits, 1), 1, (self.num_heads, self.num_prototypes))

    def _read(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens that are read, zero at padding, and their mask."""
        check_tokens(self, tokens, mask)
        if self.tokens == "all":
            return zero_padding(tokens, mask), mask
        tokens, mask = fill_padding(tokens, mask)
        return (first_token if self.tokens == "first" else mean_token)(tokens, mask).unsqueeze(1), None

    def _reading(self, tokens: Tensor, mask: Tensor | None, embedded: Tensor | None = None) -> Reading:
        """The tokens as they are assigned, and their weights."""
        if embedded is None:
            embedded = self.attention.embed(tokens, mask)
        return Reading.of(self.attention, tokens, embedded, mask, self.weighting)
