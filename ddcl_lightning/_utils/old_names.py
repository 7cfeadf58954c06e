"""Names of version 0.1 that are refused with the one to use now."""

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

_PACKAGE = __name__.partition(".")[0]
_BUDGET = {"budget": "max_parameters"}
_UNIT = {"temperature_unit": "temperature=Temperature(value, unit)"}
_RENAMED_RULES = {"merge": "merge_distance", "prune": "prune_fraction", "margin": "split_margin"}
_RULES = {name: name for name in ("significance", "patience", "min_prototypes", "max_prototypes")} | _RENAMED_RULES
# By class: the old argument, and the new one, with the class and the fields that it takes where it takes such.
_SIGNS = {
    "min_separation": "duplicate_distance",
    "max_drop": "max_drop",
    "max_entropy": "max_entropy",
    "min_dimension": "min_rank",
    "patience": "patience",
}
ARGUMENTS: dict[str, dict[str, str]] = {
    "AdaptiveBankSize": {
        "every": "frequency",
        "per": "interval",
        **{old: f"rules=SizeRules({new})" for old, new in _RULES.items()},
    },
    "AttentionPooling": _BUDGET,
    "CLSPooling": _BUDGET,
    "CodebookMonitor": {"duplicate_distance": "rules=CollapseRules(duplicate_distance)"},
    "CollapseWarning": {old: f"rules=CollapseRules({new})" for old, new in _SIGNS.items()},
    "DDCLAttention": _UNIT,
    "DDCLFeedForward": _UNIT,
    "DDCLReadout": {**_BUDGET, **_UNIT},
    "DDCLReadoutModule": {
        "prototype_optimizer_args": "prototype_optimizer=OptimizerConfig(name, args)",
        "encoder_optimizer_args": "encoder_optimizer=OptimizerConfig(name, args)",
        "warmup_steps": "lr_schedule=LRSchedule(shape, warmup_steps)",
    },
    "HierarchicalReadout": {**_BUDGET, **_UNIT},
    "MeanPooling": _BUDGET,
    "PMAPooling": _BUDGET,
    "PerceiverPooling": _BUDGET,
    "PrototypeBank": _UNIT,
    "PrototypeNorm": _UNIT,
    "SizeRules": _RENAMED_RULES,
    "SlotAttentionPooling": _BUDGET,
    "SoftVQ": _UNIT,
    "SoftVectorQuantizer": _UNIT,
    "TemperatureAnnealing": {"per": "interval", "unit": "start=Temperature(value, unit)"},
    "TokenNormalized": {"relocate": "relocation_threshold", "balance": "load_exponent"},
    "VQPooling": {**_BUDGET, "beta": "commitment_weight", "dim": "code_dim"},
    "VectorQuantizer": {"beta": "commitment_weight"},
}
# Classes and functions, by the module that one looks for them in.
NAMES: dict[str, dict[str, str]] = {
    "": {"PlacedPrototypes": "PrototypeAdapter"},
    "adapters": {"PlacedPrototypes": "PrototypeAdapter"},
    "functional": {
        "TokenMeans": "functional.TokenStatistics",
        "cells": "functional.cells_of",
        "log_barrier": "functional.repulsion_energy",
        "merge_cells": "functional.TokenStatistics.merge",
        "merge_token_means": "functional.TokenStatistics.merge",
    },
    "heads": {"PoolingLayer": "heads.PoolingHead"},
    "heads.pooling": {"PoolingLayer": "heads.PoolingHead"},
    "monitoring.recording": {"BankProbe": "record_codebooks", "Observation": "CodebookRecord"},
    "nn.idf": {"PrototypeRarity": "nn.idf.PrototypeIDF"},
}
MODULES = {
    "attention": "nn.attention",
    "bank": "nn.bank",
    "codebook_metrics": "metrics.codebook_metrics",
    "collect": "monitoring.token_sampling",
    "critical": "nn.running_covariance",
    "distributed": "_utils.distributed",
    "estimator": "integrations.scikit_learn",
    "evaluation": "metrics.probing",
    "feedforward": "adapters.feedforward",
    "figures": "monitoring.plots",
    "kmeans": "nn.initialization",
    "placement": "adapters",
    "probe": "monitoring.recording",
    "quantizer": "nn.quantizer",
    "rarity": "nn.idf",
    "rates": "optim.two_timescale",
    "reconstruction_metrics": "metrics.reconstruction_metrics",
    "replacement": "adapters.replacement",
    "resizing": "optim.resizing",
    "scale": "nn.scaling",
    "signals": "monitoring.signals",
}
VALUES = {"rare_mean": "idf_mean", "rare_inputs": "idf_inputs"}


def renamed_argument(
    owner: type, given: Iterable[str], *, called: str | None = None, as_yaml: bool = False
) -> str | None:
    """A sentence about the first argument that has another name now, or None.

    Args:
        owner: Class that was given them; one of this package, or made from one, has something to say.
        given: Names that were given.
        called: The class in the sentence's words, by default its name.
        as_yaml: Say the new argument as files of settings write it, not as Python does.
    """
    known = inspect.signature(owner).parameters
    ours = [base for base in owner.__mro__ if base.__module__.partition(".")[0] == _PACKAGE]
    for name in given:
        for new in (ARGUMENTS.get(base.__name__, {}).get(name) for base in ours):
            if new is not None and name not in known and new.partition("=")[0] in known:
                way = _in_yaml(new) if as_yaml else _in_python(new)
                return f"{called or owner.__name__} has no argument {name!r} since version 0.2. Use {way}."
    return None


def renamed_value(text: str, choices: str) -> str:
    """``" It is ... since version 0.2."`` for a text with an old word for one of the choices, else nothing."""
    for old, new in VALUES.items():
        if re.search(rf"\b{old}\b", text) and repr(new) in choices:
            return f" It is {new!r} since version 0.2."
    return ""


def refuse_old_names() -> None:
    """Let the packages that had :data:`NAMES` and :data:`MODULES` say where those are.

    An ImportError, since ``from ... import`` puts a sentence of its own in the place of an AttributeError's.
    """
    for package, names in NAMES.items():
        module = f"{_PACKAGE}.{package}".rstrip(".")
        # Not written in the modules: for type checkers they would have every name then.
        vars(sys.modules[module])["__getattr__"] = _Refusal(module, names if package else {**names, **MODULES})


class _Refusal:
    def __init__(self, module: str, names: dict[str, str]) -> None:
        self.module, self.names = module, names

    def __call__(self, name: str) -> NoReturn:
        if name in self.names:
            raise ImportError(_moved(f"{self.module}.{name}", self.names[name]), name=self.module)
        raise AttributeError(f"module {self.module!r} has no attribute {name!r}")


class _OldModules(MetaPathFinder):
    """Asked last for a module that nobody has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, or an error that says where the module is."""
        package, _, name = fullname.partition(".")
        if package == _PACKAGE and name in MODULES:
            raise ModuleNotFoundError(_moved(fullname, MODULES[name]), name=fullname)
        return None


def _moved(old: str, new: str) -> str:
    return f"there is no {old} since version 0.2: it is {_PACKAGE}.{new} now."


def _in_python(new: str) -> str:
    return re.sub(r"\b(\w+)(?=[,)])", r"\1=...", new)


def _in_yaml(new: str) -> str:
    argument, _, rest = new.partition("=")
    return f"{argument}: {{{re.sub(r'[,)]', ': ...,', rest.partition('(')[2]).rstrip(',')}}}" if rest else argument


sys.meta_path.append(_OldModules())
