"""A decoder of sequences, token by token."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.decoders.base import Decoder, check_decoder_tokens
from ddcl_lightning.functional._common import zero_padding


class SequenceDecoder(Decoder):
    """Tokens back to vectors, ``W_2 GELU(W_1 t + b_1) + b_2`` for each token by itself.

    It looks at no neighbour on purpose: what it gets right the token has kept. A decoder with attention would guess
    the rest from the context, and a bottleneck would look better than it is.

    Args:
        out_dim: Dimension of the vectors: that of the target.
        hidden_dim: Width of the hidden layer.

    Raises:
        ValueError: If a size is below 1, or the tokens have another shape.
    """

    @typed
    def __init__(self, out_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        for name, value in (("out_dim", out_dim), ("hidden_dim", hidden_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Pass 1 or more.")
        self.out_dim, self.hidden_dim = out_dim, hidden_dim
        self.token_dim: int | None = None

    def build(self, token_dim: int) -> None:
        """Create the layers for tokens of dimension ``token_dim``."""
        self.token_dim = token_dim
        self.hidden = nn.Linear(token_dim, self.hidden_dim)
        self.output = nn.Linear(self.hidden_dim, self.out_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors ``(B, T, out_dim)`` of ``(B, T, token_dim)`` tokens; zero at padding."""
        check_decoder_tokens(self, tokens, self.token_dim)
        tokens = zero_padding(tokens, mask).to(self.hidden.weight.dtype)
        return zero_padding(self.output(gelu(self.hidden(tokens))), mask)
