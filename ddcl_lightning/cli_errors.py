"""Parser errors whose first line names the key and the nearest valid one."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback

from ddcl_lightning.backbones import Backbone
from ddcl_lightning.heads import Head
from ddcl_lightning.tasks import Task

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|[Uu]nrecognized arguments?:?) '?-{0,2}([\w.]+)")
_UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"Parser key \"([\w.]+)\".*?dot import path string: ([\w.]+)", re.DOTALL)
# Under a type that may be None, a class that refuses an argument is reported as one failed alternative of several.
_REFUSED_VALUE = re.compile(r"Does not validate against any.*?Errors:\s+- (.*?)\n\s+- Expected", re.DOTALL)
_BASES = {"model.backbone": Backbone, "model.head": Head, "model.task": Task, "data": LightningDataModule}


def explain(message: str, parser: ArgumentParser) -> str:
    """A parser's message, headed by a line that names the unknown key or class and the nearest valid one."""
    found = _UNKNOWN_ARGUMENT.search(message)
    if found:
        path, key = found.groups()
        return f"unknown argument {key!r} of {path}{nearest(key, _arguments(path))}"
    found = _UNKNOWN_OPTION.search(message)
    if found:
        key = found.group(1)
        known = [action.dest for action in parser._actions if action.dest]
        return f"unknown key {key!r}{nearest(key, known)}"
    found = _UNKNOWN_CLASS.search(message)
    if found:
        key, name = found.groups()
        base = _BASES.get(key, Callback)
        return f"unknown class {name!r} for {key}{nearest(name, (c.__name__ for c in _subclasses(base)))}"
    found = _REFUSED_VALUE.search(message)
    if found:
        return found.group(1)
    return message


def nearest(word: str, known: Iterable[str]) -> str:
    """``". Did you mean ...?"``, or the valid words where none is near."""
    words = sorted(set(known))
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if close:
        return f". Did you mean {close[0]!r}?"
    return f". Valid are: {', '.join(words)}." if 0 < len(words) <= 30 else "."


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _subclasses(base: type) -> Iterable[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)
