"""Quantizers as readouts: their common base, and the head that takes any of them."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional import code_counts
from ddcl_lightning.heads.base import (
    Head,
    ReadoutOutput,
    check_classifier,
    check_rebuild,
    check_tokens,
    fill_padding,
)
from ddcl_lightning.heads.contracts import check_code_range, check_quantizer, check_quantizer_output
from ddcl_lightning.heads.pooling import mean_token
from ddcl_lightning.nn.projected_quantizer import ProjectedQuantizer
from ddcl_lightning.nn.quantizer_base import Quantizer
from ddcl_lightning.nn.token_weights import uniform_weights


class CodebookHead(Head):
    """A quantizer between encoder and decoder: tokens become codes, a sample the mean of its codes.

    Subclass it and write ``create``. The quantizer's loss is the readout's ``regularization``; in evaluation mode the
    readout's ``assignments`` are the share of each code in a sample.

    Attributes:
        quantizer: The :class:`~ddcl_lightning.Quantizer`, once built.
        weight: Weight of the quantizer's loss in that of the task.
    """

    quantizer: Quantizer
    weight: float = 1.0

    @abstractmethod
    def create(self, embed_dim: int) -> Quantizer:
        """The quantizer for tokens of dimension ``embed_dim``; called once."""

    def build(self, embed_dim: int) -> None:
        """Create the quantizer for tokens of dimension ``embed_dim``."""
        if check_rebuild(self, embed_dim):
            return
        quantizer = self.create(embed_dim)
        check_quantizer(self, quantizer)
        self.quantizer = quantizer.train(self.training)
        if isinstance(quantizer, ProjectedQuantizer):
            quantizer.layout.assume(3, "last")
        self.num_codes, self.num_codebooks = self.quantizer.num_codes, self.quantizer.num_codebooks
        self.pooled_dim = self.quantizer.output_dim
        super().build(embed_dim)

    @property
    def token_dim(self) -> int:
        """Dimension of the quantized tokens."""
        return super().token_dim if self.input_dim is None else self.quantizer.output_dim

    def prototype_parameters(self) -> list[nn.Parameter]:
        """The quantizer's."""
        return self.quantizer.prototype_parameters()

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The quantizer's."""
        return self.quantizer.embedding_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Quantize ``(B, T, embed_dim)`` tokens; the share of each code is returned in evaluation mode."""
        check_tokens(self, tokens, mask)
        tokens, mask = fill_padding(tokens, mask)
        output = check_quantizer_output(self.quantizer, tokens, self.quantizer(tokens, mask))
        codes = output.indices.reshape(*tokens.shape[:2], self.quantizer.num_codebooks)
        if not self.training:
            check_code_range(self.quantizer, codes)
        return ReadoutOutput(
            output.quantized,
            mean_token(output.quantized, mask),
            assignments=None if self.training else code_shares(codes, self.quantizer.num_codes),
            regularization=None if output.terms.loss is None else self.weight * output.terms.loss,
            codes=codes,
            signals={name: value.mean() for name, value in output.terms.signals.items()},
        )

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Terms ``(B, T, 1, K, C)``: what each token adds by the code that stands for it.

        Raises:
            ValueError: If a shape does not fit, or a token has codes of several codebooks.
        """
        check_classifier(self, classifier)
        readout = self(tokens, mask)
        if self.num_codebooks > 1 or readout.codes is None:
            raise ValueError(
                f"{type(self).__name__} has no exact contributions of single codes: a token has {self.num_codebooks}, "
                "one per codebook. Use one codebook."
            )
        weights = uniform_weights(readout.tokens, mask)
        scores = torch.einsum("bt,btd,cd->btc", weights, readout.tokens.to(weights.dtype), classifier.weight)
        chosen = one_hot(readout.codes.clamp(min=0), self.quantizer.num_codes)  # (B, T, 1, K); padding has no weight
        return chosen.unsqueeze(-1) * scores[:, :, None, None]


class QuantizerReadout(CodebookHead):
    """Any :class:`~ddcl_lightning.Quantizer` between encoder and decoder, made for the dimension of the tokens.

    It cannot be saved by ``save_pretrained``, which keeps plain data: write a
    :class:`~ddcl_lightning.CodebookHead` whose ``create`` makes the quantizer for that.

    Args:
        quantizer: Replaces tokens of dimension ``quantizer.dim`` by codes.
        weight: Weight > 0 of its loss in that of the task.
        embed_dim: Dimension of the tokens, for use outside of a module; otherwise taken from the backbone.

    Raises:
        ValueError: If the weight is not positive; in ``build``, if the tokens have another dimension.
    """

    @typed
    def __init__(self, quantizer: Quantizer, weight: float = 1.0, embed_dim: int | None = None) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"weight must be > 0; got {weight}. Leave it out for the default.")
        check_quantizer(self, quantizer)
        self.quantizer, self.weight = quantizer, weight
        self.num_codes, self.num_codebooks = quantizer.num_codes, quantizer.num_codebooks
        if embed_dim is not None:
            self.build(embed_dim)

    def create(self, embed_dim: int) -> Quantizer:
        """The given one, if it takes such tokens."""
        if self.quantizer.dim != embed_dim:
            raise ValueError(
                f"dim of the quantizer must be that of the tokens, embed_dim = {embed_dim}; got {self.quantizer.dim}. "
                f"Pass {type(self.quantizer).__name__}(dim={embed_dim}, ...)."
            )
        return self.quantizer


def code_shares(codes: Tensor, num_codes: int) -> Tensor:
    """Share of each sample's tokens that have each code, ``(B, H, K)``, of codes ``(B, T, H)``, -1 at padding."""
    counts = code_counts(codes.transpose(1, 2), num_codes).float()
    return counts / counts.sum(-1, keepdim=True)
