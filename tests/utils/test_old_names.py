"""Names of version 0.1 are refused with the one to use now."""

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from ddcl_lightning import (
    AdaptiveBankSize,
    DDCLReadout,
    HierarchicalReadout,
    PMAPooling,
    TemperatureAnnealing,
    TokenNormalized,
    two_timescale_groups,
)
from ddcl_lightning._utils.old_names import MODULES
from ddcl_lightning.cli.commands import main
from tests.tiny import clustering_module

ARGUMENTS: dict[str, tuple[Callable[..., Any], str]] = {
    "budget": (lambda **old: PMAPooling(2, 2, **old), "Use max_parameters"),
    "relocate": (lambda **old: TokenNormalized([], **old), "Use relocation_threshold"),
    "per": (TemperatureAnnealing, "Use interval"),
    "max_prototypes": (AdaptiveBankSize, r"Use rules=SizeRules\(max_prototypes"),
    "prune": (AdaptiveBankSize, r"Use rules=SizeRules\(prune_fraction"),
    "prototype_optimizer_args": (clustering_module, "Use prototype_optimizer=OptimizerConfig"),
    "warmup_steps": (clustering_module, "Use lr_schedule=LRSchedule"),
    "temperature_unit": (lambda **old: DDCLReadout(3, **old), "Use temperature=Temperature"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_old_argument_names_the_new_one(name: str) -> None:
    create, remedy = ARGUMENTS[name]
    with pytest.raises(TypeError, match=rf"has no argument {name!r} since version 0\.2\. {remedy}"):
        create(**{name: 1})


def test_unknown_arguments_raise_the_type_error_of_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sice'"):
        DDCLReadout(3, sice=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing"):
        two_timescale_groups()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", MODULES)
def test_an_old_module_names_the_new_one(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"it is ddcl_lightning.{MODULES[name]} now")):
        importlib.import_module(f"ddcl_lightning.{name}")
    importlib.import_module(f"ddcl_lightning.{MODULES[name]}")


def test_old_ways_to_read_tokens_name_the_new_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'rare_mean'\. It is 'idf_mean' since version 0\.2"):
        HierarchicalReadout([4, 2], tokens=["all", "rare_mean"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--model.head.budget=400", "Use max_parameters."),
        ("--model.prototype_optimizer_args={}", "Use prototype_optimizer=OptimizerConfig(name, args)."),
    ],
)
def test_an_old_key_of_a_recipe_names_the_new_one(words: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "digits", words])
    assert stop.value.code == 2
    assert remedy in capsys.readouterr().err
