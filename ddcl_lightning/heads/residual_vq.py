"""Residual vector quantization as a readout: semantic IDs, or the bottleneck of an autoencoder."""

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.heads.quantizer_readout import CodebookHead
from ddcl_lightning.nn.moving_bank import CodeUpdate
from ddcl_lightning.nn.quantizer import COMMITMENT_RATIO, DEFAULT_UPDATE
from ddcl_lightning.nn.residual_quantizer import ResidualVectorQuantizer
from ddcl_lightning.nn.scaling import ScaleMode
from ddcl_lightning.nn.temperature import Temperature


class ResidualVQ(CodebookHead):
    """A :class:`~ddcl_lightning.ResidualVectorQuantizer` between encoder and decoder.

    Its tokens are sums of one code per level; a sample is their mean. Codes start and move by themselves, so that
    neither ``KMeansInitialization`` nor a prototype optimizer has anything to do, and the encoder's gradient carries
    the commitment. Logged while training: the error after each level, as a share of the tokens' variance. Metrics count
    the codes of each level; callbacks find the banks as ``head.quantizer.levels.0`` and so on.

    Args:
        num_codes: K, codes of each level.
        num_levels: L.
        code_dim: See :class:`~ddcl_lightning.ResidualVectorQuantizer`, as for the arguments below.
        num_heads: See there.
        shared_codebook: See there.
        level_dropout: See there.
        code_update: See there.
        temperature: See there.
        commitment_ratio: See there.
        embedding_scale: See there.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If an argument is out of its range; in ``build``, if sizes do not fit each other.
    """

    quantizer: ResidualVectorQuantizer
    num_codes: int

    @typed
    def __init__(
        self,
        num_codes: int,
        num_levels: int,
        code_dim: int | None = None,
        num_heads: int = 1,
        shared_codebook: bool = False,
        level_dropout: float = 0.0,
        code_update: CodeUpdate = DEFAULT_UPDATE,
        temperature: float | list[float] | Temperature | None = None,
        commitment_ratio: float = COMMITMENT_RATIO,
        embedding_scale: ScaleMode = "none",
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, num_codes=num_codes, num_levels=num_levels, code_dim=code_dim, num_heads=num_heads)
        self.num_codes, self.num_levels, self.code_dim, self.num_heads = num_codes, num_levels, code_dim, num_heads
        self.shared_codebook, self.level_dropout, self.code_update = shared_codebook, level_dropout, code_update
        self.temperature, self.commitment_ratio, self.embedding_scale = temperature, commitment_ratio, embedding_scale
        self.num_codebooks = num_levels * num_heads
        self.create(1 if code_dim else num_heads)  # refuse early what no embed_dim could mend
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int) -> ResidualVectorQuantizer:
        """The quantizer, with all of the arguments."""
        return ResidualVectorQuantizer(
            embed_dim,
            self.num_codes,
            self.num_levels,
            code_dim=self.code_dim,
            num_heads=self.num_heads,
            shared_codebook=self.shared_codebook,
            level_dropout=self.level_dropout,
            code_update=self.code_update,
            temperature=self.temperature,
            commitment_ratio=self.commitment_ratio,
            embedding_scale=self.embedding_scale,
        )
