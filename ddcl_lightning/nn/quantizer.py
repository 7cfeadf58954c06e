"""Vector quantization: soft assignments while it learns, hard codes when it is used."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import require_at_least, typed, width_per_head
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.functional import BankOutput
from ddcl_lightning.functional._common import masked_mean, require_finite, require_tokens
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.commitment import check_ratio
from ddcl_lightning.nn.layout import Channels
from ddcl_lightning.nn.moving_bank import CodeUpdate, MovingBank
from ddcl_lightning.nn.projected_quantizer import ProjectedQuantizer
from ddcl_lightning.nn.quantizer_base import QuantizerOutput, QuantizerTerms, as_indices, check_indices
from ddcl_lightning.nn.scaling import ScaleMode, check_scale_mode
from ddcl_lightning.nn.straight_through import straight_through
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, DISTORTION_TEMPERATURE, Temperature

QuantizerGradient = Literal["straight_through", "soft"]
TrainingOutput = Literal["hard", "soft"]

COMMITMENT_RATIO = 1.4
DEFAULT_UPDATE = CodeUpdate()


class SoftVectorQuantizer(ProjectedQuantizer):
    """Soft vector quantization (section 5.1, eq. 16) with hard codes at evaluation.

    One line::

        vq = SoftVectorQuantizer(dim=64, num_codes=512)
        quantized, indices, terms = vq(z)

    Codes move inside: they start by k-means on the tokens of the first training batches, and follow their tokens at the
    step of any optimizer of torch, see :class:`~ddcl_lightning.CodeUpdate`. So ``torch.optim.Adam(model.parameters())``
    is all that a training loop needs; in one without an optimizer call :meth:`settle` after every batch. Codes of
    nearly empty cells are moved to crowded ones. The assignments by which codes move are soft, at a temperature that
    falls with the error of the codes; the decoder reads the nearest code, and its gradient passes straight through,
    with a commitment in proportion to it, so that no weight depends on the scale of tokens or loss.

    With ``code_update="optimizer"`` codes are a parameter that you optimize, by
    :class:`~ddcl_lightning.TokenNormalized`, under which no code is left behind, or by another optimizer::

        vq = SoftVectorQuantizer(64, 512, code_update="optimizer")
        codes = TokenNormalized([vq.bank.prototypes], lr=0.05).watch(vq)

    The commitment is then the loss ``L_q`` in ``terms.loss``, and the temperature a fraction of the critical one of the
    tokens, for a schedule to lower. The paper's own form is that with ``gradient="soft"`` and
    ``training_output="soft"``. Its claim that soft assignments leave no code dead holds for soft codes only: at a
    temperature where hard codes are any good, assignments underflow for codes that the encoder leaves behind, and
    gradients with them. Its claim that no straight-through estimator is needed fails in the same place: the derivative
    of the soft centroid vanishes for tokens that are well inside of a code's cell. ``docs/measurements.md`` compares.

    Evaluation mode moves nothing: no code, temperature or statistic, and no gradient for the codes, while gradients
    pass straight through to the tokens. So ``vq.eval()`` is how an encoder is trained against a finished codebook.
    ``vq.requires_grad_(False)`` keeps the codes where they are in training mode too, and the temperature of codes that
    move inside.

    Args:
        dim: D, channels of the tokens.
        num_codes: K per head. Product codes of H heads distinguish ``K ** H`` tokens.
        code_dim: d, dimension of a head's codes; by default ``dim // num_heads``. Tokens are projected where
            ``num_heads * code_dim`` differs from D: a low dimension (8 or so) keeps many codes in use.
        num_heads: H, independent codebooks on slices of the token (product quantization).
        channels: ``"last"`` for tokens ``(B, ..., D)``, ``"first"`` for ``(B, D, ...)``; by default the one that
            fits, see :class:`~ddcl_lightning.nn.layout.ChannelLayout`.
        code_update: How codes move inside, or ``"optimizer"``: an optimizer of yours moves them.
        temperature: Softness of the assignments, see :class:`~ddcl_lightning.Temperature`. By default 0.03 of the
            distortion where codes move inside; a tenth of the critical temperature where an optimizer moves them:
            there too high (0.5 and above) crowds codes together, too low from the start leaves those without tokens
            that are far from them, and 3 / K is a good start and a hundredth of it a good end from 64 codes on.
        commitment_ratio: Strength >= 0 of a commitment in proportion to the decoder's gradient, see
            :class:`~ddcl_lightning.nn.commitment.Commitment`; needs the gradient straight through. By default 1.4
            where codes move inside, else 0. Too low: tokens grow without end. Too high: they fall to few directions.
        commitment_weight: Weight >= 0 of ``L_q`` over the total variance of the tokens in ``terms.loss``; by default 0
            where codes move inside, else 0.01. It is free of the tokens' scale, but not of that of the decoder's
            loss: about a tenth of the variance of what is reconstructed. Tokens of little variance get a gradient of
            its inverse, by which an encoder can collapse before the decoder has a say.
        entropy_weight: Weight >= 0 of the bonus on the entropy (nats) of the mean assignment; by default 0 where codes
            move inside, else 0.001. Too low: codes share the work unevenly. Too high: tokens are sent to codes that
            are not theirs. It pulls at a token by 1 / T: lower it with the temperature.
        gradient: ``"straight_through"`` or ``"soft"``, see above.
        training_output: What the decoder reads in training: ``"hard"``, the nearest code, or ``"soft"``, the soft
            centroid. With soft ones, too high a temperature at the end leaves a gap to the hard codes.
        embedding_scale: A bound on the scale of what is quantized, see :class:`~ddcl_lightning.EmbeddingScale`.
            Codes are in the scaled space; statistics are those of the batch in training, running ones in evaluation and
            in :meth:`encode`.

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
        channels: Channels | None = None,
        code_update: CodeUpdate | Literal["optimizer"] = DEFAULT_UPDATE,
        temperature: float | list[float] | Temperature | None = None,
        commitment_ratio: float | None = None,
        commitment_weight: float | None = None,
        entropy_weight: float | None = None,
        gradient: QuantizerGradient = "straight_through",
        training_output: TrainingOutput = "hard",
        embedding_scale: ScaleMode = "none",
    ) -> None:
        moves = isinstance(code_update, CodeUpdate)
        if not moves and code_update != "optimizer":
            raise ValueError(
                f"code_update must be a CodeUpdate or 'optimizer'; got {code_update!r}. Pass CodeUpdate(...), or leave "
                "it out."
            )
        if commitment_ratio is None:
            commitment_ratio = COMMITMENT_RATIO if moves and gradient == "straight_through" else 0.0
        commitment_weight = (0.0 if moves else 0.01) if commitment_weight is None else commitment_weight
        entropy_weight = (0.0 if moves else 0.001) if entropy_weight is None else entropy_weight
        check_ratio(commitment_ratio)
        for name, value in (("commitment_weight", commitment_weight), ("entropy_weight", entropy_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0; got {value}. Set 0 to leave the term out.")
        if gradient not in get_args(QuantizerGradient):
            raise ValueError(
                f"gradient must be one of {get_args(QuantizerGradient)}; got {gradient!r}. Choose one of them."
            )
        if commitment_ratio and gradient != "straight_through":
            raise ValueError(
                f"commitment_ratio needs gradient='straight_through', to which it is relative; got {commitment_ratio} "
                f"and {gradient!r}. Use commitment_weight."
            )
        if training_output not in get_args(TrainingOutput):
            raise ValueError(
                f"training_output must be one of {get_args(TrainingOutput)}; got {training_output!r}. Choose one of "
                "them."
            )
        require_at_least(1, dim=dim, num_codes=num_codes, num_heads=num_heads, code_dim=code_dim)
        if code_dim is None:
            code_dim = width_per_head(num_heads, "code_dim", dim=dim)
        check_scale_mode("embedding_scale", embedding_scale)
        super().__init__(dim, num_heads * code_dim, channels, embedding_scale)
        self.gradient, self.training_output = gradient, training_output
        self.commitment_ratio, self.commitment_weight = commitment_ratio, commitment_weight
        self.entropy_weight, self.code_update = entropy_weight, code_update
        self.bank = create_bank(num_codes, code_dim, num_heads, temperature, code_update, commitment_weight > 0)
        if moves:
            self._start_in_training(num_codes)
        self._commit(commitment_ratio)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize tokens or feature maps.

        Args:
            z: ``(N, D)``, ``(B, T, D)``, ``(B, D, H, W)`` or any other rank, see ``channels``; any float dtype.
            mask: Boolean, the shape of ``z`` without its channels, True for valid tokens. Padding comes out as zero.

        Returns:
            What the decoder reads, in the shape of the input: codes, or in training also soft centroids. Hard codes in
            the shape of the mask, with a last dimension of heads if there are several, -1 at padding. In the terms, the
            loss: commitment and entropy bonus, zero without either. Signals, ``(H,)`` each: ``code_entropy``, of the
            mean soft assignment, in [0, ln K] nats, and ``code_gap``, the mean squared distance of soft centroid and
            hard code as a share of the total variance of the tokens (of the codes, where that is not measured), which
            is what changes when codes become hard: it goes to 0 with T.

        Raises:
            ValueError: If a shape does not fit.
        """
        tokens = self.layout.tokens(z, mask)
        require_tokens(z, "z")
        embedded = self._embed(tokens, mask)
        if self.training:
            self._start(embedded, mask)
        straight = self.gradient == "straight_through" or not self.training
        learns = not straight or self.commitment_weight > 0 or self.entropy_weight > 0
        output = self.bank.quantize(embedded if learns else embedded.detach(), mask, straight_through=straight)
        assert output.codes is not None
        hard = self.bank.vectors(output.codes)
        value = output.centroids if self.training and self.training_output == "soft" else hard
        value = value.to(embedded.dtype)
        if self.commitment is not None:
            quantized = self.commitment(value, embedded, output.anchor, mask)
        else:
            quantized = straight_through(value, embedded if straight else output.centroids, output.anchor)
        self._watch_gradients(z, quantized)
        terms = self._terms(output, hard.detach(), mask)
        return QuantizerOutput(self._restore(quantized, mask).to(z.dtype), self._squeeze(output.codes), terms)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hard codes of tokens or feature maps, as the forward pass gives them (but for ties within rounding).

        Args:
            z: As for the forward pass.
            mask: As for the forward pass; the codes of tokens that are not valid are -1.
        """
        with evaluating(self.scale):
            embedded = self._embed(self.layout.tokens(z, mask), mask)
        require_finite(embedded, mask)
        return self._squeeze(self.bank.encode(embedded, mask))

    def decode(self, indices: Tensor) -> Tensor:
        """Tokens or feature maps of hard codes, as a decoder reads them.

        Args:
            indices: As :meth:`encode` returns them, int64; -1 for padding.

        Returns:
            Their vectors, in the shape of what was encoded (see ``channels``; where nothing was, ``(N, D)``,
            ``(B, T, D)``, and ``(B, D, H, W)`` or more dimensions with the channels first); zero for padding.

        Raises:
            ValueError: If indices are no integers, the shape does not fit, or one is outside of [0, K) and not -1.
            TypeError: If indices are no tensor.
        """
        heads, size = self.bank.num_heads, self.bank.num_prototypes
        shape = "(N,), (B, T) or (B, H, W)" if heads == 1 else f"(..., num_heads = {heads})"
        indices = as_indices(indices, shape)
        codes = indices.unsqueeze(-1) if heads == 1 else indices
        fits = codes.dim() >= 2 and codes.shape[-1] == heads
        check_indices(indices, fits, size, shape)
        return self._restore(self.bank.vectors(codes), (codes >= 0).all(-1))

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

    def extra_repr(self) -> str:
        """Dimension and modes, for ``print``."""
        return f"dim={self.dim}, gradient={self.gradient!r}, training_output={self.training_output!r}"

    def _terms(self, output: BankOutput, hard: Tensor, mask: Tensor | None) -> QuantizerTerms:
        """The loss and the signals."""
        spread = self.bank.temperature_state.variance
        # The running variance; where nothing was seen yet, that of the codes.
        codes = self.codebook.var(1, correction=0).sum(-1)
        spread = torch.where(spread > 0, spread, codes).clamp(min=torch.finfo(spread.dtype).tiny)
        apart = (output.centroids.detach() - hard).float().square()
        per_head = torch.unflatten(apart, -1, (self.bank.num_heads, self.bank.dim)).sum(-1)
        gap = masked_mean(per_head.flatten(0, -2), None if mask is None else mask.flatten(), dim=-2) / spread
        entropy = output.entropy
        assert entropy is not None
        loss = entropy.new_zeros(())
        if self.commitment_weight:
            loss = loss + self.commitment_weight * (output.terms.loss / spread).sum()
        if self.entropy_weight:
            loss = loss - self.entropy_weight * entropy.sum()
        if output.anchor is not None:
            loss = loss + output.anchor
        return QuantizerTerms(loss, {"code_entropy": entropy, "code_gap": gap}, output.terms)


def create_bank(
    num_codes: int,
    code_dim: int,
    num_heads: int,
    temperature: float | list[float] | Temperature | None,
    code_update: CodeUpdate | Literal["optimizer"],
    measure_variance: bool,
) -> PrototypeBank:
    """A bank whose codes move as told, with the default temperature for it."""
    if code_update == "optimizer":
        return PrototypeBank(
            num_codes,
            code_dim,
            num_heads=num_heads,
            temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
            measure_variance=True,
        )
    return MovingBank(
        num_codes,
        code_dim,
        update=code_update,
        num_heads=num_heads,
        temperature=Temperature(DISTORTION_TEMPERATURE, "distortion") if temperature is None else temperature,
        measure_variance=measure_variance,
    )
