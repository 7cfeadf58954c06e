"""Hard vector quantisation with a straight-through gradient as a readout."""

from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import broadcast_object, token_weight
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.functional._common import masked_mean, zero_padding
from ddcl_lightning.heads.base import ReadoutOutput, check_tokens, fill_padding
from ddcl_lightning.heads.pooling import PoolingHead, PoolingLayer, code_shares, mean_token
from ddcl_lightning.nn.guarded_state import FINITE, FLAG, GuardedState, Rules
from ddcl_lightning.nn.initialization import initial_prototypes

CodebookInit = Literal["uniform", "kmeans"]
START_TOKENS = 65_536  # tokens of the first batch, over all processes, that a k-means start uses


class Quantized(NamedTuple):
    """Output of :class:`VectorQuantizer` for ``(B, T, D)`` tokens.

    Attributes:
        tokens: Codes in place of the tokens, ``(B, T, d)``; the gradient passes to the tokens unchanged.
        codes: Index of each token's code, ``(B, T)`` int64.
        codebook_loss: ``||sg[z] - e||^2``, mean over valid tokens, a scalar.
        commitment_loss: ``||z - sg[e]||^2``, likewise.
    """

    tokens: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(GuardedState, PoolingLayer):
    """Replaces every token by its nearest code (van den Oord et al. 2017, eq. 1 to 3).

    Args:
        embed_dim: D, dimension of the tokens.
        dim: d, dimension of the codes.
        num_codes: K.
        project: Map the tokens into the codes' space by a matrix that starts orthogonal; needed where d is not D.
        init: ``"uniform"`` in ``[-1/K, 1/K]``, or ``"kmeans"`` of the first training batch.

    Attributes:
        codebook: Parameter ``(K, d)``.
        counts: Buffer ``(K,)`` int64: valid tokens on each code in the last call, on this process.
        initialized: Buffer, saved with the state: 1 if the codes were set from data, else 0. Frozen codes never are.
    """

    counts: Tensor
    initialized: Tensor
    state_rules: ClassVar[Rules] = {"codebook": FINITE, "initialized": FLAG}

    def __init__(self, embed_dim: int, dim: int, num_codes: int, project: bool, init: CodebookInit = "uniform") -> None:
        super().__init__()
        self.init, self.output_dim = init, dim
        self.projection: nn.Linear | None = None
        if project:
            self.projection = nn.Linear(embed_dim, dim, bias=False)
            nn.init.orthogonal_(self.projection.weight)
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64), persistent=False)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.float32))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantise ``(B, T, D)`` tokens with mask ``(B, T)``."""
        embedded = tokens if self.projection is None else self.projection(tokens)
        if self.training and self.init == "kmeans" and self.codebook.requires_grad and not bool(self.initialized):
            self._start(embedded if mask is None else embedded[mask])
        codes = nearest_prototype(embedded.detach().flatten(0, 1), self.codebook.detach()).view(embedded.shape[:-1])
        nearest = self.codebook[codes]
        used = codes if mask is None else codes[mask]
        self.counts.copy_(torch.bincount(used.flatten(), minlength=len(self.codebook)))

        def distance(left: Tensor, right: Tensor) -> Tensor:
            squared = (left.float() - right.float()).square().sum(-1)
            mean = masked_mean(squared.flatten(), None if mask is None else mask.flatten())
            return mean * token_weight(mask if self.training else None)

        straight = embedded + (nearest.to(embedded.dtype) - embedded).detach()
        return Quantized(straight, codes, distance(embedded.detach(), nearest), distance(embedded, nearest.detach()))

    @torch.no_grad()
    def _start(self, tokens: Tensor) -> None:
        """Put the codes on the k-means centroids of ``(N, d)`` tokens, the same on every process."""
        sample = Reservoir(START_TOKENS)
        sample.add(tokens.flatten(0, -2).float())
        codes = broadcast_object(initial_prototypes(sample.gather(), len(self.codebook)))
        self.codebook.copy_(codes)
        self.initialized.fill_(1.0)


class VQPooling(PoolingHead):
    """Hard vector quantisation: every token becomes its nearest code, a sample the mean of its codes.

    The quantiser of VQ-VAE (van den Oord et al. 2017): nearest code (eq. 1, 2), straight-through gradient, and the
    losses ``||sg[z] - e||^2 + beta ||z - sg[e]||^2`` (eq. 3), here the ``regularization`` of the readout: a mean over
    valid tokens, like ``L_q``. Adam moves the codes, as in the authors' first variant (no moving averages).

    The codes are in ``prototype_parameters()``: like DDCL's prototypes they step at ``lr_prototypes``, without
    weight decay, so that a comparison differs in the assignment alone. There is no temperature and no
    :class:`~ddcl_lightning.PrototypeBank`, so callbacks leave them alone, and ``init="kmeans"`` stands in for
    ``KMeansInitialization``. The projection, where there is one, belongs to the task.

    Args:
        num_codes: K, at least 1.
        beta: Weight >= 0 of the commitment relative to the codebook loss (0.25 in the paper).
        weight: Weight > 0 of both losses in the task's loss: 1 in the paper; by default 0.1, that of ``L_q`` in
            :class:`~ddcl_lightning.Classification`.
        init: ``"uniform"``, the authors' start in ``[-1/K, 1/K]``, under which most codes may never be used; or
            ``"kmeans"`` on the tokens of the first training batch, which needs K different ones.
        dim: d, dimension of the codes; by default ``embed_dim``, without a projection.
        max_parameters: Parameters that the head may have, instead of ``dim``; it always projects then.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If an argument is out of its range or both widths are given; in ``build``, if ``max_parameters`` is
            too small; in the first training step, if there are too few tokens for a k-means start.
    """

    layer: VectorQuantizer
    num_codes: int

    @typed
    def __init__(
        self,
        num_codes: int,
        beta: float = 0.25,
        weight: float = 0.1,
        init: CodebookInit = "uniform",
        dim: int | None = None,
        max_parameters: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__(dim, max_parameters)
        if num_codes < 1:
            raise ValueError(f"num_codes must be at least 1; got {num_codes}.")
        if not beta >= 0:
            raise ValueError(f"beta must be >= 0; got {beta}.")
        if not weight > 0:
            raise ValueError(f"weight must be > 0, or the codes would never learn; got {weight}.")
        if init not in get_args(CodebookInit):
            raise ValueError(f"init must be one of {get_args(CodebookInit)}; got {init!r}.")
        self.num_codes, self.beta, self.weight, self.init, self.dim = num_codes, beta, weight, init, dim
        if embed_dim is not None:
            self.build(embed_dim)

    @property
    def token_dim(self) -> int:
        """d, dimension of the codes."""
        return self.layer.output_dim

    def create_layer(self, embed_dim: int, width: int | None) -> PoolingLayer:
        """A quantiser with codes of ``width``."""
        project = self.max_parameters is not None or width not in (None, embed_dim)
        return VectorQuantizer(embed_dim, width or embed_dim, self.num_codes, project, self.init)

    def prototype_parameters(self) -> list[nn.Parameter]:
        """The codebook."""
        return [self.layer.codebook]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Quantise and average ``(B, T, embed_dim)`` tokens; the share of each code is returned in evaluation mode."""
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        output = self.layer(tokens, mask)
        shares = None
        if not self.training:
            shares = code_shares(output.codes.unsqueeze(-1), self.num_codes, mask)
        codes = output.codes if mask is None else output.codes.masked_fill(~mask, -1)
        loss = self.weight * (output.codebook_loss + self.beta * output.commitment_loss)
        return ReadoutOutput(
            zero_padding(output.tokens, mask),
            mean_token(output.tokens, mask),
            assignments=shares,
            regularization=loss,
            codes=codes.unsqueeze(-1),
        )
