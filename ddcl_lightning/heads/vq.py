"""Hard vector quantization with a straight-through gradient as a readout."""

import torch

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.heads.quantizer_readout import CodebookHead
from ddcl_lightning.heads.width import check_width, widest
from ddcl_lightning.nn.vector_quantizer import CodebookInit, VectorQuantizer


class VQPooling(CodebookHead):
    """Hard vector quantization: every token becomes its nearest code, a sample the mean of its codes.

    The quantizer of VQ-VAE (van den Oord et al. 2017): nearest code (eq. 1, 2), straight-through gradient, and the
    losses ``||sg[z] - e||^2 + w ||z - sg[e]||^2`` (eq. 3), here the ``regularization`` of the readout: a mean over
    valid tokens, like ``L_q``. Adam moves the codes, as in the authors' first variant (no moving averages).

    The codes are in ``prototype_parameters()``: like DDCL's prototypes they step at ``lr_prototypes``, without
    weight decay, so that a comparison differs in the assignment alone. There is no temperature and no
    :class:`~ddcl_lightning.PrototypeBank`, so callbacks leave them alone, and ``init="kmeans"`` stands in for
    ``KMeansInitialization``. The projection, where there is one, belongs to the task.

    Args:
        num_codes: K, at least 1.
        commitment_weight: w >= 0, weight of the commitment relative to the codebook loss (beta = 0.25 in the paper).
        weight: Weight > 0 of both losses in the task's loss: 1 in the paper; by default 0.1, that of ``L_q`` in
            :class:`~ddcl_lightning.Classification`.
        init: ``"uniform"``, the authors' start in ``[-1/K, 1/K]``, under which most codes may never be used; or
            ``"kmeans"`` on the tokens of the first training batch, which needs K different ones.
        code_dim: d, dimension of the codes; by default ``embed_dim``, without a projection.
        max_parameters: Parameters that the head may have, instead of ``code_dim``; it always projects then.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If an argument is out of its range or both widths are given; in ``build``, if ``max_parameters`` is
            too small; in the first training step, if there are too few tokens for a k-means start.
    """

    quantizer: VectorQuantizer
    num_codes: int

    @typed
    def __init__(
        self,
        num_codes: int,
        commitment_weight: float = 0.25,
        weight: float = 0.1,
        init: CodebookInit = "uniform",
        code_dim: int | None = None,
        max_parameters: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_width("code_dim", code_dim, max_parameters)
        if not weight > 0:
            raise ValueError(
                f"weight must be > 0, or the codes would never learn; got {weight}. Leave it out for the default."
            )
        self.num_codes, self.commitment_weight, self.weight, self.init = num_codes, commitment_weight, weight, init
        self.code_dim, self.max_parameters = code_dim, max_parameters
        with torch.device("meta"):
            self._quantizer(1)  # refuse early what no embed_dim could mend
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int) -> VectorQuantizer:
        """A quantizer with codes of the given width, or of the largest within ``max_parameters``."""
        if self.max_parameters is None:
            return self._quantizer(embed_dim, code_dim=self.code_dim)
        width = widest(lambda dim: dim * (embed_dim + self.num_codes), self.max_parameters)
        return self._quantizer(embed_dim, code_dim=width, project=True)

    def _quantizer(self, dim: int, code_dim: int | None = None, project: bool = False) -> VectorQuantizer:
        return VectorQuantizer(
            dim,
            self.num_codes,
            code_dim=code_dim,
            project=project,
            commitment_weight=self.commitment_weight,
            init=self.init,
        )
