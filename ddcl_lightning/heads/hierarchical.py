"""Prototypes of prototypes: a stack of banks, each of which reads what the one below makes of its tokens."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.functional._common import masked_mean
from ddcl_lightning.heads.base import Head, ReadoutOutput, check_classifier, check_rebuild, check_tokens
from ddcl_lightning.heads.ddcl_pooling import Centroid, Reading
from ddcl_lightning.heads.levels import IDF_READS, LevelTokens, check_reads, check_value, per_level
from ddcl_lightning.heads.pooling import first_token, mean_token
from ddcl_lightning.heads.width import check_width, widest
from ddcl_lightning.nn.attention import DDCLAttention, DDCLAttentionOutput
from ddcl_lightning.nn.idf import PrototypeIDF
from ddcl_lightning.nn.scaling import EmbeddingScale, ScaleMode
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature

LevelPooling = Literal["last", "all"]


class HierarchicalReadout(Head):
    """Several banks on top of each other: level l + 1 reads the soft centroids of level l (section 5.2, eq. 17).

    Every argument that a level can have of its own is one value for all, or a list with one per level. Every level
    has its own loss terms, temperature and critical temperature, and the callbacks treat it as a bank of its own, named
    ``head.levels.0.bank``, ``head.levels.1.bank`` and so on. ``KMeansInitialization`` starts them from the first to
    the last, so that a level is started from what the one below really gives.

    Means of a level's centroids can spread much less than its tokens, and one temperature for all levels is then above
    the critical one of the last, whose assignments become uniform. Therefore a number is a fraction of each level's own
    critical temperature, followed while the levels below move.

    Args:
        num_prototypes: K of each level, a list with one number per level, from the tokens up.
        num_heads: H of each level.
        prototype_dim: d of each level; by default the dimension of what the level reads, ``// num_heads``. Another
            one projects.
        temperature: Initial softness of the assignments of each level, see :class:`~ddcl_lightning.Temperature`. A
            ``TemperatureAnnealing`` callback replaces it (``banks="*levels.1.*"`` gives one level its own schedule).
        tokens: What each level reads of the level below (the first one of the backbone): ``"all"``: every valid token;
            ``"first"``: the first valid one; ``"mean"``: the mean valid one, one vector per sample; ``"idf_mean"``:
            the same with tokens weighted by the idf of their prototypes
            (:class:`~ddcl_lightning.nn.idf.PrototypeIDF`), which keeps what distinguishes samples;
            ``"idf_inputs"``: that mean of what the level below has read, not of its centroids (the best of those we
            tried for clustering text, and not eq. 17 to the letter; see docs/measurements.md); ``"joined"``: all of
            them side by side, in their order, for samples of ``num_tokens`` tokens. By default ``"all"`` for every
            level but the last, which reads the ``"mean"`` as the paper does. The two rare means store the assignments
            of the level below.
        embedding_scale: Bound on the scale of what each level reads, see :class:`~ddcl_lightning.EmbeddingScale`;
            ``"auto"`` whitens exactly where a trained encoder or projection could lower a level's loss by shrinking its
            tokens, without a task loss, and does nothing otherwise.
        end_to_end: Let gradients pass from a level to those below and to the encoder. By default every level's input is
            fixed for its own loss, as in the paper: no loss, the task's included, reaches below the level that it is
            computed from.
        pooling: ``"last"``: the mean soft centroid of the last level; ``"all"``: those of all levels side by side,
            through which a task's loss reaches every level.
        detach_assignments: Hold assignments constant in the backward pass (eq. 10).
        num_tokens: T of the samples, for ``"joined"``.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.
        max_parameters: Parameters that the head may have, classifier not included, instead of ``prototype_dim``: the
            largest dimension for all levels within it is found by ``build``. The first level of such a
            head always projects.

    Attributes:
        levels: The layers, one :class:`~ddcl_lightning.DDCLAttention` each.

    Raises:
        ValueError: If an argument is out of its range, has not one value per level, or does not go with another; in
            ``build``, if sizes do not fit each other or ``max_parameters`` is too small.
    """

    levels: nn.ModuleList
    idf: nn.ModuleDict

    @typed
    def __init__(
        self,
        num_prototypes: list[int],
        num_heads: int | list[int] = 1,
        prototype_dim: int | list[int] | None = None,
        temperature: float | Temperature | list[float | Temperature] = DEFAULT_TEMPERATURE,
        tokens: LevelTokens | list[LevelTokens] | None = None,
        embedding_scale: ScaleMode | Literal["auto"] | list[ScaleMode | Literal["auto"]] = "auto",
        end_to_end: bool = False,
        pooling: LevelPooling = "last",
        detach_assignments: bool = False,
        num_tokens: int | None = None,
        embed_dim: int | None = None,
        max_parameters: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_prototypes, Sequence) or not num_prototypes:
            raise ValueError(
                f"num_prototypes must be a list with the prototypes of each level, [64, 20] for two; got "
                f"{num_prototypes!r}. For a single bank use DDCLReadout."
            )
        self.num_prototypes, self.num_heads, self.prototype_dim = num_prototypes, num_heads, prototype_dim
        self.temperature = temperature
        self.tokens, self.embedding_scale = tokens, embedding_scale
        self.end_to_end, self.pooling, self.detach_assignments = end_to_end, pooling, detach_assignments
        self.num_tokens, self.max_parameters = num_tokens, max_parameters
        each = partial(per_level, num_prototypes)
        self._heads: list[int] = each("num_heads", num_heads)
        self._dims: list[int | None] = each("prototype_dim", prototype_dim)
        self._scales: list[ScaleMode | Literal["auto"]] = each("embedding_scale", embedding_scale)
        self._temperatures = [Temperature.of(value) for value in each("temperature", temperature)]
        for heads, size in zip(self._heads, num_prototypes, strict=True):
            require_at_least(1, num_heads=heads, num_prototypes=size)
        last: LevelTokens = "mean" if self.num_levels > 1 else "all"
        default: list[LevelTokens] = ["all" for _ in self.num_prototypes[1:]]
        default.append(last)
        self._reads: list[LevelTokens] = default if tokens is None else each("tokens", tokens)
        check_width("prototype_dim", next(filter(None, self._dims), None), max_parameters)
        check_value("embedding_scale", self._scales, ("auto", *get_args(ScaleMode)))
        check_value("pooling", [pooling], get_args(LevelPooling))
        check_reads(self._reads, num_tokens)
        if embed_dim is not None:
            self.build(embed_dim)

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.num_prototypes)

    def build(self, embed_dim: int) -> None:
        """Create the levels for tokens of dimension ``embed_dim``."""
        if check_rebuild(self, embed_dim):
            return
        dims = (
            self._dims
            if self.max_parameters is None
            else [self._widest(embed_dim, self.max_parameters)] * self.num_levels
        )
        self.levels, self.idf = nn.ModuleList(), nn.ModuleDict()
        width = below = embed_dim
        for level, reads in enumerate(self._reads):
            width = below = self._width(reads, width, below)
            scale = self._scales[level]
            layer = DDCLAttention(
                width,
                self.num_prototypes[level],
                num_heads=self._heads[level],
                prototype_dim=dims[level],
                temperature=self._temperatures[level],
                # The level above reads the concatenated centroids, and so does the task.
                output_projection=False,
                embedding_scale="none" if scale == "auto" else scale,
                detach_assignments=self.detach_assignments,
            )
            self.levels.append(layer)
            if level + 1 < self.num_levels and self._reads[level + 1] in IDF_READS:
                self.idf[str(level)] = PrototypeIDF(self._heads[level], self.num_prototypes[level])
            width = layer.output_dim
        self.pooled_dim = width if self.pooling == "last" else sum(self._layer(i).output_dim for i in self._range())
        super().build(embed_dim)

    def _width(self, reads: LevelTokens, width: int, below: int) -> int:
        """Dimension of what a level reads, above one that reads ``below`` and gives ``width`` numbers per token."""
        if reads == "joined":
            assert self.num_tokens is not None
            return width * self.num_tokens
        return below if reads == "idf_inputs" else width

    def _widest(self, embed_dim: int, max_parameters: int) -> int:
        """The prototypes' largest dimension d for all levels: the parameters are projections and prototypes."""

        def count(dim: int) -> int:
            total, width, below = 0, embed_dim, embed_dim
            for level, (heads, size, reads) in enumerate(
                zip(self._heads, self.num_prototypes, self._reads, strict=True)
            ):
                width = below = self._width(reads, width, below)
                total += heads * dim * (size + (width if level == 0 or heads > 1 or dim != width else 0))
                width = heads * dim
            return total

        dim = widest(count, max_parameters)
        # One head in the tokens' own space has no projection, and would leave most of max_parameters unused.
        return dim - 1 if self._heads[0] == 1 and dim == embed_dim > 1 else dim

    def _range(self) -> range:
        return range(self.num_levels)

    def _layer(self, level: int) -> DDCLAttention:
        layer = self.levels[level]
        assert isinstance(layer, DDCLAttention)
        return layer

    @property
    def token_dim(self) -> int:
        """Dimension of the last level's mixtures."""
        return self._layer(self.num_levels - 1).output_dim

    @property
    def pools_assignments(self) -> bool:
        """True where the last level is all that is kept."""
        return self.pooling == "last" or self.num_levels == 1

    def init_args(self) -> dict[str, Any]:
        """The arguments, with the scales that ``"auto"`` ones became."""
        args = super().init_args()
        if self.input_dim is not None:
            bounded = [self._layer(level).scale.mode for level in self._range()]
            args["embedding_scale"] = [
                now if now != "none" else given for now, given in zip(bounded, self._scales, strict=True)
            ]
        return args

    def bound_scale(self) -> None:
        """Whiten what the first level reads, and what others do if something trained can shrink it."""
        for level in self._range():
            layer = self._layer(level)
            moves = level == 0 or self.end_to_end or layer.input_projection is not None
            if moves and self._scales[level] == "auto":
                layer.scale = EmbeddingScale(layer.scale.dim, "whiten")

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The projections into the levels' spaces, where there are any."""
        projections = (self._layer(level).input_projection for level in self._range())
        return [
            parameter for projection in projections if projection is not None for parameter in projection.parameters()
        ]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens; assignments to the last level are returned in evaluation mode.

        The readout's tokens are those of the last level, ``(B, 1, *)`` where it reads one vector per sample.
        """
        terms: list[Decomposition] = []
        pooled: list[Tensor] = []
        assignments = None
        for level, _, valid, output in self._outputs(tokens, mask):
            tokens = output.tokens
            terms.append(output.terms)
            last = level == self.num_levels - 1
            if last or self.pooling == "all":
                pooled.append(mean_token(tokens, valid))
            if last and not self.training and output.weights is not None:
                assignments = masked_mean(output.weights, valid, dim=-2)
        return ReadoutOutput(tokens, torch.cat(pooled, -1), terms, assignments)

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Exact terms of a linear classifier's logits: what each token of the last level adds through each prototype.

        A level that reads one vector per sample has one token. What the levels below add to that vector is no sum, for
        the assignments of the last level are not linear in it.

        Args:
            tokens: ``(B, T, embed_dim)``.
            mask: ``(B, T)`` boolean, True for valid tokens.
            classifier: Reads ``pooled``.

        Returns:
            ``(B, T, H, K, C)`` of the last level, whose sum over tokens, heads and prototypes is the logits less the
            bias.

        Raises:
            ValueError: If a shape does not fit; with ``pooling="all"``, for which :meth:`level_contributions` returns
                those of every level.
        """
        if self.pooling == "all" and self.num_levels > 1:
            raise ValueError(
                "pooling='all' reads several levels, each with tokens and prototypes of its own. Call "
                "level_contributions, which returns one tensor per level."
            )
        return self.level_contributions(tokens, mask, classifier)[-1]

    def level_contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> list[Tensor]:
        """Terms of :meth:`contributions` of every level that ``pooled`` holds, from the first to the last."""
        check_classifier(self, classifier)
        levels = list(self._outputs(tokens, mask))[0 if self.pooling == "all" else -1 :]
        widths = [self._layer(level).output_dim for level, *_ in levels]
        matrices = torch.split(classifier.weight, widths, dim=1)
        terms = []
        for (level, inputs, valid, output), matrix in zip(levels, matrices, strict=True):
            reading = Reading.of(self._layer(level), inputs, output.embedded, valid)
            terms.append(Centroid().contributions(reading, matrix.to(reading.weights.dtype)))
        return terms

    def _outputs(
        self, tokens: Tensor, mask: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Tensor | None, DDCLAttentionOutput]]:
        """Number of each level, what it reads, the mask of that, and what it returns."""
        check_tokens(self, tokens, mask)
        below: DDCLAttentionOutput | None = None
        inputs = tokens
        for level in self._range():
            if self._reads[level] == "idf_inputs":
                tokens = inputs
            if level > 0 and not self.end_to_end:
                tokens = tokens.detach()
            inputs, mask = self._read(level, tokens, mask, below)
            last = level == self.num_levels - 1
            below = self._layer(level)(inputs, mask, (last and not self.training) or str(level) in self.idf)
            yield level, inputs, mask, below
            tokens = below.tokens

    def _read(
        self, level: int, tokens: Tensor, mask: Tensor | None, below: DDCLAttentionOutput | None
    ) -> tuple[Tensor, Tensor | None]:
        """Input of a level, of tokens ``(B, T, D)``, and its mask."""
        reads = self._reads[level]
        if reads == "all":
            return tokens, mask
        if reads == "joined":
            return self._join(tokens, mask), None
        if mask is not None:
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        if reads in IDF_READS:
            assert below is not None
            assert below.weights is not None
            weights = self.idf[str(level - 1)](below.weights.detach(), mask).to(tokens.dtype).unsqueeze(-1)
            return (weights * tokens).sum(1, keepdim=True) / weights.sum(1, keepdim=True), None
        return (first_token if reads == "first" else mean_token)(tokens, mask).unsqueeze(1), None

    def _join(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"tokens must be num_tokens = {self.num_tokens} per sample to be joined; got {tokens.shape[1]}. Set "
                "num_tokens, or read their mean."
            )
        if mask is not None and mask.device.type == "cpu" and not bool(mask.all()):
            raise ValueError(
                "mask must leave every token valid where a level reads them joined, each in its own place; got "
                "padding. Read their mean instead."
            )
        return tokens.flatten(1).unsqueeze(1)
