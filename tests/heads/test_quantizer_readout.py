"""Heads that are a quantizer: the weight of its loss, its codes as shares, and a contributor's own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddcl_lightning import CodebookHead, Head, Quantizer, QuantizerOutput, QuantizerReadout, VectorQuantizer
from ddcl_lightning.heads.quantizer_readout import code_shares


class Rounded(Quantizer):
    """Signs of the dimensions, without a parameter or a loss."""

    num_codes = 2

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.num_codebooks = dim

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        padding, codes = ~mask.unsqueeze(-1), (tokens > 0).long()
        return QuantizerOutput((2.0 * codes - 1).masked_fill(padding, 0.0), codes.masked_fill(padding, -1))


class RoundedReadout(CodebookHead):
    def create(self, embed_dim: int) -> Quantizer:
        return Rounded(embed_dim)


def test_shares_count_no_padding() -> None:
    codes = torch.tensor([[[0], [2], [2], [-1]], [[1], [-1], [-1], [-1]]])
    assert code_shares(codes, 3)[:, 0].tolist() == [pytest.approx([1 / 3, 0, 2 / 3]), [0, 1, 0]]


@pytest.mark.parametrize("create", [RoundedReadout, lambda: QuantizerReadout(Rounded(3))])
def test_a_quantizer_of_one_method_is_enough(create: type[Head]) -> None:
    head = create()
    head.build(3)
    head.eval()
    tokens = torch.tensor([[[1.0, -2.0, 3.0], [-1.0, -2.0, 1.0], [9.0, 9.0, 9.0]]])
    readout = head(tokens, torch.tensor([[True, True, False]]))
    assert (head.num_codes, head.num_codebooks, head.pooled_dim, head.token_dim) == (2, 3, 3, 3)
    assert readout.pooled.tolist() == [[0.0, -1.0, 1.0]]
    assert readout.codes[0].tolist() == [[1, 0, 1], [0, 0, 1], [-1, -1, -1]]
    assert readout.assignments[0].tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert readout.regularization is None
    assert readout.signals == {}


def test_the_weight_is_that_of_the_loss_and_positive() -> None:
    quantizer, tokens = VectorQuantizer(3, 4), torch.randn(2, 5, 3)
    losses = [QuantizerReadout(quantizer, weight, embed_dim=3)(tokens).regularization for weight in (1.0, 0.5)]
    torch.testing.assert_close(losses[1], 0.5 * losses[0])
    with pytest.raises(ValueError, match=r"weight must be > 0; got 0\.0"):
        QuantizerReadout(quantizer, 0.0)


def test_a_quantizer_is_made_in_the_mode_of_its_head() -> None:
    head = RoundedReadout().eval()
    head.build(3)
    assert not head.quantizer.training


def test_a_module_as_an_argument_is_not_saved_and_one_that_a_head_creates_is(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(TypeError, match="argument 'quantizer' of QuantizerReadout must be plain data"):
        QuantizerReadout(Rounded(3), embed_dim=3).save_pretrained(tmp_path)
    head = RoundedReadout()
    head.build(3)
    head.save_pretrained(tmp_path)
    assert isinstance(Head.from_pretrained(tmp_path), RoundedReadout)
