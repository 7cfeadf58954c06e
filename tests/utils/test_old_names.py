"""Names of version 0.1 are refused with the one to use now."""

import importlib
import inspect
import json
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import ddcl_lightning
from ddcl_lightning import (
    AdaptiveBankSize,
    DDCLReadout,
    DecompositionCheck,
    HierarchicalReadout,
    OptimizerConfig,
    PMAPooling,
    SoftVectorQuantizer,
    SoftVQ,
    TemperatureAnnealing,
    TokenNormalized,
    two_timescale_groups,
)
from ddcl_lightning._utils.old_names import ARGUMENTS, MODULES, NAMES, renamed_argument
from tests.cli.test_cli import fails
from tests.tiny import clustering_module

CLASSES = {name: getattr(ddcl_lightning, name) for name in ARGUMENTS}
CALLS: dict[tuple[str, str], tuple[Callable[..., Any], str]] = {
    ("PMAPooling", "budget"): (lambda **old: PMAPooling(2, 2, **old), "Use max_parameters."),
    ("TokenNormalized", "relocate"): (lambda **old: TokenNormalized([], **old), "Use relocation_threshold."),
    ("TemperatureAnnealing", "per"): (TemperatureAnnealing, "Use interval."),
    ("AdaptiveBankSize", "max_prototypes"): (AdaptiveBankSize, "Use rules=SizeRules(max_prototypes=...)."),
    ("AdaptiveBankSize", "prune"): (AdaptiveBankSize, "Use rules=SizeRules(prune_fraction=...)."),
    ("DDCLReadoutModule", "prototype_optimizer_args"): (
        clustering_module,
        "Use prototype_optimizer=OptimizerConfig(name=..., args=...).",
    ),
    ("DDCLReadoutModule", "warmup_steps"): (
        clustering_module,
        "Use lr_schedule=LRSchedule(shape=..., warmup_steps=...).",
    ),
    ("DDCLReadout", "temperature_unit"): (
        lambda **old: DDCLReadout(3, **old),
        "Use temperature=Temperature(value=..., unit=...).",
    ),
}


@pytest.mark.parametrize(("owner", "name"), CALLS)
def test_an_old_argument_names_the_new_one(owner: str, name: str) -> None:
    create, remedy = CALLS[owner, name]
    with pytest.raises(TypeError) as caught:
        create(**{name: 2})
    assert str(caught.value) == f"{owner} has no argument {name!r} since version 0.2. {remedy}"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_advice_on_arguments_can_be_followed(name: str) -> None:
    for old, new in ARGUMENTS[name].items():
        argument, _, call = new.partition("=")
        known = inspect.signature(CLASSES[name]).parameters
        assert argument in known
        assert old not in known
        if call:
            config, *fields = re.findall(r"\w+", call)
            assert set(fields) <= set(inspect.signature(getattr(ddcl_lightning, config)).parameters)
            assert config in str(known[argument].annotation)


def test_every_class_with_a_temperature_knows_its_old_unit() -> None:
    public = (getattr(ddcl_lightning, name) for name in ddcl_lightning.__all__)
    takes = {c.__name__ for c in public if inspect.isclass(c) and "temperature" in _arguments(c)}
    takes -= {"HeadView", "BankRecord", "CodebookRecord"}  # results
    takes -= {"ResidualVQ", "ResidualVectorQuantizer"}  # which came later
    assert takes == {name for name, renamed in ARGUMENTS.items() if "temperature_unit" in renamed}


def _arguments(owner: type) -> Iterable[str]:
    try:
        return inspect.signature(owner).parameters
    except ValueError:  # of an exception
        return ()


class Readout(DDCLReadout):
    """A class of the user's, made from one of ours."""


class Sized(nn.Module):
    """A class of the user's, with our class's old arguments as its own."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()


def test_advice_on_arguments_is_for_the_classes_that_had_them() -> None:
    given = ["budget", "margin", "every", "temperature_unit"]
    assert renamed_argument(Sized, given) is None
    assert renamed_argument(ModelCheckpoint, given) is None
    assert renamed_argument(DecompositionCheck, given) is None
    assert renamed_argument(SoftVQ, ["budget"]) is None
    assert renamed_argument(Readout, given) == "Readout has no argument 'budget' since version 0.2. Use max_parameters."
    with pytest.raises(TypeError, match=r"DDCLReadout has no argument 'budget'"):
        Readout(3, **{"budget": 2})
    with pytest.raises(TypeError, match="unexpected keyword argument 'every'"):
        DecompositionCheck(every=3)  # type: ignore[call-arg]


def test_unknown_arguments_raise_the_type_error_of_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sice'"):
        DDCLReadout(3, sice=4)  # type: ignore[call-arg]
    # Named also where the argument in whose place it stands is missing.
    message = (
        "SoftVectorQuantizer got an unexpected keyword argument 'codebook_size'. It takes dim, num_codes, code_dim, "
    )
    with pytest.raises(TypeError, match=message):
        SoftVectorQuantizer(dim=8, codebook_size=16)  # type: ignore[call-arg]
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
    with pytest.raises(ValueError, match=r"got 'rare_mean'\.$"):
        HierarchicalReadout([4, 2], pooling="rare_mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
def test_an_old_class_or_function_names_the_new_one(module: str, name: str) -> None:
    place = f"ddcl_lightning.{module}".rstrip(".")
    sentence = f"there is no {place}.{name} since version 0.2: it is ddcl_lightning.{NAMES[module][name]} now."
    with pytest.raises(ImportError, match=re.escape(sentence)):
        exec(f"from {place} import {name}")
    operator.attrgetter(NAMES[module][name])(ddcl_lightning)


def test_old_modules_are_refused_as_attributes_too_and_other_names_are_pythons_affair() -> None:
    with pytest.raises(ImportError, match=r"it is ddcl_lightning\.nn\.bank now"):
        exec("from ddcl_lightning import bank")
    assert not hasattr(ddcl_lightning, "nonsense")
    with pytest.raises(AttributeError, match=r"module 'ddcl_lightning.heads' has no attribute 'nonsense'"):
        ddcl_lightning.heads.nonsense  # type: ignore[attr-defined] # noqa: B018


def test_an_old_argument_of_an_optimizer_names_the_new_one() -> None:
    with pytest.raises(
        ValueError, match=r"^prototype_optimizer.args has no .* 'relocate' .* Use relocation_threshold\."
    ):
        clustering_module(prototype_optimizer=OptimizerConfig("TokenNormalized", {"relocate": 0.5}))
    with pytest.raises(ValueError, match=r"args has no argument 'relocate'\."):
        clustering_module(prototype_optimizer=OptimizerConfig("SGD", {"relocate": 0.5}))


def callback(name: str, **arguments: Any) -> str:
    return f"--trainer.callbacks=[{json.dumps({'class_path': name, 'init_args': arguments})}]"


OPTIMIZER = "model has no argument 'prototype_optimizer_args' since version 0.2. Use prototype_optimizer: {name: ..., "
LEVELS = ["--model.head=HierarchicalReadout", "--model.head.num_prototypes=[4,2]"]
WORDS: dict[str, tuple[list[str], str]] = {
    "a head's": (["--model.head.budget=400"], "DDCLReadout has no argument 'budget' since version 0.2. Use max_param"),
    "a head's that has not the new one": (
        ["--model.head=SoftVQ", "--model.head.budget=4"],
        "unknown argument 'budget'",
    ),
    "the model's": (["--model.prototype_optimizer_args={}"], OPTIMIZER),
    "below the model's": (["--model.prototype_optimizer_args.momentum=.9"], OPTIMIZER),
    "in a mapping": (["--model={prototype_optimizer_args: {momentum: .9}}"], OPTIMIZER),
    "a schedule's": (["--model.warmup_steps=3"], "Use lr_schedule: {shape: ..., warmup_steps: ...}."),
    "the trainer's": (["--trainer.patience=3"], "unknown key 'trainer.patience'. Did you mean"),
    "another package's": ([callback("ModelCheckpoint", every=3)], "'every' of lightning.pytorch.callbacks.ModelCheck"),
    "a callback's": ([callback("AdaptiveBankSize", margin=3)], "Use rules: {split_margin: ...}."),
    "another callback's": ([callback("DecompositionCheck", every=3)], "Did you mean 'every_n_batches'?"),
    "of rules": ([callback("AdaptiveBankSize", rules={"merge": 3})], "SizeRules has no argument 'merge' since version"),
    "a unit": ([callback("TemperatureAnnealing", unit="absolute")], "Use start: {value: ..., unit: ...}."),
    "a value": ([*LEVELS, "--model.head.tokens=[all,rare_mean]"], "It is 'idf_mean' since version 0.2."),
    "a module": (["--model.head=ddcl_lightning.bank.X"], "it is ddcl_lightning.nn.bank now."),
    "a class": (["--model.head=ddcl_lightning.heads.PoolingLayer"], "it is ddcl_lightning.heads.PoolingHead now."),
}


@pytest.mark.parametrize("name", WORDS)
def test_an_old_name_on_the_command_line_is_told_in_words_of_a_recipe(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = WORDS[name]
    line = fails(capsys, "fit", "--config", "digits", *words)
    assert expected in line
    assert "=" not in line.partition("Use ")[2]
    assert ".help" not in line
