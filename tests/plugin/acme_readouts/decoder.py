"""A decoder."""

from torch import Tensor, nn

from ddcl_lightning import Decoder


class StripDecoder(Decoder):
    """Every token back to a row of eight pixels; gray where there is padding."""

    def build(self, token_dim: int) -> None:
        self.linear = nn.Linear(token_dim, 8)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.linear(tokens)
