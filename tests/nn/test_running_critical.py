"""A temperature given as a fraction of the critical one stays that, whatever an encoder does to its tokens."""

import copy
from typing import Literal

import pytest
import torch
from tiny import LinearBackbone, loader, quiet_trainer
from torch import Tensor

from ddcl_lightning import Classification, DDCLReadoutModule, PrototypeBank
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.functional import critical_temperature
from ddcl_lightning.heads import Head, ReadoutOutput
from ddcl_lightning.nn.temperature import RunningCriticalTemperature


def stretched(size: int = 400, heads: int = 2, dim: int = 5, seed: int = 0) -> Tensor:
    """Tokens ``(H, N, d)`` far from the origin with one long direction per head."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 3, dim) * torch.arange(1, heads + 1).view(-1, 1)
    return torch.randn(heads, size, dim, generator=generator) * scales.unsqueeze(1) + 50


def test_equals_the_largest_eigenvalue_of_the_tokens() -> None:
    running, tokens = RunningCriticalTemperature(2, 5), stretched()
    for _ in range(20):  # the power method goes on from batch to batch
        running(tokens)
    torch.testing.assert_close(4 * running.lambda_max.double(), critical_temperature(tokens), rtol=1e-3, atol=0.0)


def test_padding_takes_no_part() -> None:
    tokens, mask = stretched(), torch.rand(400) < 0.7
    masked, bare = RunningCriticalTemperature(2, 5), RunningCriticalTemperature(2, 5)
    masked(tokens.masked_fill(~mask[:, None], torch.nan), mask.expand(2, -1))
    bare(tokens[:, mask])
    torch.testing.assert_close(masked.covariance, bare.covariance)


def test_first_batches_count_alike_and_later_ones_replace_them() -> None:
    running = RunningCriticalTemperature(2, 5, momentum=0.1)
    first, second = stretched(seed=1), stretched(seed=2)
    running(first)
    running(second)
    covariances = [torch.stack([torch.cov(head.T, correction=0) for head in tokens]) for tokens in (first, second)]
    torch.testing.assert_close(running.covariance, sum(covariances) / 2, rtol=1e-4, atol=1e-4)
    for _ in range(100):
        running(0.1 * first)
    torch.testing.assert_close(4 * running.lambda_max.double(), 1e-2 * critical_temperature(first), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("detach", [False, True])
def test_the_temperature_follows_the_scale_of_the_tokens(detach: bool) -> None:
    bank = PrototypeBank(6, 5, num_heads=2, temperature=0.1, temperature_unit="critical", detach_assignments=detach)
    tokens = stretched().transpose(0, 1).reshape(400, 10)
    for scale in (1.0, 0.1):
        for _ in range(200):
            bank(scale * tokens)
            bank.settle()
        expected = 0.1 * critical_temperature(scale * bank.split_heads(tokens)[0], detach_assignments=detach)
        torch.testing.assert_close(bank.temperature.double(), expected, rtol=1e-2, atol=0.0)
    bank.set_fraction(torch.tensor([0.2, 0.05]))
    torch.testing.assert_close(bank.temperature.double(), expected * torch.tensor([2.0, 0.5]), rtol=1e-2, atol=0.0)


def test_evaluation_and_constant_tokens_leave_it_alone() -> None:
    bank = PrototypeBank(3, 4, temperature=0.1, temperature_unit="critical")
    start = bank.temperature.clone()
    bank(torch.ones(8, 4))
    torch.testing.assert_close(bank.temperature, start)
    bank(torch.randn(50, 4))
    learned = bank.temperature.clone()
    assert not torch.equal(learned, start)
    bank.eval()
    bank(100 * torch.randn(50, 4))
    assert torch.equal(bank.temperature, learned)


def test_state_survives_saving_and_copies() -> None:
    bank = PrototypeBank(3, 4, temperature=0.1, temperature_unit="critical")
    for _ in range(5):
        bank(torch.randn(50, 4))
    other = PrototypeBank(3, 4, temperature=0.7, temperature_unit="critical")
    other.load_state_dict(bank.state_dict())
    tokens = torch.randn(50, 4)
    for same in (other, copy.deepcopy(bank)):
        same(tokens)
    bank(tokens)
    torch.testing.assert_close(other.temperature, bank.temperature, rtol=0.0, atol=0.0)


class Followed(Head):
    """A readout of soft centroids whose bank follows its tokens."""

    def build(self, embed_dim: int) -> None:
        super().build(embed_dim)
        self.bank = PrototypeBank(4, embed_dim, temperature=1.0, temperature_unit="critical")
        self.pooled_dim = embed_dim

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        output = self.bank(tokens, mask)
        return ReadoutOutput(output.centroids, output.centroids.mean(1), [output.terms])


def anneal(unit: Literal["critical", "absolute"]) -> PrototypeBank:
    """The bank after a training with that unit of temperature."""
    module = DDCLReadoutModule(LinearBackbone(), Followed(), Classification(4))
    callbacks = [TemperatureAnnealing(start=0.5, end=0.02, unit=unit), KMeansInitialization(progress=False)]
    quiet_trainer(max_epochs=5, callbacks=callbacks).fit(module, loader())
    bank = module.head.bank
    assert isinstance(bank, PrototypeBank)
    return bank


def test_annealing_sets_the_fraction() -> None:
    bank = anneal("critical")
    torch.testing.assert_close(bank.fraction, torch.tensor([0.02]))
    torch.testing.assert_close(bank.temperature, 0.02 * 4 * bank.critical.lambda_max)


def test_annealing_in_absolute_units_is_refused() -> None:
    with pytest.raises(ValueError, match="unit must be 'critical' for banks that follow"):
        anneal("absolute")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]; got 0"):
        RunningCriticalTemperature(1, 2, momentum=0.0)
    with pytest.raises(ValueError, match="temperature_unit must be one of"):
        PrototypeBank(3, 2, temperature_unit="kelvin")  # type: ignore[arg-type]
    followed = PrototypeBank(3, 2, temperature_unit="critical")
    with pytest.raises(ValueError, match="temperature of this bank follows its tokens"):
        followed.set_temperature(1.0)
    with pytest.raises(ValueError, match="fraction must be finite and > 0, a fraction of the critical"):
        followed.set_fraction(0.0)
    with pytest.raises(ValueError, match="fraction belongs to banks with temperature_unit='critical'"):
        PrototypeBank(3, 2).set_fraction(0.1)


def test_it_begins_anew_from_a_sample_and_goes_on_from_there() -> None:
    tokens = torch.randn(2, 400, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 2.0, 1.0, 1.0, 1.0]
    )
    running = RunningCriticalTemperature(2, 5)
    for _ in range(3):
        running(100 * tokens)
    running.start(tokens)
    torch.testing.assert_close(4 * running.lambda_max.double(), critical_temperature(tokens), rtol=1e-5, atol=0.0)
    running(2 * tokens)  # the second batch counts as much as the sample
    torch.testing.assert_close(4 * running.lambda_max.double(), 2.5 * critical_temperature(tokens), rtol=1e-3, atol=0.0)
    one = torch.zeros(2, 3, 5)
    running.start(one)
    assert running.lambda_max.tolist() == [0.0, 0.0]
