"""CLS, mean and maximum, and their parameter-matched controls."""

import pytest
import torch

from ddcl_lightning.heads import CLSPooling, MaxPooling, MeanPooling, PoolingHead

TOKENS = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [8.0, 0.0]], [[-4.0, -2.0], [-3.0, -9.0], [7.0, 7.0]]])
MASK = torch.tensor([[True, True, True], [False, True, False]])


def test_first_mean_and_largest_token_ignore_padding() -> None:
    """Padding is larger than every valid value of the second sample, and comes before the only one."""
    assert CLSPooling(embed_dim=2)(TOKENS, MASK).pooled.tolist() == [[1.0, 5.0], [-3.0, -9.0]]
    assert MeanPooling(embed_dim=2)(TOKENS, MASK).pooled.tolist() == [[4.0, 2.0], [-3.0, -9.0]]
    assert MaxPooling(embed_dim=2)(TOKENS, MASK).pooled.tolist() == [[8.0, 5.0], [-3.0, -9.0]]
    assert MaxPooling(embed_dim=2)(TOKENS).pooled.tolist() == [[8.0, 5.0], [7.0, 7.0]]


@pytest.mark.parametrize("kind", [CLSPooling, MeanPooling])
def test_control_is_one_hidden_layer_on_the_same_vector(kind: type[CLSPooling] | type[MeanPooling]) -> None:
    bare, control = kind(embed_dim=2), kind(hidden_dim=5, embed_dim=2)
    assert (bare.num_parameters(), bare.pooled_dim) == (0, 2)
    assert (control.num_parameters(), control.pooled_dim) == (5 * (2 + 1), 5)
    layer = control.control[0]
    expected = torch.nn.functional.gelu(bare(TOKENS, MASK).pooled @ layer.weight.mT + layer.bias)
    torch.testing.assert_close(control(TOKENS, MASK).pooled, expected)


def test_tokens_pass_through() -> None:
    readout = MeanPooling(embed_dim=2)(TOKENS)
    assert readout.tokens is TOKENS
    assert readout.loss_terms == []
    assert readout.assignments is None
    with pytest.raises(ValueError, match="no quantization loss"):
        readout.quantization_loss()


class Projection(PoolingHead):
    """Keeps a layer of its own besides those that are created."""

    def __init__(self, max_parameters: int | None = None) -> None:
        super().__init__()
        self.max_parameters = max_parameters
        self.gate = torch.nn.Linear(1, 4)
        self.created: int | None = None

    def create(self, embed_dim: int, width: int | None) -> int:
        self.created = width
        self.linear = torch.nn.Linear(embed_dim, width or embed_dim, bias=False)
        return width or embed_dim

    def pool(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.linear(tokens).mean(1)


def test_the_search_for_a_width_counts_every_layer_and_leaves_nothing_behind() -> None:
    head = Projection(max_parameters=8 + 25)
    keys = list(head.state_dict())
    assert head._sketch(2, 7).num_parameters() == 8 + 14
    assert head.created is None
    assert list(head.state_dict()) == keys
    head.build(2)
    assert (head.created, head.pooled_dim) == (12, 12)
    assert head.num_parameters() == 8 + 24
    assert not head.linear.weight.is_meta
