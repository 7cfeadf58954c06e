"""Checks of the names in a checkpoint: they are foreign text, and importing a module runs its code."""

import importlib
import inspect
import re
import sys
import types
from collections.abc import Container, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlparse

import lightning.pytorch as pl
import yaml
from torch.optim import Optimizer

from ddcl_lightning._utils import compat
from ddcl_lightning.backbones.base import Backbone
from ddcl_lightning.checkpoints.reading import HYPER_PARAMETERS, is_keyword, read_checkpoint
from ddcl_lightning.decoders.base import Decoder
from ddcl_lightning.heads.base import Head
from ddcl_lightning.nn.quantizer_base import Quantizer
from ddcl_lightning.optim.factory import OptimizerConfig
from ddcl_lightning.tasks.base import Task

PLUGINS = (Backbone, Head, Task, Decoder, Quantizer, pl.LightningModule, pl.LightningDataModule)
GROUP = "ddcl_lightning.plugins"  # entry points of packages whose metadata name no dependency on this one
OPTIMIZERS = ("prototype_optimizer", "encoder_optimizer")
_OWN = "ddcl-lightning"
_PLAIN = (str, int, float, bool, complex, bytes, types.NoneType, Path)
_CONTAINERS = (list, tuple, set, frozenset, dict, Sequence, Mapping)


class UntrustedName(ValueError):
    """Error that a checkpoint names something that it may not import."""


def check_hyper_parameters(
    module: type[pl.LightningModule],
    hyper_parameters: Mapping[str, Any],
    source: str,
    trusted: Container[str] = (),
) -> None:
    """Refuse hyperparameters that would import anything else than plug-ins, before anything is imported.

    A class must be a backbone, head, task, decoder, quantizer, module or data module that is imported already, or of an
    installed distribution which depends on ddcl-lightning (or registers in the entry point group
    ``ddcl_lightning.plugins``). So must an optimizer; those of torch need no more.
    Text is accepted only where the annotations of these classes ask for text.

    Args:
        module: The class that they are arguments of.
        hyper_parameters: As the checkpoint holds them.
        source: What holds them, for the error.
        trusted: Names that the user gave, which need no check.

    Raises:
        UntrustedName: If they name something else; says which, where, and how to trust it.
    """
    known = inspect.signature(module).parameters
    check = _Check(source, trusted)
    for name, value in hyper_parameters.items():
        if name == "_class_path":
            check.plugin(value, "model")
        elif name not in known and name != "_instantiator":  # for which Lightning has a list of its own
            _refuse(source, f"model.{name}", value, f"is no argument of {module.__name__}")
    try:
        check.arguments(module, {name: hyper_parameters[name] for name in known if name in hyper_parameters}, "model")
    except RecursionError:
        raise UntrustedName(f"{source} is refused: its hyperparameters are nested too deeply.") from None


def check_object(kind: type, settings: Any, source: str, key: str) -> None:
    """Refuse settings of an object, ``class_path`` and ``init_args``, by the rules of :func:`check_hyper_parameters`.

    Args:
        kind: Base class that it is to be of.
        settings: As a checkpoint, or a config beside it, holds them.
        source: What holds them, for the error.
        key: Their name, for the error.

    Raises:
        UntrustedName: If they name something that they may not, or are no settings of an object.
    """
    if not isinstance(settings, Mapping) or "class_path" not in settings:
        _refuse(source, key, settings, "must be given by class_path and init_args")
    try:
        _Check(source, ()).value(settings, kind, key)
    except RecursionError:
        raise UntrustedName(f"{source} is refused: its {key} are nested too deeply.") from None


def stored_hyper_parameters(checkpoint: Any, to_resume: bool = False) -> dict[str, Any]:
    """Hyperparameters in a checkpoint, read without running anything in it.

    Args:
        checkpoint: Path of a file, which must be a checkpoint; or an address or an open file, which is left where it
            was: there none are found where it cannot be read, since whoever loads it says what is wrong with it.
        to_resume: See :func:`~ddcl_lightning.checkpoints.reading.read_checkpoint`.

    Raises:
        ValueError: If the file is no checkpoint.
    """
    held: Any
    if isinstance(checkpoint, (str, Path)) and not is_keyword(checkpoint):
        held = read_checkpoint(checkpoint, to_resume)
    else:
        place = checkpoint.tell() if hasattr(checkpoint, "tell") else None
        try:
            held = compat.load_checkpoint(checkpoint, map_location="meta", weights_only=True)
        except Exception:
            held = None
        finally:
            if place is not None:
                checkpoint.seek(place)
    stored = [held.get(key) for key in HYPER_PARAMETERS] if isinstance(held, dict) else []
    return {name: value for values in stored if isinstance(values, dict) for name, value in values.items()}


class _Check:
    """One pass over nested arguments.

    Args:
        source: What holds them.
        trusted: Names that the user gave.
    """

    def __init__(self, source: str, trusted: Container[str]) -> None:
        self.source, self.trusted = source, trusted

    def arguments(self, kind: Any, given: Any, key: str) -> None:
        """Arguments of a class by its annotations."""
        if not isinstance(given, Mapping):
            _refuse(self.source, key, given, "must be arguments by name")
        hints = _hints(kind)
        for name, value in given.items():
            place = f"{key}.{name}"
            if not (isinstance(name, str) and name.isidentifier()):  # the parser reads dots and + in names
                _refuse(self.source, place, value, "is no argument's name")
            if (name in OPTIMIZERS or kind is OptimizerConfig) and isinstance(value, str):
                self.optimizer(value, place)
            else:
                self.value(value, hints.get(name, Any), place)

    def value(self, value: Any, hint: Any, key: str) -> None:
        """A value where ``hint`` is expected."""
        kinds = _alternatives(hint)
        if isinstance(value, Mapping) and "class_path" in value:
            if not set(value) <= {"class_path", "init_args", "dict_kwargs"}:
                _refuse(self.source, key, sorted(map(str, value)), "must hold class_path and init_args alone")
            kind = self.plugin(value["class_path"], key)
            for field in ("init_args", "dict_kwargs"):
                self.arguments(kind, value.get(field) or {}, f"{key}.{field}")
        elif isinstance(value, (Mapping, list, tuple)):
            objects = [kind for kind in kinds if is_dataclass(kind)] if isinstance(value, Mapping) else []
            if objects:  # such as a Temperature
                self.arguments(objects[0], value, key)
                return
            inner = [kind for kind in kinds if kind is Any or get_origin(kind) in _CONTAINERS or kind in _CONTAINERS]
            if not inner:
                _refuse(self.source, key, value, "must be given by class_path and init_args")
            element: Any = Union.__getitem__(tuple(_element(kind) for kind in inner))
            values = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, field in values:
                self.value(field, element, f"{key}.{name}")
        elif isinstance(value, str) and value not in self.trusted:
            self.text(value, kinds, key)

    def text(self, value: str, kinds: Sequence[Any], key: str) -> None:
        """A string, which the parser would read as a class, a function, a file of settings or YAML elsewhere."""
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if value in choices:
            return
        if all(map(_is_plain, kinds)) and any(kind in (str, Path, Any) for kind in kinds):
            if Any not in kinds or not _is_structure(value):
                return
        elif value in {kind.__name__ for base in PLUGINS for kind in _imported_subclasses(base)}:
            return
        _refuse(self.source, key, value, "must not be text")

    def plugin(self, name: Any, key: str) -> Any:
        """The class that a class path names."""
        if isinstance(name, str):
            if name in self.trusted:
                return _resolve(name, lambda top: True)
            imported = [kind for base in PLUGINS for kind in _imported_subclasses(base) if kind.__name__ == name]
            kind = imported[-1] if imported else _resolve(name, lambda top: _depends(top, {_OWN}))
            if isinstance(kind, type) and issubclass(kind, PLUGINS):
                return kind
        _refuse(
            self.source,
            key,
            name,
            "is no backbone, head, task, decoder, quantizer or module that is imported already or of an installed "
            "package that depends on ddcl-lightning",
        )

    def optimizer(self, name: str, key: str) -> None:
        """The name of an optimizer; short ones are looked up in ``torch.optim`` alone."""
        if "." not in name or name in self.trusted:
            return
        kind = _resolve(name, lambda top: _depends(top, {_OWN}))
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            _refuse(
                self.source,
                key,
                name,
                "is no Optimizer that is imported already or of an installed package that depends on ddcl-lightning",
            )


def _refuse(source: str, key: str, value: Any, why: str) -> NoReturn:
    raise UntrustedName(
        f"{source} is refused: its hyperparameters give {key} = {value!r:.200}, which {why}. Nothing of it was run. "
        f"If you trust it, give {key} yourself (in the config, or as an argument), or import its module first."
    )


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind.__init__)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can resolve
        return dict.fromkeys(inspect.signature(kind).parameters, object)


def _alternatives(hint: Any) -> list[Any]:
    """Members of unions, as deep as they go."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for argument in get_args(hint) for kind in _alternatives(argument)]
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    return [hint]


def _element(kind: Any) -> Any:
    arguments = [argument for argument in get_args(kind) if argument is not ...]
    return Union.__getitem__(tuple(arguments)) if arguments else Any


def _is_plain(kind: Any) -> bool:
    """True if text given for this type stays text or becomes numbers."""
    if kind is Any or kind in _PLAIN or get_origin(kind) is Literal:
        return True
    return get_origin(kind) in _CONTAINERS and all(
        _is_plain(alternative) for inner in get_args(kind) if inner is not ... for alternative in _alternatives(inner)
    )


def _is_structure(text: str) -> bool:
    """True if text is a list or mapping in YAML, which may contain a class path."""
    try:
        return isinstance(yaml.safe_load(text), (dict, list))
    except (yaml.YAMLError, ValueError, RecursionError):
        return any(mark in text for mark in "{[:")


def _imported_subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [kind for child in children for kind in (child, *_imported_subclasses(child))]


def _resolve(name: str, may_import: Any) -> Any:
    """Object of a dotted name, without an import that is not allowed; None where it cannot be found so."""
    names = name.split(".")
    if not all(segment.isidentifier() for segment in names):
        return None
    for cut in range(len(names) - 1, 0, -1):
        path = ".".join(names[:cut])
        module = sys.modules.get(path)
        if module is None and cut == len(names) - 1 and may_import(path):
            try:
                module = importlib.import_module(path)
            except ImportError:
                return None
        if module is not None:
            for segment in names[cut:]:
                module = getattr(module, segment, None)
            return module
    return None


def _depends(module: str, on: set[str]) -> bool:
    """True if a module is of an installed distribution that is, or requires, one of others; imports nothing."""
    top = module.partition(".")[0]
    file = _origin(module)
    if file is None:
        return False
    registered = [point.dist for point in metadata.entry_points(group=GROUP) if point.module.split(".")[0] == top]
    if any(dist is not None and _holds(dist, file) for dist in registered):
        return True
    owners = [metadata.distribution(name) for name in metadata.packages_distributions().get(top, [])]
    return any(
        _holds(dist, file) and on & {_canonical(name) for name in (dist.metadata["Name"], *(dist.requires or []))}
        for dist in owners
    )


def _origin(module: str) -> Path | None:
    """File of a module, found without running any of its packages."""
    names = module.split(".")
    spec = find_spec(names[0]) if names[0] not in sys.modules else sys.modules[names[0]].__spec__
    for depth in range(1, len(names)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(names[: depth + 1]), list(spec.submodule_search_locations))
    return Path(spec.origin).resolve() if spec is not None and spec.origin and spec.has_location else None


def _holds(dist: metadata.Distribution, file: Path) -> bool:
    """True if a file lies where a distribution is installed, or in the project of an editable one."""
    roots = [Path(str(dist.locate_file(""))).resolve()]
    editable = re.search(r'"url"\s*:\s*"(file:[^"]+)"', dist.read_text("direct_url.json") or "")
    if editable:
        roots.append(Path(unquote(urlparse(editable[1]).path)).resolve())
    return any(file.is_relative_to(root) for root in roots)


def _canonical(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", name[0]).lower() if name else ""
