"""Codes that start anew where an encoder has left them behind."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning import CodeUpdate, ResidualVectorQuantizer, SoftVectorQuantizer
from ddcl_lightning.nn.projected_quantizer import ProjectedQuantizer

DIM, CODES = 4, 8


def tokens(number: int, size: int = 64, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, DIM, generator=torch.Generator().manual_seed(number))


def create(kind: str) -> ProjectedQuantizer:
    torch.manual_seed(0)
    still = CodeUpdate(step_size=1e-6, relocation_threshold=0.0)
    if kind == "plain":
        return SoftVectorQuantizer(DIM, CODES, code_update=still)
    return ResidualVectorQuantizer(DIM, CODES, 2, code_update=still)


def error(quantizer: ProjectedQuantizer, z: Tensor) -> float:
    quantizer.eval()
    result = float((quantizer(z).quantized - z).square().sum() / (z - z.mean(0)).square().sum())
    quantizer.train()
    return result


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_codes_start_again_where_tokens_have_left_them(kind: str) -> None:
    """After the first step tokens are a thousand times as large, as those of a new encoder may be."""
    quantizer = create(kind)
    for number in range(4):
        quantizer(tokens(number, scale=1e-3 if number == 0 else 1.0))
        quantizer.settle()
    assert error(quantizer, tokens(9, 512)) < 0.6


def test_codes_that_fit_stay() -> None:
    quantizer = create("plain")
    quantizer(tokens(0))
    before = quantizer.codebook.clone()
    for number in range(1, 9):
        quantizer(tokens(number, scale=1.1))
        quantizer.settle()
    torch.testing.assert_close(quantizer.codebook, before, rtol=1e-3, atol=1e-3)
    assert int(quantizer.code_start.steps) == 8  # type: ignore[union-attr, arg-type]


def test_codes_are_kept_until_there_are_tokens_for_all() -> None:
    """A batch of 5 tokens is no start for 8 codes that are in use."""
    quantizer = create("plain")
    quantizer(tokens(0))
    quantizer.settle()
    for number in range(1, 8):
        quantizer(tokens(number, 5, scale=1e3))
        assert bool(quantizer.bank.initialized)  # type: ignore[union-attr]
        assert float(quantizer.codebook.abs().max()) < 10.0
        quantizer.settle()
    quantizer(tokens(8, 5, scale=1e3))
    assert error(quantizer, tokens(9, 512, scale=1e3)) < 0.7


def test_frozen_codes_and_those_of_others_never_start_again() -> None:
    frozen, given = create("plain"), create("plain")
    frozen(tokens(0))
    frozen.requires_grad_(False)
    given.bank.initialize(tokens(0))  # type: ignore[union-attr, operator]
    for quantizer in (frozen, given):
        before = quantizer.codebook.abs().max()
        for number in range(1, 9):
            quantizer(tokens(number, scale=1e3))
            quantizer.settle()
        torch.testing.assert_close(quantizer.codebook.abs().max(), before, rtol=0.05, atol=0)


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_run_goes_on_from_a_state_at_any_step(moment: int) -> None:
    """Before the start, while tokens are collected for another, and after it."""
    results = []
    for resumed in (False, True):
        quantizer = create("plain")
        for number in range(12):
            if resumed and number == moment:
                state = quantizer.state_dict()
                quantizer = create("plain")
                quantizer.load_state_dict(state)
            quantizer(tokens(number, 10, scale=10.0 ** (number // 3)))
            quantizer.settle()
        results.append(quantizer.codebook)
    assert torch.equal(*results)


def test_a_state_that_is_damaged_is_refused() -> None:
    quantizer = create("plain")
    quantizer(tokens(0, 5))
    for name, value, rule in (
        ("code_start.limit", torch.tensor(float("nan")), "be finite and >= 0"),
        ("code_start.steps", torch.tensor(-3), "be an integer >= 0"),
        ("code_start.first_tokens", torch.full((5, DIM), float("nan")), "be finite"),
        ("code_start.first_tokens", torch.zeros(5, DIM + 1), r"have shape \(N, 4\); got \(5, 5\)"),
        ("code_start.first_tokens", torch.zeros(DIM), r"have shape \(N, 4\); got \(4,\)"),
    ):
        state = {**quantizer.state_dict(), name: value}
        with pytest.raises(RuntimeError, match=f"{name} must {rule}"):
            create("plain").load_state_dict(state)


def test_steps_of_other_optimizers_do_not_count() -> None:
    """A critic may step any number of times between two steps of the codes."""
    results = []
    for others in (0, 2):
        quantizer, linear = create("plain"), torch.nn.Linear(DIM, DIM)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
        critic = torch.optim.SGD(linear.parameters(), lr=0.1)
        for number in range(6):
            for _ in range(others):
                critic.step()
            quantized = quantizer(tokens(number, scale=1e-3 if number < 2 else 1.0).requires_grad_()).quantized
            quantized.square().mean().backward()
            optimizer.step()
        results.append((quantizer.codebook, int(quantizer.code_start.steps)))  # type: ignore[union-attr, arg-type]
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][0], results[1][0])
