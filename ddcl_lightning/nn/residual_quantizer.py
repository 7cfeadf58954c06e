"""Residual vector quantization: every level encodes what the levels before have left."""

from typing import Any

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed, width_per_head
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.functional._common import accumulation_dtype, require_finite, require_tokens
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.commitment import check_ratio
from ddcl_lightning.nn.joint_moments import relative_errors
from ddcl_lightning.nn.layout import Channels
from ddcl_lightning.nn.moving_bank import CodeUpdate, MovingBank
from ddcl_lightning.nn.projected_quantizer import ProjectedQuantizer, residual_of
from ddcl_lightning.nn.quantizer import COMMITMENT_RATIO, DEFAULT_UPDATE
from ddcl_lightning.nn.quantizer_base import QuantizerOutput, QuantizerTerms, as_indices, check_indices
from ddcl_lightning.nn.scaling import ScaleMode, check_scale_mode
from ddcl_lightning.nn.straight_through import straight_through
from ddcl_lightning.nn.temperature import DISTORTION_TEMPERATURE, Temperature


class ResidualVectorQuantizer(ProjectedQuantizer):
    """Residual vector quantization, with codes that move inside.

    One line::

        rvq = ResidualVectorQuantizer(dim=32, num_codes=256, num_levels=3)
        quantized, indices, terms = rvq(z)

    The first level replaces a token by its nearest code, every further one the residual that the levels before have
    left; the token is the sum of its codes, and its indices, one per level, name it from coarse to fine: the first of
    them alone decode to an approximation. Levels do not send gradients to each other: the decoder's gradient passes
    straight through the sum, with the commitment of :class:`~ddcl_lightning.SoftVectorQuantizer` to it. Codes start by
    k-means, level after level, and move as those of that class do.

    Args:
        dim: D, channels of the tokens.
        num_codes: K, codes of each level (and head).
        num_levels: L, at least 1.
        code_dim: d, dimension of a head's codes; by default ``dim // num_heads``. Tokens are projected where
            ``num_heads * code_dim`` differs from D.
        num_heads: H: slices of the token with residual codes of their own (grouped residual quantization).
        shared_codebook: Use the same codes at all levels.
        level_dropout: Probability in [0, 1) that a batch is decoded from its first levels alone while training; how
            many is drawn uniformly from 1 to L - 1. So every number of levels decodes well. The indices of levels that
            were left out are -1, while all levels go on learning from the batch.
        channels: See :class:`~ddcl_lightning.SoftVectorQuantizer`.
        code_update: How codes move.
        temperature: Softness of the assignments by which codes move, see :class:`~ddcl_lightning.Temperature`; by
            default 0.03 of each level's distortion.
        commitment_ratio: Strength >= 0 of the commitment, see :class:`~ddcl_lightning.nn.commitment.Commitment`.
        embedding_scale: A bound on the scale of what is quantized, see :class:`~ddcl_lightning.EmbeddingScale`.

    Attributes:
        levels: The codes: one :class:`~ddcl_lightning.PrototypeBank` per level, or a single one for all.

    Raises:
        ValueError: If an argument is out of its range or sizes do not fit.
    """

    @typed
    def __init__(
        self,
        dim: int,
        num_codes: int,
        num_levels: int,
        *,
        code_dim: int | None = None,
        num_heads: int = 1,
        shared_codebook: bool = False,
        level_dropout: float = 0.0,
        channels: Channels | None = None,
        code_update: CodeUpdate = DEFAULT_UPDATE,
        temperature: float | list[float] | Temperature | None = None,
        commitment_ratio: float = COMMITMENT_RATIO,
        embedding_scale: ScaleMode = "none",
    ) -> None:
        sizes = {"num_levels": num_levels, "num_heads": num_heads, "code_dim": code_dim}
        require_at_least(1, dim=dim, num_codes=num_codes, **sizes)
        if not 0 <= level_dropout < 1:
            raise ValueError(
                f"level_dropout must be a probability in [0, 1); got {level_dropout}. Set 0 to decode from all levels."
            )
        if level_dropout and num_levels == 1:
            raise ValueError(
                f"level_dropout must be 0 with one level, which is never left out; got {level_dropout}. Leave it out, "
                "or raise num_levels."
            )
        check_ratio(commitment_ratio)
        if code_dim is None:
            code_dim = width_per_head(num_heads, "code_dim", dim=dim)
        if temperature is None:
            temperature = Temperature(DISTORTION_TEMPERATURE, "distortion")
        check_scale_mode("embedding_scale", embedding_scale)
        super().__init__(dim, num_heads * code_dim, channels, embedding_scale)
        self.num_levels, self.num_heads = num_levels, num_heads
        self.num_codebooks = num_levels * num_heads
        self.level_dropout, self.commitment_ratio, self.shared_codebook = (
            level_dropout,
            commitment_ratio,
            shared_codebook,
        )
        settings: dict[str, Any] = {"update": code_update, "num_heads": num_heads, "temperature": temperature}
        number = 1 if shared_codebook else num_levels
        self.levels = nn.ModuleList([MovingBank(num_codes, code_dim, **settings) for _ in range(number)])
        self._start_in_training(num_codes)
        self._commit(commitment_ratio)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize tokens or feature maps.

        Args:
            z: ``(N, D)``, ``(B, T, D)``, ``(B, D, H, W)`` or any other rank, see ``channels``; any float dtype.
            mask: Boolean, the shape of ``z`` without its channels, True for valid tokens. Padding comes out as zero.

        Returns:
            Sums of codes, in the shape of the input. Indices in the shape of the mask with a last dimension of
            ``L * H`` (none where that is 1), those of the first level first; -1 at padding, and at levels that were
            dropped. In the terms, a loss of zero, the decomposition of every codebook's tokens, ``(L * H,)`` each, and
            signals
            ``level1_error`` and so on: the mean squared error with so many levels, as a share of the tokens' variance
            (in training of those of all processes).

        Raises:
            ValueError: If a shape does not fit.
        """
        tokens = self.layout.tokens(z, mask)
        require_tokens(z, "z")
        embedded = self._embed(tokens, mask)
        if self.training:
            self._start(embedded, mask)
        used = self._draw_levels()
        residual = embedded.detach().to(accumulation_dtype(embedded))  # half precision would round what levels leave
        total = torch.zeros_like(residual)
        codes, anchors, terms, residuals = [], [], [], []
        for level in range(self.num_levels):
            bank = self.bank(level)
            output = bank.quantize(residual, mask)
            assert output.codes is not None
            vectors = bank.vectors(output.codes).to(residual.dtype)
            residual = residual - vectors
            if level < used:
                total = total + vectors
            codes.append(output.codes if level < used else torch.full_like(output.codes, -1))
            terms.append(output.terms)
            if output.anchor is not None:
                anchors.append(output.anchor)
            residuals.append(residual)
        # Evaluation of one process alone must not wait for the others.
        errors = relative_errors(residuals, embedded, mask, joint=self.training)
        signals = {f"level{level + 1}_error": share for level, share in enumerate(errors.shares)}
        anchor = torch.stack(anchors).sum() if anchors else None
        if self.commitment is not None:
            quantized = self.commitment(total, embedded, anchor, mask, errors.spread)
        else:
            quantized = straight_through(total, embedded, anchor)
        self._watch_gradients(z, quantized)
        loss = terms[0].loss.new_zeros(()) if anchor is None else anchor
        decomposition = Decomposition(*(torch.cat(values) for values in zip(*terms, strict=True)))
        return QuantizerOutput(
            self._restore(quantized, mask).to(z.dtype),
            self._squeeze(torch.cat(codes, -1)),
            QuantizerTerms(loss, signals, decomposition),
        )

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices of tokens or feature maps at all levels, as in the forward pass (but for ties within rounding).

        Args:
            z: As for the forward pass.
            mask: As for the forward pass; the indices of tokens that are not valid are -1.
        """
        with evaluating(self.scale):
            embedded = self._embed(self.layout.tokens(z, mask), mask)
        require_finite(embedded, mask)
        residual = embedded.to(accumulation_dtype(embedded))
        codes = []
        for level in range(self.num_levels):
            codes.append(self.bank(level).encode(residual, mask))
            residual = residual - self.bank(level).vectors(codes[-1]).to(residual.dtype)
        return self._squeeze(torch.cat(codes, -1))

    def decode(self, indices: Tensor) -> Tensor:
        """Tokens or feature maps of indices, or of their first levels.

        Args:
            indices: As :meth:`encode` returns them, or the first ``l * H`` of the last dimension for l levels; -1 for
                padding, and for levels that are left out.

        Returns:
            Their vectors, in the shape of what was encoded (see :meth:`ddcl_lightning.SoftVectorQuantizer.decode`);
            zero for padding.

        Raises:
            ValueError: If indices are no integers, the shape does not fit, or one is outside of [0, K) and not -1.
            TypeError: If indices are no tensor.
        """
        most, heads = self.num_codebooks, self.num_heads
        shape = f"(..., {heads} to {most}), {heads} per level"
        indices = as_indices(indices, shape)
        codes = indices.unsqueeze(-1) if self.num_codebooks == 1 else indices
        fits = codes.dim() >= 2 and 1 <= codes.shape[-1] <= most and codes.shape[-1] % heads == 0
        check_indices(indices, fits, self.num_codes, shape)
        total = torch.stack(
            [self.bank(level).vectors(of_level) for level, of_level in enumerate(torch.split(codes, heads, -1))]
        ).sum(0)
        return self._restore(total, codes[..., 0] >= 0)

    def bank(self, level: int) -> MovingBank:
        """The bank of a level.

        Args:
            level: In [0, L).

        Raises:
            ValueError: If it is another.
        """
        if not 0 <= level < self.num_levels:
            raise ValueError(f"level must be in [0, num_levels = {self.num_levels}); got {level}. Count from 0.")
        bank = self.levels[0 if self.shared_codebook else level]
        assert isinstance(bank, MovingBank)
        return bank

    @property
    def codebook(self) -> Tensor:
        """The codes, ``(L * H, K, d)``, detached: those of the first level first."""
        return torch.cat([self.bank(level).prototypes.detach() for level in range(self.num_levels)])

    @property
    def num_codes(self) -> int:  # type: ignore[override]
        """K of each level and head."""
        return self.bank(0).num_prototypes

    def start_codes(self, tokens: Tensor, *, final: bool) -> None:
        """Start the levels in order, each on what those before leave of tokens ``(N, width)``."""
        if self.shared_codebook:
            bank = self.bank(0)
            bank.start(tokens, final=final)
            bank.start(torch.cat([tokens, residual_of(bank, tokens)]), final=final)
            return
        for level in range(self.num_levels):
            self.bank(level).start(tokens, final=final)
            tokens = residual_of(self.bank(level), tokens)

    def tokens_of(self, bank: PrototypeBank, embedded: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens of a bank; of one that all levels share, those of every level, one after the other."""
        if not self.shared_codebook:
            return embedded, mask
        levels = [embedded]
        for _ in range(self.num_levels - 1):
            levels.append(residual_of(bank, levels[-1], mask))
        return torch.cat(levels), None if mask is None else torch.cat([mask] * self.num_levels)

    def next_tokens(self, bank: PrototypeBank, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """Residual of tokens ``(*, width)`` after the bank."""
        return residual_of(bank, embedded, mask)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"dim={self.dim}, num_codes={self.num_codes}, num_levels={self.num_levels}, num_heads={self.num_heads}"

    def _draw_levels(self) -> int:
        """Number of levels that the decoder gets."""
        if not (self.training and self.level_dropout and self.num_levels > 1):
            return self.num_levels
        chance, number = torch.rand(2).tolist()
        return 1 + int(number * (self.num_levels - 1)) if chance < self.level_dropout else self.num_levels
