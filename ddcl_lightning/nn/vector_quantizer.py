"""Hard vector quantization with a straight-through gradient."""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.distributed import broadcast_object, token_weight
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.functional import code_counts, nearest_prototype
from ddcl_lightning.functional._common import check_mask, mark_padding, masked_mean, require_valid_token, zero_padding
from ddcl_lightning.nn.guarded_state import FINITE, FLAG, GuardedState, Rules
from ddcl_lightning.nn.initialization import initial_prototypes
from ddcl_lightning.nn.quantizer_base import Quantizer, QuantizerOutput, QuantizerTerms, as_indices, check_indices

CodebookInit = Literal["uniform", "kmeans"]
START_TOKENS = 65_536  # tokens of the first batch, over all processes, that a k-means start uses


class VectorQuantizer(GuardedState, Quantizer):
    """Replaces every token by its nearest code (van den Oord et al. 2017, eq. 1 to 3).

    The loss is ``||sg[z] - e||^2 + w ||z - sg[e]||^2``, each a mean over valid tokens; the gradient of what the
    decoder reads passes to the tokens unchanged.

    Args:
        dim: D, dimension of the tokens.
        num_codes: K, at least 1.
        code_dim: d, dimension of the codes; by default D.
        project: Map the tokens into the codes' space by a matrix that starts orthogonal; always so where d is not D.
        commitment_weight: w >= 0, weight of the commitment relative to the codebook loss.
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
        commitment_weight: float = 0.25,
        init: CodebookInit = "uniform",
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, num_codes=num_codes, code_dim=code_dim)
        if not commitment_weight >= 0:
            raise ValueError(f"commitment_weight must be >= 0; got {commitment_weight}. Set 0 for none.")
        if init not in get_args(CodebookInit):
            raise ValueError(f"init must be one of {get_args(CodebookInit)}; got {init!r}. Choose one of them.")
        width = dim if code_dim is None else code_dim
        self.dim, self.num_codes, self.commitment_weight, self.init = dim, num_codes, commitment_weight, init
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

    @property
    def waits_for_tokens(self) -> bool:
        """True before a k-means start; frozen codes wait for none."""
        return self.init == "kmeans" and self.codebook.requires_grad and not bool(self.initialized)

    def prototype_parameters(self) -> list[nn.Parameter]:
        """The codebook."""
        return [self.codebook]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``(B, T, D)`` tokens with mask ``(B, T)``, True for valid tokens.

        Raises:
            ValueError: If a shape does not fit or (looked at on the CPU only) no token is valid.
            TypeError: If the mask is not boolean.
        """
        embedded = self._embed(tokens, mask)
        require_valid_token(embedded, mask)
        if self.training and self.init == "kmeans" and self.codebook.requires_grad and not bool(self.initialized):
            self._start(embedded if mask is None else embedded[mask])
        codes = self._nearest(embedded)
        nearest = self.codebook[codes]
        codes = mark_padding(codes, mask)
        self.counts.copy_(code_counts(codes.flatten(), len(self.codebook)))

        def distance(left: Tensor, right: Tensor) -> Tensor:
            squared = (left.float() - right.float()).square().sum(-1)
            mean = masked_mean(squared.flatten(), None if mask is None else mask.flatten())
            return mean * token_weight(mask if self.training else None)

        straight = embedded + (nearest.to(embedded.dtype) - embedded).detach()
        loss = distance(embedded.detach(), nearest) + self.commitment_weight * distance(embedded, nearest.detach())
        return QuantizerOutput(zero_padding(straight, mask), codes, QuantizerTerms(loss))

    @torch.no_grad()
    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hard codes ``(B, T)`` int64 of ``(B, T, D)`` tokens, as the forward pass gives them; -1 at padding.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If the mask is not boolean.
        """
        return mark_padding(self._nearest(self._embed(tokens, mask)), mask)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes ``(B, T, output_dim)`` of indices ``(B, T)``, as a decoder reads them; zero for -1, that of padding.

        Raises:
            ValueError: If the shape does not fit, or an index is outside of [0, K) and not -1.
        """
        indices = as_indices(indices, "(B, T)")
        check_indices(indices, indices.dim() == 2, self.num_codes, "(B, T)")
        return zero_padding(self.codebook[indices.clamp(min=0)], indices >= 0)

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``(B, T, D)`` in the codes' space, ``(B, T, d)``, zero at padding."""
        if tokens.dim() != 3 or tokens.shape[-1] != self.dim or not tokens.is_floating_point():
            raise ValueError(
                f"tokens must be floating point of shape (B, T, dim = {self.dim}); got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}. Build the quantizer for their dimension, or flatten a feature map."
            )
        check_mask(tokens, mask)
        tokens = zero_padding(tokens, mask)
        return tokens if self.projection is None else self.projection(tokens)

    def _nearest(self, embedded: Tensor) -> Tensor:
        """Index of the nearest code of each vector ``(B, T, d)``, padding included."""
        return nearest_prototype(embedded.detach().flatten(0, 1), self.codebook.detach()).view(embedded.shape[:-1])

    @torch.no_grad()
    def _start(self, tokens: Tensor) -> None:
        """Put the codes on the k-means centroids of ``(N, d)`` tokens, the same on every process."""
        sample = Reservoir(START_TOKENS)
        sample.add(tokens.flatten(0, -2).float())
        codes = broadcast_object(initial_prototypes(sample.gather(), len(self.codebook)))
        self.codebook.copy_(codes)
        self.initialized.fill_(1.0)
