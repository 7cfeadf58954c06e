"""A multilayer perceptron on each token, the mirror of MLPBackbone."""

from collections.abc import Sequence

from torch import Tensor

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning.backbones.mlp import perceptron
from ddcl_lightning.decoders.base import Decoder, check_decoder_tokens
from ddcl_lightning.functional._common import zero_padding


class MLPDecoder(Decoder):
    """Linear layers with ReLU between them on each token by itself, back to vectors: the decoder of an RQ-VAE.

    Args:
        out_dim: Dimension of the vectors: that of the target.
        widths: Of the hidden layers; none of them makes a linear map.

    Raises:
        ValueError: If a size is below 1, or the tokens have another shape.
    """

    @typed
    def __init__(self, out_dim: int, widths: Sequence[int] = (256, 512)) -> None:
        super().__init__()
        require_at_least(1, out_dim=out_dim)
        if any(width < 1 for width in widths):
            raise ValueError(f"widths must be at least 1 each; got {list(widths)}. Pass 1 or more.")
        self.out_dim, self.widths = out_dim, list(widths)
        self.token_dim: int | None = None

    def build(self, token_dim: int) -> None:
        """Create the layers for tokens of dimension ``token_dim``."""
        self.token_dim = token_dim
        self.layers = perceptron([token_dim, *self.widths, self.out_dim])

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors ``(B, T, out_dim)`` of ``(B, T, token_dim)`` tokens; zero at padding."""
        check_decoder_tokens(self, tokens, self.token_dim)
        tokens = zero_padding(tokens, mask).to(next(self.layers.parameters()).dtype)
        return zero_padding(self.layers(tokens), mask)
