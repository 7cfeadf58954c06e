"""The decoder protocol."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ddcl_lightning.functional._common import require_floating


class Decoder(nn.Module, ABC):
    """Base of decoders from a readout's tokens to their inputs. Subclass it and write ``build`` and ``forward``.

    Its parameters belong to the task and step at ``lr_task``.
    """

    @abstractmethod
    def build(self, token_dim: int) -> None:
        """Create what depends on the dimension of the tokens; called once, before the optimizers exist."""

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Decode ``(B, T, token_dim)`` tokens with mask ``(B, T)``, True for valid ones.

        Images ``(B, C, H, W)``, or one vector per token ``(B, T, *)``.
        """


def check_decoder_tokens(decoder: Decoder, tokens: Tensor, token_dim: int | None) -> None:
    """Raise unless the decoder is built, for tokens of this dimension.

    Raises:
        RuntimeError: If it is not built.
        TypeError: If the tokens are no floating-point tensor.
        ValueError: If a shape does not fit.
    """
    name = type(decoder).__name__
    if token_dim is None:
        raise RuntimeError(f"{name} does not know the dimension of its tokens. Call build(token_dim).")
    require_floating(tokens)
    if tokens.dim() != 3 or tokens.shape[-1] != token_dim or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens must have shape (B, T, token_dim = {token_dim}) with T >= 1; got {tuple(tokens.shape)}. A head "
            "whose tokens differ from its input in dimension must say so in its token_dim."
        )
