"""Slot attention against algorithm 1 of Locatello et al. 2020, written out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ddcl_lightning.heads import SlotAttentionPooling

TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()


def gru(head: SlotAttentionPooling, update: Tensor, state: Tensor) -> Tensor:
    """Cho et al. 2014 with torch's order of gates."""
    i = update @ head.gru.weight_ih.mT + head.gru.bias_ih
    h = state @ head.gru.weight_hh.mT + head.gru.bias_hh
    (i_r, i_z, i_n), (h_r, h_z, h_n) = i.chunk(3, -1), h.chunk(3, -1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    return (1 - z) * torch.tanh(i_n + r * h_n) + z * state


def written_out(head: SlotAttentionPooling, tokens: Tensor, slots: Tensor, rounds: int) -> Tensor:
    """One sample's tokens ``(T, D)`` and slots ``(S, d)``."""
    d = slots.shape[-1]
    inputs = layer_norm(tokens, tokens.shape[-1:], head.norm_tokens.weight, head.norm_tokens.bias)
    for _ in range(rounds):
        before = slots
        slots = layer_norm(slots, (d,), head.norm_slots.weight, head.norm_slots.bias)
        attention = torch.softmax((inputs @ head.key.weight.mT) @ (slots @ head.query.weight.mT).mT / d**0.5, dim=1)
        weights = attention + 1e-8
        weights = weights / weights.sum(0)
        update = weights.mT @ (inputs @ head.value.weight.mT)
        slots = gru(head, update, before)
        normed = layer_norm(slots, (d,), head.norm_hidden.weight, head.norm_hidden.bias)
        slots = slots + head.hidden[2](torch.relu(head.hidden[0](normed)))
    return slots


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dim", [None, 4])
def test_follows_the_algorithm(rounds: int, dim: int | None) -> None:
    head = SlotAttentionPooling(3, rounds, dim=dim, embed_dim=6).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    pooled = head(TOKENS, MASK).pooled
    start = head.mean + head.log_deviation.exp() * head.noise
    for i in range(3):
        expected = written_out(head, TOKENS[i, MASK[i]], start, rounds).mean(0)
        torch.testing.assert_close(pooled[i], expected, rtol=1e-4, atol=1e-5)


def test_slots_compete_and_weights_are_means() -> None:
    head = SlotAttentionPooling(3, embed_dim=6)
    weights = head.attention(head.initial_slots(3), head.key(TOKENS), MASK)
    assert weights.shape == (3, 5, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 3))
    assert bool((weights[~MASK] == 0).all())


def test_training_draws_and_evaluation_does_not() -> None:
    head = SlotAttentionPooling(3, embed_dim=6)
    assert not torch.equal(head(TOKENS).pooled, head(TOKENS).pooled)
    head.eval()
    first = head(TOKENS).pooled
    assert torch.equal(first, head(TOKENS).pooled)
    torch.testing.assert_close(first[1:], head(TOKENS[1:]).pooled)  # whatever else is in the batch
    other = SlotAttentionPooling(3, embed_dim=6).eval()
    other.load_state_dict(head.state_dict())
    assert torch.equal(first, other(TOKENS).pooled)
    slots = head.initial_slots(1)[0]
    assert len(torch.unique(slots, dim=0)) == 3  # equal slots would stay equal


@pytest.mark.parametrize("name", ["num_slots", "num_iterations"])
def test_slot_attention_refuses_sizes_of_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        SlotAttentionPooling(**{name: 0})
