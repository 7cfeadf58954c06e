"""What a temperature is relative to: the same number means the same everywhere, at every scale of the tokens."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from registry import DIM, classes, make
from tiny import LinearBackbone, absolute, loader, quiet_trainer
from torch import Tensor, nn

from ddcl_lightning import (
    Classification,
    DDCLAttention,
    DDCLReadout,
    DDCLReadoutModule,
    Head,
    PrototypeBank,
    PrototypeNorm,
    ResidualVectorQuantizer,
    ResidualVQ,
    SoftVectorQuantizer,
    Temperature,
    find_banks,
)
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.functional import critical_temperature, soft_assign
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, DISTORTION_TEMPERATURE


def stretched(size: int = 400, heads: int = 2, dim: int = 5, seed: int = 0) -> Tensor:
    """Tokens ``(N, H * d)`` far from the origin with one long direction per head."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 3, dim) * torch.arange(1, heads + 1).view(-1, 1)
    return (torch.randn(size, heads, dim, generator=generator) * scales + 50).flatten(1)


def followed(temperature: float | Temperature = 0.1, **kwargs: Any) -> PrototypeBank:
    return PrototypeBank(6, 5, num_heads=2, temperature=temperature, **kwargs)


def critical(bank: PrototypeBank, tokens: Tensor) -> Tensor:
    """Critical temperature ``(H,)`` of tokens ``(N, H * d)``."""
    return critical_temperature(bank.split_heads(tokens)[0], detach_assignments=bank.detach_assignments)


# One meaning -------------------------------------------------------------------------------------

# Every public one whose constructor takes a number or a Temperature.
CLASSES = [
    kind
    for kind in classes(nn.Module)
    if "float" in str(getattr(inspect.signature(kind).parameters.get("temperature"), "annotation", ""))
]
# Means of five samples are too few tokens for a level.
OPTIONS: dict[str, dict[str, Any]] = {"HierarchicalReadout": {"tokens": ["all", "all"]}}


def build(kind: type[nn.Module], **options: Any) -> nn.Module:
    module: nn.Module = make(kind, **OPTIONS.get(kind.__name__, {}), **options)
    if isinstance(module, Head):
        module.build(DIM)
    return module


BUILDS = [pytest.param(functools.partial(build, kind), id=kind.__name__) for kind in CLASSES]


def test_the_classes_with_a_temperature_are_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert names >= {"DDCLAttention", "DDCLReadout", "HierarchicalReadout", "PrototypeBank", "SoftVQ", "PrototypeNorm"}


def test_a_temperature_defaults_to_one_number() -> None:
    """None is that number too, in the unit that suits how codes move."""
    others = {PrototypeNorm: 0.5, SoftVectorQuantizer: None, ResidualVectorQuantizer: None, ResidualVQ: None}
    for kind in CLASSES:
        default = inspect.signature(kind).parameters["temperature"].default
        assert default == others.get(kind, DEFAULT_TEMPERATURE), kind
    inside = SoftVectorQuantizer(4, 3).bank.temperature_state
    assert (float(inside.value), inside.unit) == (pytest.approx(DISTORTION_TEMPERATURE), "distortion")
    outside = SoftVectorQuantizer(4, 3, code_update="optimizer").bank.temperature_state
    assert (float(outside.value), outside.unit) == (pytest.approx(DEFAULT_TEMPERATURE), "critical")


def called(module: nn.Module, tokens: Tensor) -> dict[str, CodebookRecord]:
    """The latest record of every bank in a call."""
    records: dict[str, CodebookRecord] = {}
    with record_codebooks(module, records.__setitem__):
        module(tokens)
    return records


def started(build: Callable[..., nn.Module], temperature: float | Temperature, scale: float) -> list[CodebookRecord]:
    """Records of a call in training with all banks started from the tokens that reach them."""
    torch.manual_seed(0)
    module = build(temperature=temperature)
    tokens = scale * torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(1))
    for name, bank in find_banks(module).items():
        bank.initialize(called(module, tokens)[name].tokens.transpose(0, 1).flatten(1), num_restarts=2)
    return list(called(module, tokens).values())


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("unit", ["critical", "initial"])
def test_a_number_means_the_same_in_every_class_and_at_every_scale(build: Callable[..., nn.Module], unit: Any) -> None:
    small, large = (started(build, Temperature(0.2, unit=unit), scale) for scale in (1.0, 1000.0))
    for first, other in zip(small, large, strict=True):
        for record in (first, other):
            expected = 0.2 * critical_temperature(record.tokens)
            torch.testing.assert_close(record.temperature.double(), expected.double(), rtol=1e-3, atol=0.0)
        q, scaled = (soft_assign(call.tokens, call.codebook, call.temperature) for call in (first, other))
        torch.testing.assert_close(q, scaled, rtol=1e-3, atol=1e-4)
        assert float(q.amax(-1).mean()) < 0.999  # soft, or nothing would have been compared


@pytest.mark.parametrize("build", BUILDS)
def test_an_absolute_temperature_is_t_itself_in_every_class(build: Callable[..., nn.Module]) -> None:
    for scale in (1.0, 1000.0):
        for record in started(build, absolute(0.7), scale):
            torch.testing.assert_close(record.temperature, torch.full_like(record.temperature, 0.7))


# Following the tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True])
def test_the_temperature_follows_the_scale_of_tokens_that_learn(detach: bool) -> None:
    bank, tokens = followed(detach_assignments=detach), stretched().requires_grad_()
    for scale in (1.0, 0.1):
        for _ in range(200):
            bank(scale * tokens)
            bank.settle()
        expected = 0.1 * critical(bank, scale * tokens.detach())
        torch.testing.assert_close(bank.temperature.double(), expected, rtol=1e-2, atol=0.0)
    bank.set_temperature([0.2, 0.05])
    torch.testing.assert_close(bank.temperature.double(), expected * torch.tensor([2.0, 0.5]), rtol=1e-2, atol=0.0)


def test_an_initial_one_stays_while_the_encoder_rescales_its_tokens() -> None:
    bank, tokens = followed(Temperature(0.1, unit="initial")), stretched().requires_grad_()
    assert not bank.temperature_state.is_measured
    bank(tokens)
    first = bank.temperature.clone()
    torch.testing.assert_close(first.double(), 0.1 * critical(bank, tokens.detach()), rtol=0.2, atol=0.0)
    twin = followed(Temperature(0.7, unit="initial"))
    twin.load_state_dict(bank.state_dict())
    for same in (bank, twin, copy.deepcopy(bank)):
        for scale in (10.0, 0.01):
            same(scale * tokens)
            same.settle()
        assert torch.equal(same.temperature, first)
    bank.set_temperature(Temperature(0.05, unit="initial"))
    torch.testing.assert_close(bank.temperature, first / 2)
    bank.initialize(3 * tokens.detach(), num_restarts=1)  # what it is a fraction of is that of the sample
    torch.testing.assert_close(bank.temperature.double(), 0.05 * critical(bank, 3 * tokens.detach()), rtol=1e-4, atol=0)
    again = bank.temperature.clone()
    bank(tokens)
    bank.settle()
    assert torch.equal(bank.temperature, again)


@pytest.mark.parametrize("unit", ["critical", "initial"])
def test_evaluation_and_constant_tokens_leave_it_alone(unit: Any) -> None:
    bank = PrototypeBank(3, 4, temperature=Temperature(0.1, unit=unit))
    start = bank.temperature.clone()
    bank(torch.ones(8, 4))
    torch.testing.assert_close(bank.temperature, start)
    assert not bank.temperature_state.is_measured
    bank(torch.randn(50, 4))
    learned = bank.temperature.clone()
    assert not torch.equal(learned, start)
    assert bank.temperature_state.is_measured
    bank.eval()
    bank(100 * torch.randn(50, 4))
    bank.settle()
    assert torch.equal(bank.temperature, learned)


def test_an_absolute_one_measures_nothing() -> None:
    bank = PrototypeBank(3, 4, temperature=absolute(0.3))
    bank(100 * torch.randn(50, 4))
    bank.settle()
    bank.initialize(100 * torch.randn(50, 4), num_restarts=1)
    assert bank.temperature.tolist() == [pytest.approx(0.3)]
    assert bank.temperature_state.is_measured
    assert bank.temperature_state.covariance is None


# State -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["critical", "initial", "absolute"])
def test_state_survives_saving_and_copies(unit: Any) -> None:
    bank = followed(Temperature([0.1, 0.2], unit=unit))
    for number in range(5):
        bank(stretched(seed=number))
        bank.settle()
    other = followed(Temperature(0.7, unit=unit))
    other.load_state_dict(bank.state_dict())
    tokens = stretched(seed=9)
    for same in (bank, other, copy.deepcopy(other)):
        assert torch.equal(same.temperature, bank.temperature)
        torch.testing.assert_close(same.temperature_state.variance, bank.temperature_state.variance)
    copied = copy.deepcopy(bank)
    for same in (bank, other, copied):
        same(tokens)
        same.settle()
    for same in (other, copied):
        for name, value in same.state_dict().items():
            if name != "prototypes":
                assert torch.equal(value, bank.state_dict()[name]), name


def test_a_state_of_another_unit_is_refused_by_name() -> None:
    relative, plain = PrototypeBank(3, 4), PrototypeBank(3, 4, temperature=absolute())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*temperature_state.covariance.lambda_max"):
        relative.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*temperature_state.covariance.lambda_max"):
        plain.load_state_dict(relative.state_dict())


# Annealing ---------------------------------------------------------------------------------------


def annealed(temperature: float | Temperature, start: float | Temperature, end: float | Temperature) -> PrototypeBank:
    """The bank after a training with that schedule."""
    module = DDCLReadoutModule(LinearBackbone(), DDCLReadout(4, temperature=temperature), Classification(4))
    callbacks = [TemperatureAnnealing(start=start, end=end), KMeansInitialization(progress=False)]
    quiet_trainer(max_epochs=5, callbacks=callbacks).fit(module, loader())
    (bank,) = find_banks(module).values()
    return bank


def test_annealing_sets_the_value() -> None:
    bank = annealed(0.1, 0.5, 0.02)
    torch.testing.assert_close(bank.temperature_state.value, torch.tensor([0.02]))
    covariance = bank.temperature_state.covariance
    assert covariance is not None
    torch.testing.assert_close(bank.temperature, 0.02 * 4 * covariance.lambda_max)
    bank = annealed(absolute(1.0), absolute(0.5), absolute(0.02))
    torch.testing.assert_close(bank.temperature, torch.tensor([0.02]))


@pytest.mark.parametrize("schedule", [(0.5, 0.02), (absolute(0.5), absolute(0.02))])
def test_annealing_in_another_unit_is_refused(schedule: tuple[Any, Any]) -> None:
    own = 0.1 if isinstance(schedule[0], Temperature) else absolute()
    with pytest.raises(
        ValueError, match=r"the temperature of bank 'head.attention.bank' has the unit '.*', the schedule"
    ):
        annealed(own, *schedule)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [0.0, -1.0, [], [0.1, 0.0], (0.1, -0.1), torch.tensor(0.0), torch.tensor([1.0, -1.0]), np.array([0.0])]
)
def test_temperature_refuses_values_that_are_not_positive(value: Any) -> None:
    with pytest.raises(ValueError, match=r"a temperature must be > 0, one number or one per head; got .* good start"):
        Temperature(value)
    with pytest.raises(ValueError, match="a temperature must be > 0"):
        PrototypeBank(3, 4, temperature=value)


@pytest.mark.parametrize("value", ["hot", None, True, float("nan"), float("inf"), [float("nan")], [[0.1]]])
def test_temperature_refuses_values_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"value must be a list of finite numbers or a finite number; got"):
        Temperature(value)
    bank = followed()
    with pytest.raises(ValueError, match=r"must be a list of finite numbers or"):
        bank.set_temperature(value)
    torch.testing.assert_close(bank.temperature_state.value, torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize("value", [(0.1, 0.2), np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)])
def test_values_become_plain_numbers(value: Any) -> None:
    assert Temperature(value) == Temperature([0.1, 0.2])
    assert Temperature(torch.tensor(0.5)) == Temperature(0.5)


def test_temperature_refuses_unknown_and_other_units() -> None:
    with pytest.raises(ValueError, match=r"unit of a temperature must be one of \('critical', .*\); got 'kelvin'"):
        Temperature(1.0, unit="kelvin")  # type: ignore[arg-type]
    for unit in ("critical", "initial", "absolute"):
        for other in {"critical", "initial", "absolute"} - {unit}:
            bank = followed(Temperature(0.3, unit=unit))  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=rf"this bank has the unit '{unit}'; got .*'{other}'.*Pass"):
                bank.set_temperature(Temperature(0.1, unit=other))  # type: ignore[arg-type]
            torch.testing.assert_close(bank.temperature_state.value, torch.tensor([0.3, 0.3]))
    with pytest.raises(TypeError, match="temperature_unit"):
        PrototypeBank(3, 4, temperature_unit="critical")  # type: ignore[call-arg]


def test_lists_give_one_value_per_head() -> None:
    tokens = stretched()
    bank = followed([0.5, 0.1])  # type: ignore[arg-type]
    bank.initialize(tokens, num_restarts=1)
    expected = torch.tensor([0.5, 0.1]) * critical(bank, tokens)
    torch.testing.assert_close(bank.temperature.double(), expected.double(), rtol=1e-4, atol=0.0)
    layer = DDCLAttention(8, 3, num_heads=2, temperature=absolute([0.5, 0.1]))
    torch.testing.assert_close(layer.bank.temperature, torch.tensor([0.5, 0.1]))
    for wrong in ([0.1, 0.2, 0.3], absolute([0.1, 0.2, 0.3])):
        with pytest.raises(
            ValueError, match=r"a temperature must be one number, or one per head, 2; got 3: \[0.1, 0.2"
        ):
            followed(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one per head, 2; got 3"):
        bank.set_temperature([0.1, 0.2, 0.3])
    torch.testing.assert_close(bank.temperature_state.value, torch.tensor([0.5, 0.1]))
