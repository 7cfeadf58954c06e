"""Hard vector quantization with a straight-through gradient."""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.distributed import broadcast_object, token_weight
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.functional._common import masked_mean, zero_padding
from ddcl_lightning.nn.guarded_state import FINITE, FLAG, GuardedState, Rules
from ddcl_lightning.nn.initialization import initial_prototypes
from ddcl_lightning.nn.quantizer_base import Quantizer, QuantizerOutput

CodebookInit = Literal["uniform", "kmeans"]
START_TOKENS = 65_536  # tokens of the first batch, over all processes, that a k-means start uses


class VectorQuantizer(GuardedState, Quantizer):
    """Replaces every token by its nearest code (van den Oord et al. 2017, eq. 1 to 3).

    The loss is ``||sg[z] - e||^2 + beta ||z - sg[e]||^2``, each a mean over valid tokens; the gradient of what the
    decoder reads passes to the tokens unchanged.

    Args:
        dim: D, dimension of the tokens.
        num_codes: K, at least 1.
        code_dim: d, dimension of the codes; by default D.
        project: Map the tokens into the codes' space by a matrix that starts orthogonal; always so where d is not D.
        beta: Weight >= 0 of the commitment relative to the codebook loss.
        init: ``"uniform"`` in ``[-1/K, 1/K]``, or ``"kmeans"`` of the first training batch.

    Attributes:
        codebook: Parameter ``(K, d)``.
        counts: Buffer ``(K,)`` int64: valid tokens on each code in the last call, on this process.
        initialized: Buffer, saved with the state: 1 if the codes were set from data, else 0. Frozen codes never are.

    Raises:
        ValueError: If an argument is out of its range; in the first training step, if there are too few tokens for a
            k-means start.
    """

    counts: Tensor
    initialized: Tensor
    state_rules: ClassVar[Rules] = {"codebook": FINITE, "initialized": FLAG}

    @typed
    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        code_dim: int | None = None,
        project: bool = False,
        beta: float = 0.25,
        init: CodebookInit = "uniform",
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, num_codes=num_codes, code_dim=code_dim)
        if not beta >= 0:
            raise ValueError(f"beta must be >= 0; got {beta}.")
        if init not in get_args(CodebookInit):
            raise ValueError(f"init must be one of {get_args(CodebookInit)}; got {init!r}.")
        width = dim if code_dim is None else code_dim
        self.dim, self.num_codes, self.beta, self.init = dim, num_codes, beta, init
        self.projection: nn.Linear | None = None
        if project or width != dim:
            self.projection = nn.Linear(dim, width, bias=False)
            nn.init.orthogonal_(self.projection.weight)
        self.codebook = nn.Parameter(torch.empty(num_codes, width).uniform_(-1 / num_codes, 1 / num_codes))
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64), persistent=False)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.float32))

    @property
    def output_dim(self) -> int:
        """d, dimension of the codes."""
        return self.codebook.shape[1]

    def prototype_parameters(self) -> list[nn.Parameter]:
        """The codebook."""
        return [self.codebook]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``(B, T, D)`` tokens with mask ``(B, T)``."""
        tokens = zero_padding(tokens, mask)
        embedded = tokens if self.projection is None else self.projection(tokens)
        if self.training and self.init == "kmeans" and self.codebook.requires_grad and not bool(self.initialized):
            self._start(embedded if mask is None else embedded[mask])
        codes = nearest_prototype(embedded.detach().flatten(0, 1), self.codebook.detach()).view(embedded.shape[:-1])
        nearest = self.codebook[codes]
        if mask is not None:
            codes = codes.masked_fill(~mask, -1)
        self.counts.copy_(torch.bincount(codes.flatten() + 1, minlength=len(self.codebook) + 1)[1:])

        def distance(left: Tensor, right: Tensor) -> Tensor:
            squared = (left.float() - right.float()).square().sum(-1)
            mean = masked_mean(squared.flatten(), None if mask is None else mask.flatten())
            return mean * token_weight(mask if self.training else None)

        straight = embedded + (nearest.to(embedded.dtype) - embedded).detach()
        loss = distance(embedded.detach(), nearest) + self.beta * distance(embedded, nearest.detach())
        return QuantizerOutput(zero_padding(straight, mask), codes, loss)

    @torch.no_grad()
    def _start(self, tokens: Tensor) -> None:
        """Put the codes on the k-means centroids of ``(N, d)`` tokens, the same on every process."""
        sample = Reservoir(START_TOKENS)
        sample.add(tokens.flatten(0, -2).float())
        codes = broadcast_object(initial_prototypes(sample.gather(), len(self.codebook)))
        self.codebook.copy_(codes)
        self.initialized.fill_(1.0)
