"""Prototypes as the basis of a feed-forward layer (the paper's third placement), linear in K."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.functional._common import check_mask, require_floating, zero_padding
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, Temperature

DEFAULT_PROTOTYPE_DIM = 8
CHUNK = 4096  # tokens that go through the layer at a time when it starts


class DDCLFeedForward(PrototypeAdapter):
    """A transformer block's MLP made of prototypes: tokens in, what the block adds to its residual stream out.

    Every head reads a slice of the token and gives out the soft centroid of its K prototypes (eq. 4 and 6); ``W_o``
    takes the heads back to D (eq. 7), and a linear path carries what needs no prototypes::

        y = A x + b + W_o [ sum_k q_k(W_h x) p_k ]_h

    With ``linear=False`` it is the paper's layer without its residual. The defaults have a quarter of the parameters of
    an MLP of width 4 D; ``num_heads`` is what to raise for more. A narrower MLP does as well or better, see
    ``docs/measurements.md``: this layer is for those who want to look at its prototypes.

    Args:
        dim: D, dimension of the tokens, at least 1.
        num_prototypes: K per head.
        num_heads: H; by default as many as fill half of D, ``max(1, D // (2 * prototype_dim))``.
        prototype_dim: d, dimension of one head's slice, free of D; 8, or D where that is less.
        temperature: Softness of the assignments, see :class:`~ddcl_lightning.PrototypeBank`.
        linear: The path A x.

    Attributes:
        bank: The prototypes, a :class:`~ddcl_lightning.PrototypeBank` that callbacks find.
        terms: Loss terms ``(H,)`` of the last call, for :func:`~ddcl_lightning.adapters.insertion.quantization_loss`.
        mask: ``(B, T)`` boolean for calls that bring none, or None.

    Raises:
        ValueError: If a size is below 1 or the temperature is not positive.
    """

    @typed
    def __init__(
        self,
        dim: int,
        num_prototypes: int = 16,
        *,
        num_heads: int | None = None,
        prototype_dim: int | None = None,
        temperature: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        linear: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, prototype_dim=prototype_dim)
        if prototype_dim is None:
            prototype_dim = min(dim, DEFAULT_PROTOTYPE_DIM)
        if num_heads is None:
            num_heads = max(1, dim // (2 * max(1, prototype_dim)))
        self.bank = PrototypeBank(
            num_prototypes,
            prototype_dim,
            num_heads=num_heads,
            temperature=temperature,
        )
        self.dim, width = dim, num_heads * prototype_dim
        self.input_projection = nn.Linear(dim, width, bias=False)
        nn.init.orthogonal_(self.input_projection.weight)
        self.output_projection = nn.Linear(width, dim)
        self.linear = nn.Linear(dim, dim, bias=False) if linear else None

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens that the block adds to its residual stream.

        Args:
            tokens: ``(*, D)``, any float dtype.
            mask: ``(*)`` boolean, True for valid tokens; padding enters no term and no gradient.

        Returns:
            ``(*, D)``. The output at padding means nothing, as that of an MLP.

        Raises:
            ValueError: If a shape does not fit or a value is not finite.
        """
        mask = self.mask if mask is None else mask
        self._check(tokens)
        check_mask(tokens, mask)
        tokens = zero_padding(tokens, mask)  # a NaN left there would reach the gradients of the projections
        embedded = self.input_projection(tokens)
        output = self.bank(embedded, mask)
        self.terms = output.terms
        result: Tensor = self.output_projection(output.centroids)
        return result if self.linear is None else result + self.linear(tokens)

    def merge(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The block's output with what this layer adds to it."""
        result: Tensor = output + self(output)
        return result

    @torch.no_grad()
    def start_from(
        self, tokens: Tensor, targets: Tensor | None = None, *, num_restarts: int = 1, seed: int = 0
    ) -> None:
        """Initialize from tokens and targets: prototypes by k-means, T from it, the output maps by least squares.

        Args:
            tokens: ``(N, D)``, valid tokens only.
            targets: ``(N, D)``, what an MLP made of them; then ``A``, ``W_o`` and ``b`` are the (ridge) least-squares
                solution for the mixtures as they are. None leaves them.
            num_restarts: Runs of k-means per head.
            seed: Seed of k-means.

        Raises:
            ValueError: If a shape does not fit, a value is not finite, or fewer than K slices of a head are distinct.
        """
        self._check(tokens)
        bank, training = self.bank, self.training
        bank.initialize(self.input_projection(tokens), num_restarts=num_restarts, seed=seed)
        if targets is not None:
            self.eval()  # T was set from all the tokens; chunks of them must not move it
            self._solve(tokens, targets)
            self.train(training)

    def extra_repr(self) -> str:
        """Dimension, for ``print``."""
        return f"dim={self.dim}"

    def _check(self, tokens: Tensor) -> None:
        require_floating(tokens)
        if tokens.shape[-1] != self.dim:
            raise ValueError(
                f"tokens must have last dimension dim = {self.dim}; got shape {tuple(tokens.shape)}. Build the layer "
                "for their dimension."
            )

    def _solve(self, tokens: Tensor, targets: Tensor) -> None:
        """Ridge regression of the targets on mixtures and tokens, in float64."""
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens, {tuple(tokens.shape)}; got {tuple(targets.shape)}. Give the "
                "output of the MLP for each token."
            )
        features = []
        for chunk in torch.split(tokens, CHUNK):
            mixed = self.bank(self.input_projection(chunk)).centroids
            features.append(mixed if self.linear is None else torch.cat([mixed, chunk], -1))
        weight, bias = ridge_regression(torch.cat(features), targets)
        width = self.output_projection.in_features
        self.output_projection.weight.copy_(weight[:, :width])
        self.output_projection.bias.copy_(bias)
        if self.linear is not None:
            self.linear.weight.copy_(weight[:, width:])


@torch.no_grad()
def ridge_regression(features: Tensor, targets: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The linear map of least (penalized) squared error.

    Args:
        features: ``(N, F)``.
        targets: ``(N, D)``.
        ridge: Penalty > 0 on the squared weights, as a share of the mean variance of the features.

    Returns:
        Weight ``(D, F)`` and bias ``(D,)``, float64.

    Raises:
        ValueError: If a value is not finite.
    """
    x, y = features.to(torch.float64), targets.to(torch.float64)
    for name, value in (("features", x), ("targets", y)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite; got NaN or infinity. Check the model that they come from.")
    mean, y_mean = x.mean(0), y.mean(0)
    x = x - mean
    gram = x.mT @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    weight = torch.linalg.solve(gram, x.mT @ (y - y_mean)).mT
    return weight, y_mean - weight @ mean
