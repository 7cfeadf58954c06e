"""Prototypes after a block: its tokens go on as mixtures."""

from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.nn.attention import DDCLAttention


class SerialPrototypes(PrototypeAdapter):
    """Serial placement: the tokens that a block has contextualized go on as mixtures of prototypes.

    For a network whose tokens are to be made of a small vocabulary from some depth on: read it, compress it, or look at
    it with every bank callback. Between two blocks of a network::

        x = SerialPrototypes(DDCLAttention(64, 16))(block(x))

    A mixture alone is a bottleneck of K vectors; with ``residual=True`` the layer adds ``C W_o`` to the tokens instead
    (eq. 5). Both are compared on a small task in ``docs/measurements.md``: mixtures after every block cost accuracy.

    Args:
        layer: Tokens of dimension D to tokens of dimension D.

    Raises:
        ValueError: If the layer gives out another dimension, or needs a context.
    """

    @typed
    def __init__(self, layer: DDCLAttention) -> None:
        super().__init__()
        require_same_dim(layer)
        self.layer = layer

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's tokens, ``(B, T, D)``."""
        output = self.layer(tokens, self.mask if mask is None else mask)
        self.terms = output.terms
        result: Tensor = output.tokens
        return result

    def merge(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The block's output through the layer."""
        result: Tensor = self(output)
        return result


def require_same_dim(layer: DDCLAttention) -> None:
    """Raise if a layer changes the dimension of its tokens or needs a context."""
    if layer.output_dim != layer.embed_dim:
        raise ValueError(
            f"layer must give out tokens of the dimension that it takes, {layer.embed_dim}; got {layer.output_dim}. "
            "Set output_projection=True."
        )
    if layer.context_dim is not None:
        raise ValueError(
            f"layer must need no context inside of a network; got context_dim = {layer.context_dim}. Call it yourself."
        )
