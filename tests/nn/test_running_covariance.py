"""The covariance of tokens over batches, its largest eigenvalue, and how the batches are weighed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddcl_lightning import PrototypeBank, Temperature
from ddcl_lightning.functional import critical_temperature
from ddcl_lightning.functional.effective_numbers import effective_rank
from ddcl_lightning.functional.split import split_test
from ddcl_lightning.nn.running_covariance import RunningCovariance


def stretched(size: int = 400, heads: int = 2, dim: int = 5, seed: int = 0) -> Tensor:
    """Tokens ``(H, N, d)`` far from the origin with one long direction per head."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 3, dim) * torch.arange(1, heads + 1).view(-1, 1)
    return torch.randn(heads, size, dim, generator=generator) * scales.unsqueeze(1) + 50


def covariance(tokens: Tensor) -> Tensor:
    """Of every head, ``(H, d, d)``."""
    return torch.stack([torch.cov(head.T, correction=0) for head in tokens])


def test_equals_the_largest_eigenvalue_of_the_tokens() -> None:
    running, tokens = RunningCovariance(2, 5), stretched()
    for _ in range(20):  # the power method goes on from batch to batch
        running(tokens)
    torch.testing.assert_close(4 * running.lambda_max.double(), critical_temperature(tokens), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(running.total_variance(), tokens.var(1, correction=0).sum(-1), rtol=1e-4, atol=0.0)


def test_padding_takes_no_part() -> None:
    tokens, mask = stretched(), torch.rand(400) < 0.7
    masked, bare = RunningCovariance(2, 5), RunningCovariance(2, 5)
    masked(tokens.masked_fill(~mask[:, None], torch.nan), mask.expand(2, -1))
    bare(tokens[:, mask])
    torch.testing.assert_close(masked.covariance, bare.covariance)


def test_first_batches_count_alike_and_later_ones_replace_them() -> None:
    running = RunningCovariance(2, 5, momentum=0.1)
    first, second = stretched(seed=1), stretched(seed=2)
    running(first)
    running(second)
    mean = (covariance(first) + covariance(second)) / 2
    torch.testing.assert_close(running.covariance, mean, rtol=1e-4, atol=1e-4)
    for _ in range(100):
        running(0.1 * first)
    torch.testing.assert_close(4 * running.lambda_max.double(), 1e-2 * critical_temperature(first), rtol=1e-2, atol=0.0)


def test_running_covariance_refuses_a_momentum_of_zero() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]; got 0"):
        RunningCovariance(1, 2, momentum=0.0)


def test_it_begins_anew_from_a_sample_and_goes_on_from_there() -> None:
    tokens = torch.randn(2, 400, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 2.0, 1.0, 1.0, 1.0]
    )
    running = RunningCovariance(2, 5)
    for _ in range(3):
        running(100 * tokens)
    running.start(tokens)
    torch.testing.assert_close(4 * running.lambda_max.double(), critical_temperature(tokens), rtol=1e-5, atol=0.0)
    running(2 * tokens)  # a later batch gets its least weight at once
    expected = (1 + 0.05 * 3) * critical_temperature(tokens)
    torch.testing.assert_close(4 * running.lambda_max.double(), expected, rtol=1e-3, atol=0.0)
    sample = torch.zeros(2, 3, 5)
    running.start(sample)
    assert running.lambda_max.tolist() == [0.0, 0.0]


def test_a_state_with_constant_dimensions_loads_again() -> None:
    """What rounding leaves of no variance is no damage, whatever wrote it."""
    for seed in range(20):
        x = torch.relu(torch.randn(1, 500, 16, generator=torch.Generator().manual_seed(seed)))
        x[..., 3] = 0.0
        running = RunningCovariance(1, 16)
        running.start(x)
        running(x)
        state = running.state_dict()
        RunningCovariance(1, 16).load_state_dict(state)
        state["covariance"][0, 3, 3] = -4.5e-10
        RunningCovariance(1, 16).load_state_dict(state)
        state["covariance"][0, 3, 3] = -0.1
        with pytest.raises(RuntimeError, match="must be the covariance of something"):
            RunningCovariance(1, 16).load_state_dict(state)


def test_a_sample_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    tokens = stretched()
    tokens[1, 3, 2] = torch.nan
    bank = PrototypeBank(4, 5, num_heads=2, temperature=Temperature(0.03, "distortion"))
    for running in (RunningCovariance(2, 5), bank.temperature_state):
        before = {name: value.clone() for name, value in running.state_dict().items()}
        with pytest.raises(ValueError, match="tokens must be finite; got NaN or infinity among the valid ones"):
            running.start(tokens) if isinstance(running, RunningCovariance) else running.start(tokens, bank.prototypes)
        assert all(torch.equal(value, before[name]) for name, value in running.state_dict().items())


@pytest.mark.parametrize("read", [effective_rank, lambda tokens: split_test(tokens, min_tokens=1)])
def test_what_takes_eigenvectors_refuses_tokens_that_are_not_finite(read: Callable[[Tensor], object]) -> None:
    tokens = stretched()[0]
    tokens[3, 2] = torch.inf
    with pytest.raises(ValueError, match="tokens must be finite"):
        read(tokens)
