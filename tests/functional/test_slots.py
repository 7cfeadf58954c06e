"""Summaries per prototype: against their definition, against slot attention, and where assignments underflow."""

import torch

from ddcl_lightning.functional import prototype_slots, soft_assign

TOKENS = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROTOTYPES = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.arange(7) < torch.tensor([[7], [3]])


def test_slots_are_the_weighted_means_of_the_definition() -> None:
    q = soft_assign(TOKENS, PROTOTYPES.expand(2, 4, 3), 0.7)
    q = q * MASK.unsqueeze(-1)
    expected = torch.einsum("bnk,bnd->bkd", q / q.sum(1, keepdim=True), TOKENS)
    torch.testing.assert_close(prototype_slots(TOKENS, PROTOTYPES, 0.7, MASK), expected)


def test_other_values_are_averaged_with_the_same_weights() -> None:
    values = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = soft_assign(TOKENS, PROTOTYPES.expand(2, 4, 3), 0.7) * MASK.unsqueeze(-1)
    expected = torch.einsum("bnk,bne->bke", q / q.sum(1, keepdim=True), values)
    values = values.masked_fill(~MASK.unsqueeze(-1), 0.0)
    torch.testing.assert_close(prototype_slots(TOKENS, PROTOTYPES, 0.7, MASK, values=values), expected)


def test_padding_does_not_matter_whatever_it_holds() -> None:
    padded = torch.where(MASK.unsqueeze(-1), TOKENS, torch.nan).requires_grad_()
    slots = prototype_slots(padded, PROTOTYPES, 0.7, MASK)
    torch.testing.assert_close(slots[1], prototype_slots(TOKENS[1:, :3], PROTOTYPES, 0.7)[0])
    slots.sum().backward()
    assert padded.grad is not None
    assert bool(torch.isfinite(padded.grad).all())
    assert padded.grad[1, 3:].abs().max() == 0


def test_a_prototype_far_from_every_token_gets_the_nearest() -> None:
    """Its assignments underflow to zero, where a plain quotient is 0 / 0."""
    prototypes = torch.cat([PROTOTYPES, torch.full((1, 3), 1e3, dtype=torch.float64)])
    assert soft_assign(TOKENS[0], prototypes, 0.01)[:, -1].max() == 0
    slots = prototype_slots(TOKENS, prototypes, 0.01)
    nearest = TOKENS[0][torch.cdist(TOKENS[0], prototypes[-1:]).argmin()]
    torch.testing.assert_close(slots[0, -1], nearest)


def test_high_temperature_gives_the_mean_and_gradients_flow() -> None:
    torch.testing.assert_close(
        prototype_slots(TOKENS, PROTOTYPES, 1e9), TOKENS.mean(1, keepdim=True).expand(2, 4, 3), atol=1e-6, rtol=0
    )
    tokens, prototypes = TOKENS.clone().requires_grad_(), PROTOTYPES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, p: prototype_slots(z, p, 0.7, MASK), (tokens, prototypes))
    held = prototype_slots(tokens, prototypes, 0.7, detach_assignments=True)
    assert torch.autograd.grad(held.sum(), prototypes, allow_unused=True) == (None,)
