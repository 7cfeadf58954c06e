"""Vector quantization: soft assignments while it learns, hard codes when it is used."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed, width_per_head
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.functional import BankOutput
from ddcl_lightning.functional._common import check_mask, masked_mean, zero_padding
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.quantizer_base import Quantizer, QuantizerOutput, check_indices
from ddcl_lightning.nn.scaling import EmbeddingScale, ScaleMode
from ddcl_lightning.nn.straight_through import straight_through
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature

QuantizerGradient = Literal["straight_through", "soft"]
TrainingOutput = Literal["hard", "soft"]


class SoftVectorQuantizer(Quantizer):
    """Soft vector quantization (section 5.1, eq. 16) with hard codes at evaluation.

    Assignments are soft, at a temperature that is a fraction of the critical one of the tokens as they are: codes and
    encoder learn from them. In evaluation the decoder reads the nearest code. In training it reads the same
    (``training_output="hard"``), or the soft centroid ``c_n`` (``"soft"``, the paper's); as the fraction falls, the two
    become one.

    The paper's claim that soft assignments leave no code dead holds for soft codes only: at a temperature where
    hard codes are any good, assignments underflow for codes that the encoder leaves behind, and gradients with
    them. Move the codes by :class:`~ddcl_lightning.TokenNormalized`, which gives every code the same time constant::

        codes = TokenNormalized([vq.bank.prototypes], lr=0.05).watch(vq)

    Its claim that no straight-through estimator is needed fails in the same place: the derivative of ``c_n`` vanishes
    for tokens that are well inside of a code's cell. So the default passes the decoder's gradient straight
    through, ``z_n + sg[p_n - z_n]``; ``gradient="soft"`` is the paper's. Both are compared in ``docs/measurements.md``.

    Evaluation mode moves nothing: no code, temperature or statistic, and no gradient for the codes, while gradients
    pass straight through to the tokens. So ``vq.eval()`` is how an encoder is trained against a finished codebook.
    ``vq.bank.requires_grad_(False)`` keeps the codes where they are in training mode too, in which the temperature
    goes on following the tokens.

    Args:
        dim: D, dimension of the tokens.
        num_codes: K per head. Product codes of H heads distinguish ``K ** H`` tokens.
        code_dim: d, dimension of a head's codes; by default ``dim // num_heads``. Tokens are projected where
            ``num_heads * code_dim`` differs from D: a low dimension (8 or so) keeps many codes in use.
        num_heads: H, independent codebooks on slices of the token (product quantization).
        temperature: Softness of the assignments; a number is a fraction of the critical temperature of the tokens, see
            :class:`~ddcl_lightning.Temperature`. Too high (0.5 and above): codes crowd together,
            the decoder gets used to mixtures, and hard codes reconstruct badly. Too low from the start: the first
            codes to be near tokens keep them, as in k-means. Cells shrink with K, so that 3 / K is a good start and a
            hundredth of it a good end from 64 codes on.
        commitment_weight: Weight >= 0 of ``L_q`` over the total variance of the tokens, so that it is free of their
            scale, but not of that of the decoder's loss: about a tenth of the variance of what is reconstructed (0.01
            for pixels in [0, 1]). Too low: tokens run away from their codes. Too high: the encoder serves the codes,
            not the decoder.
        entropy_weight: Weight >= 0 of the bonus on the entropy (nats) of the mean assignment. Too low: codes
            share the work unevenly. Too high: tokens are sent to codes that are not theirs. It pulls at a token by
            1 / T: lower it with the temperature.
        gradient: ``"straight_through"`` or ``"soft"``, see above.
        training_output: ``"hard"`` or ``"soft"``: what the decoder reads in training, see above. With soft centroids,
            too high a temperature at the end leaves a gap to the hard codes.
        embedding_scale: A bound on the scale of what is quantized, see :class:`~ddcl_lightning.EmbeddingScale`.
            ``"none"`` suits tokens of an encoder that stays as it is. Those of one that learns here tend to keep nearly
            all of their variance in one direction; ``"per_dimension"`` works against that, and allows a larger
            commitment. Codes are in the scaled space; statistics are those of the batch in training, running ones in
            evaluation and in :meth:`encode`.

    Attributes:
        bank: The codes, a :class:`~ddcl_lightning.PrototypeBank` that callbacks find.

    Raises:
        ValueError: If an argument is out of its range or sizes do not fit.
    """

    @typed
    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        code_dim: int | None = None,
        num_heads: int = 1,
        temperature: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        commitment_weight: float = 0.01,
        entropy_weight: float = 0.001,
        gradient: QuantizerGradient = "straight_through",
        training_output: TrainingOutput = "hard",
        embedding_scale: ScaleMode = "none",
    ) -> None:
        super().__init__()
        for name, value in (("commitment_weight", commitment_weight), ("entropy_weight", entropy_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0; got {value}.")
        if gradient not in get_args(QuantizerGradient):
            raise ValueError(f"gradient must be one of {get_args(QuantizerGradient)}; got {gradient!r}.")
        if training_output not in get_args(TrainingOutput):
            raise ValueError(f"training_output must be one of {get_args(TrainingOutput)}; got {training_output!r}.")
        require_at_least(1, dim=dim, num_codes=num_codes, code_dim=code_dim)
        if code_dim is None:
            code_dim = width_per_head(num_heads, "code_dim", dim=dim)
        self.dim, self.gradient, self.training_output = dim, gradient, training_output
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.bank = PrototypeBank(
            num_codes, code_dim, num_heads=num_heads, temperature=temperature, measure_variance=True
        )
        width = num_heads * code_dim
        self.input_projection = nn.Linear(dim, width) if width != dim else None
        self.output_projection = nn.Linear(width, dim) if width != dim else None
        self.scale = EmbeddingScale(width, embedding_scale)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize tokens or feature maps.

        Args:
            z: ``(B, T, D)``, or ``(B, D, H, W)`` for feature maps; any float dtype.
            mask: ``(B, T)`` boolean, True for valid tokens; not with feature maps. Padding comes out as zero.

        Returns:
            What the decoder reads, in the shape of the input: codes, or in training also soft centroids. Hard codes
            ``(B, T)`` or ``(B, H, W)``, with a last dimension of heads if there are several, -1 at padding. The loss:
            commitment minus the entropy bonus. Signals, ``(H,)`` each: ``code_entropy``, of the mean soft assignment,
            in [0, ln K] nats, and ``code_gap``, the mean squared distance of soft centroid and hard code as a share of
            the total variance of the tokens, which is what changes when codes become hard: it goes to 0 with T.

        Raises:
            ValueError: If a shape does not fit.
        """
        tokens = self._tokens(z, mask)
        embedded = self._embed(tokens, mask)
        straight = self.gradient == "straight_through" or not self.training
        output = self.bank.quantize(embedded, mask, straight_through=straight)
        assert output.codes is not None
        hard = self.bank.vectors(output.codes)
        value = output.centroids if self.training and self.training_output == "soft" else hard
        quantized = straight_through(value, embedded if straight else output.centroids, output.anchor)
        loss, signals = self._terms(output, hard.detach(), mask)
        return QuantizerOutput(
            self._restore(self._project(quantized, mask), z),
            self._squeeze(output.codes, z),
            loss,
            signals,
            output.terms,
        )

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hard codes of tokens ``(B, T, D)`` or feature maps ``(B, D, H, W)``, as the forward pass gives them.

        Args:
            z: Tokens or feature maps, as for the forward pass.
            mask: ``(B, T)`` boolean, True for valid tokens; the codes of others are -1.
        """
        with evaluating(self.scale):
            embedded = self._embed(self._tokens(z, mask), mask)
        return self._squeeze(self.bank.encode(embedded, mask), z)

    def decode(self, indices: Tensor) -> Tensor:
        """Tokens or feature maps of hard codes, as a decoder reads them.

        Args:
            indices: ``(B, T)`` or ``(B, H, W)`` int64, with a last dimension of heads if there are several; -1 for
                padding.

        Returns:
            ``(B, T, D)``, or ``(B, D, H, W)`` for indices on a grid; zero for padding.

        Raises:
            ValueError: If the shape does not fit, or an index is outside of [0, K) and not -1.
        """
        heads, size = self.bank.num_heads, self.bank.num_prototypes
        codes = indices.unsqueeze(-1) if heads == 1 else indices
        last = "" if heads == 1 else f", {heads}"
        fits = codes.dim() in (3, 4) and codes.shape[-1] == heads
        check_indices(indices, fits, size, f"(B, T{last}) or (B, H, W{last})")
        codes_of_tokens = codes.flatten(1, -2)
        quantized = self._project(self.bank.vectors(codes_of_tokens), (codes_of_tokens >= 0).all(-1))
        if codes.dim() == 3:
            return quantized
        return torch.unflatten(quantized.mT, -1, codes.shape[1:3])

    @property
    def codebook(self) -> Tensor:
        """The codes, ``(H, K, d)``, detached."""
        return self.bank.prototypes.detach()

    @property
    def num_codes(self) -> int:  # type: ignore[override]
        """K per head."""
        return self.bank.num_prototypes

    @property
    def num_codebooks(self) -> int:  # type: ignore[override]
        """H."""
        return self.bank.num_heads

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The projection into the codes' space, where there is one."""
        return [] if self.input_projection is None else list(self.input_projection.parameters())

    def extra_repr(self) -> str:
        """Dimension and modes, for ``print``."""
        return f"dim={self.dim}, gradient={self.gradient!r}, training_output={self.training_output!r}"

    def _tokens(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``(B, T, D)`` of either form of input."""
        channels = -1 if z.dim() == 3 else 1
        if z.dim() not in (3, 4) or z.shape[channels] != self.dim or not z.is_floating_point():
            raise ValueError(
                f"z must be floating point of shape (B, T, dim) or (B, dim, H, W) with dim = {self.dim}; got {z.dtype} "
                f"of shape {tuple(z.shape)}. Move the channels, or build the quantizer for their number."
            )
        if z.dim() == 4:
            if mask is not None:
                raise ValueError("mask belongs to tokens (B, T, dim); got one beside a feature map. Flatten the map.")
            return z.flatten(2).mT
        check_mask(z, mask)
        return zero_padding(z, mask)  # a NaN left in the padding would reach the gradients of the projection

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``(B, T, D)`` in the space of the codes, ``(B, T, H * d)``."""
        projected = tokens if self.input_projection is None else self.input_projection(tokens)
        scaled: Tensor = self.scale(projected, mask)
        return scaled

    def _project(self, quantized: Tensor, mask: Tensor | None) -> Tensor:
        if self.output_projection is not None:
            quantized = self.output_projection(quantized)
        return zero_padding(quantized, mask)

    def _restore(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens ``(B, T, D)`` in the shape and dtype of the input."""
        shaped = tokens if like.dim() == 3 else torch.unflatten(tokens.mT, -1, like.shape[2:])
        return shaped.to(like.dtype)

    def _squeeze(self, codes: Tensor, like: Tensor) -> Tensor:
        """Codes ``(B, T, H)`` in the form that goes with the input."""
        if like.dim() == 4:
            codes = torch.unflatten(codes, 1, like.shape[2:])
        return codes.squeeze(-1) if self.bank.num_heads == 1 else codes

    def _terms(self, output: BankOutput, hard: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the signals."""
        spread = self.bank.temperature_state.variance
        # The running variance; where nothing was seen yet, that of the codes.
        codes = self.codebook.var(1, correction=0).sum(-1)
        spread = torch.where(spread > 0, spread, codes).clamp(min=torch.finfo(spread.dtype).tiny)
        apart = (output.centroids.detach() - hard).float().square()
        per_head = torch.unflatten(apart, -1, (self.bank.num_heads, self.bank.dim)).sum(-1)
        gap = masked_mean(per_head.flatten(0, 1), None if mask is None else mask.flatten(), dim=-2) / spread
        entropy = output.entropy
        assert entropy is not None
        loss = self.commitment_weight * (output.terms.loss / spread).sum() - self.entropy_weight * entropy.sum()
        return loss, {"code_entropy": entropy, "code_gap": gap}
