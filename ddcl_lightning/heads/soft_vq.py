"""Soft vector quantization as a readout: the bottleneck of an autoencoder, or a discrete summary of a sample."""

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.heads.quantizer_readout import CodebookHead
from ddcl_lightning.nn.quantizer import QuantizerGradient, SoftVectorQuantizer, TrainingOutput
from ddcl_lightning.nn.scaling import ScaleMode
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature


class SoftVQ(CodebookHead):
    """A :class:`~ddcl_lightning.SoftVectorQuantizer` between encoder and decoder (section 7.4, eq. 16).

    Its tokens are codes (while training also soft centroids, by choice); a sample is their mean. The commitment
    ``L_q``, free of the tokens' scale, and the entropy bonus are the readout's ``regularization``: the task's
    ``quantization_weight`` is not used. Codes start by ``KMeansInitialization``, their temperature, a fraction of the
    critical one of the tokens as they are, falls by ``TemperatureAnnealing(unit="critical")``, and they move by
    ``prototype_optimizer="TokenNormalized"``, under which none is left behind. Logged while training: ``code_entropy``
    (of the mean assignment, nats) and ``code_gap`` (between soft and hard codes, as a share of the tokens' variance).

    Args:
        num_codes: K per codebook.
        code_dim: d, dimension of a code; by default ``embed_dim // num_heads``.
        num_heads: H, independent codebooks on slices of a token (product quantization).
        temperature: Initial softness of the assignments, see there.
        commitment_weight: See :class:`~ddcl_lightning.SoftVectorQuantizer`, as for the arguments below.
        entropy_weight: See there.
        gradient: See there.
        training_output: See there.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.
        embedding_scale: See there, as for the weights above.

    Raises:
        ValueError: If an argument is out of its range; in ``build``, if sizes do not fit each other.
    """

    quantizer: SoftVectorQuantizer
    num_codes: int

    @typed
    def __init__(
        self,
        num_codes: int,
        code_dim: int | None = None,
        num_heads: int = 1,
        temperature: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        commitment_weight: float = 0.01,
        entropy_weight: float = 0.001,
        gradient: QuantizerGradient = "straight_through",
        training_output: TrainingOutput = "hard",
        embed_dim: int | None = None,
        embedding_scale: ScaleMode = "none",
    ) -> None:
        super().__init__()
        require_at_least(1, num_codes=num_codes, code_dim=code_dim, num_heads=num_heads)
        self.num_codes, self.code_dim, self.num_heads, self.temperature = num_codes, code_dim, num_heads, temperature
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.gradient, self.training_output, self.embedding_scale = gradient, training_output, embedding_scale
        self.num_codebooks = num_heads
        self.create(1 if code_dim else max(num_heads, 1))  # refuse early what no embed_dim could mend
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int) -> SoftVectorQuantizer:
        """The quantizer, with all of the arguments."""
        return SoftVectorQuantizer(
            embed_dim,
            self.num_codes,
            code_dim=self.code_dim,
            code_update="optimizer",
            num_heads=self.num_heads,
            temperature=self.temperature,
            commitment_weight=self.commitment_weight,
            entropy_weight=self.entropy_weight,
            gradient=self.gradient,
            training_output=self.training_output,
            embedding_scale=self.embedding_scale,
        )
