"""Prototypes in the place of a LayerNorm."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.functional._common import zero_padding
from ddcl_lightning.nn.attention import refuse_bank_arguments
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.temperature import Temperature

SOFT = 0.5  # of the critical temperature


class PrototypeNorm(PrototypeAdapter):
    """Prototype normalization: a token relative to its soft centroid, in the place of a LayerNorm.

    LayerNorm subtracts from a token the mean of its own entries and divides by their deviation. Here the centre is
    where the token lies among the prototypes (eq. 4), and the scale is local, the distance from there::

        y_n = gain (z_n - c_n) / rms(z_n - c_n) + bias

    With one prototype at zero this is RMSNorm. It costs more time than a LayerNorm, and at a low temperature makes a
    network sensitive to noise in its inputs; see ``docs/measurements.md``.

    Args:
        dim: D, dimension of the tokens.
        num_prototypes: K; not with ``bank``.
        temperature: Softness of the assignments, see :class:`~ddcl_lightning.PrototypeBank`. Higher than elsewhere by
            default: noisy inputs need it.
        bank: A bank of one head to share; its dimension must be D.
        eps: Smallest mean square to divide by, > 0.

    Raises:
        ValueError: If an argument is out of its range, there is neither ``num_prototypes`` nor a bank, or the bank does
            not fit.
    """

    @typed
    def __init__(
        self,
        dim: int,
        num_prototypes: int | None = None,
        *,
        temperature: float | list[float] | Temperature = SOFT,
        bank: PrototypeBank | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps must be > 0; got {eps}. Leave it out for the default.")
        if bank is None:
            if num_prototypes is None:
                raise ValueError("num_prototypes must be given, or a bank to share; got neither. Give one of them.")
            bank = PrototypeBank(num_prototypes, dim, temperature=temperature)
        else:
            refuse_bank_arguments(
                num_prototypes=num_prototypes,
                temperature=None if temperature == SOFT else temperature,
            )
        if bank.num_heads != 1 or bank.dim != dim:
            raise ValueError(
                f"bank must have one head of dimension dim = {dim}; got {bank.num_heads} of dimension {bank.dim}. "
                "A norm reads the tokens as they are; DDCLAttention shares banks of any dimension."
            )
        self.dim, self.eps, self.bank = dim, eps, bank
        self.gain = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalized tokens, ``(B, T, D)``, in their dtype; zero at padding."""
        mask = self.mask if mask is None else mask
        output = self.bank(tokens, mask)
        self.terms = output.terms
        # A NaN left in the padding would reach the gradients, as 0 * NaN.
        rest = zero_padding(tokens, mask) - output.centroids
        normalized = rest * (rest.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return zero_padding(self.gain * normalized + self.bias, mask).to(tokens.dtype)

    def merge(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The block's output, normalized."""
        result: Tensor = self(output)
        return result

    def extra_repr(self) -> str:
        """Dimension, for ``print``."""
        return f"{self.dim}"
