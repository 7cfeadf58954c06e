"""Every public class of a kind, in the package and in the plug-in of the tests, and how to make one of it.

Nobody lists classes. What a class needs is made from the names of its arguments; only one whose arguments mean
something of their own has an entry in ``NEEDED``.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest
import torch
from tiny_models import tiny_bert

import ddcl_lightning
from ddcl_lightning import (
    Clustering,
    DDCLReadout,
    IdentityBackbone,
    PrototypeBank,
    SequenceDecoder,
    VectorQuantizer,
)
from ddcl_lightning._utils.checkout import MAPPED_FOLDERS

PLUGIN = "acme_readouts"
DIM = 8  # of tokens
# Libraries without which some classes are left out.
OPTIONAL = ("sentence_transformers", "timm", "torchvision", "transformers", "vector_quantize_pytorch")

# What an argument without a default is given, by its name.
ARGUMENTS: dict[str, Any] = {
    "decoder": lambda: SequenceDecoder(DIM),
    "dim": DIM,
    "embed_dim": DIM,
    "in_channels": 1,
    "in_features": DIM,
    "num_classes": 4,
    "num_clusters": 4,
    "num_codes": 6,
    "num_levels": 2,
    "num_components": 3,
    "num_prototypes": 6,
    "out_channels": 1,
    "out_dim": DIM,
    "path": "a.csv",
    "quantizer": lambda: VectorQuantizer(DIM, 6),
}
# What a class needs besides, or instead: those whose arguments of these names mean something else.
NEEDED: dict[str, Callable[[], dict[str, Any]]] = {
    "DDCLAttention": lambda: {"num_prototypes": 3},
    "DDCLReadoutModule": lambda: {
        "backbone": IdentityBackbone(DIM),
        "head": DDCLReadout(4, embedding_scale="none"),
        "task": Clustering(4),
    },
    "HierarchicalReadout": lambda: {"num_prototypes": [6, 3]},
    "LibraryQuantizer": lambda: {"quantizer": "VectorQuantize", "quantizer_args": {"codebook_size": 6}},
    "LibraryVQ": lambda: {"quantizer": "VectorQuantize", "quantizer_args": {"codebook_size": 6}},
    "PatchBackbone": lambda: {"patch_size": 2},
    "PrototypeNorm": lambda: {"num_prototypes": 3},
    "TimmBackbone": lambda: {"model": "test_resnet", "pretrained": False},
    "TokenNormalized": lambda: {"params": [PrototypeBank(4, 2).prototypes]},
    "TransformersBackbone": lambda: {"model": _bert()},
}


def module_names(package: ModuleType) -> list[str]:
    """Names of a package and of every module in it, sorted; also in folders that are mapped into ours by its install.

    Those lie beside the package in a checkout, where a walk along its path does not come.
    """
    walks = [(package.__path__, package.__name__)]
    if package is ddcl_lightning:
        mapped = [importlib.import_module(f"{package.__name__}.{folder}") for folder in MAPPED_FOLDERS]
        walks += [(folder.__path__, folder.__name__) for folder in mapped]
    walked = {module.name for path, name in walks for module in pkgutil.walk_packages(path, f"{name}.")} | {
        name for _, name in walks
    }
    return sorted(name for name in walked if not name.endswith("__main__"))


def modules() -> Iterator[ModuleType]:
    """Every module of the package and of the plug-in, but those whose optional library is missing."""
    folder = str(Path(__file__).parent / "plugin")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    for name in [*module_names(ddcl_lightning), *module_names(importlib.import_module(PLUGIN))]:
        try:
            yield importlib.import_module(name)
        except ImportError as error:
            if not _is_optional(error):
                raise


def is_concrete(kind: type) -> bool:
    """Whether a class can be made, also one that marks methods as abstract without being an ABC."""
    return not any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def classes(base: type) -> list[type]:
    """Public concrete classes of a kind, by name; those of files that begin with an underscore are bases."""
    candidates = {
        value
        for module in modules()
        for name, value in vars(module).items()
        if inspect.isclass(value) and not get_origin(value) and issubclass(value, base) and not name.startswith("_")
    }
    candidates = {value for value in candidates if not value.__module__.rpartition(".")[2].startswith("_")}
    shipped = (value for value in candidates if value.__module__.split(".")[0] in (ddcl_lightning.__name__, PLUGIN))
    return sorted(filter(is_concrete, shipped), key=lambda kind: kind.__name__)


def needed(kind: type) -> dict[str, Any]:
    """What a class must be given.

    Raises:
        LookupError: If nobody knows; the message says where to say it.
    """
    given = NEEDED.get(kind.__name__, dict)()
    for name, parameter in inspect.signature(kind).parameters.items():
        fixed = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if fixed and parameter.default is parameter.empty and name not in given:
            if name not in ARGUMENTS:
                raise LookupError(
                    f"{kind.__name__} needs {name!r}, and the tests do not know what to give it: give it a default, or "
                    f"add what {kind.__name__} needs to NEEDED in tests/registry.py (or to ARGUMENTS, if every class "
                    "with an argument of that name takes the same)."
                )
            value = ARGUMENTS[name]
            given[name] = value() if callable(value) else value
    return given


def make(kind: type, **options: Any) -> Any:
    """An instance, from its defaults and what it needs; every time with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return kind(**{**needed(kind), **options})
        except ImportError as error:
            if not _is_optional(error):
                raise
            pytest.skip(str(error))


def _is_optional(error: ImportError) -> bool:
    """Whether an optional library is missing, or what says so."""
    missing = error.__context__ if isinstance(error.__context__, ImportError) else error
    return (missing.name or "").partition(".")[0] in OPTIONAL


def _bert() -> str:
    """A tiny model, made once per process; a folder that is gone with it."""
    if not _FOLDERS:
        from tempfile import TemporaryDirectory

        _FOLDERS.append(TemporaryDirectory())
        tiny_bert(Path(_FOLDERS[0].name) / "bert")
    return str(Path(_FOLDERS[0].name) / "bert")


_FOLDERS: list[Any] = []
