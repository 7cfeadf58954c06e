"""A parser's account of a value that is wrong or missing, in one sentence: the key, what it must be, what it got."""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

from ddcl_lightning._utils.arguments import nearest
from ddcl_lightning._utils.old_names import renamed_value

_KEY = re.compile(r'^(\s*(?:- )?)Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_EXPECTED = re.compile(r"^\s*(?:- )?Expected an? ((?!path but|dot import).+?)(?:\. Got value: (.*))?$")
_SUBCLASS = re.compile(r"^\s*(?:- )?Not a valid subclass of (\w+)(?:\. Got value: (.*))?$")
_FOREIGN = re.compile(r"^\s*(?:- )?Import path (?:([\w.]+) )?does not correspond to a subclass of (\w+)$")
_SUBTYPES = re.compile(r"^\s*Subtypes: \[(.*)\]$", re.MULTILINE)
_NOT_THERE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_MOVED = re.compile(r"there is no [\w.]+ since version [\d.]+: it is [\w.]+ now\.")
_GIVEN = re.compile(r"^\s*Given value: (.*)$")
_LITERAL = re.compile(r"typing\.Literal\[(.*)\]$")
_REQUIRED = re.compile(r"the following arguments are required: ([\w., ]+)")
_ABSTRACT = re.compile(r"but ([\w.]+) is abstract|class_path '([\w.]+\.LightningDataModule)'")
_NAMED_ABSTRACT = re.compile(r"but is abstract\b.*^\s*Given value: ([\w.]+)$", re.DOTALL | re.MULTILINE)
_NO_INIT = re.compile(r"class_path '([\w.]+)':\s+cannot assign \w+ before Module.__init__\(\) call")
# What the parser stumbles over where null stands in the place of a name, of arguments or of settings.
_NO_CLASS = re.compile(r"argument of type 'NoneType' is not")
_NO_ARGUMENTS = re.compile(r"'NoneType' object has no attribute 'keys'")
_NO_SETTINGS = re.compile(r"Unable to load config \W?null\b")
_NOT_THE_USERS = {__name__.partition(".")[0], "lightning"}
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


def missing_value(message: str) -> str | None:
    """The sentence where a value is needed and none, or null, is given; None where the message is of another kind.

    Args:
        message: As for :func:`wrong_value`.
    """
    keys, owner, body = _innermost(message.splitlines())
    key, text = ".init_args.".join(keys), "\n".join(body)
    match = _REQUIRED.search(text if keys else message)
    if match and not keys:
        names = [re.sub(r"^\w+\.(?=(?:model|data)\b)", "", name) for name in match[1].split(", ")]
        ways = " ".join(f"--{name} CLASS" for name in names)
        return f"{' and '.join(names)} must be given; got null. Pass {ways}, or a --config that holds them."
    problem = _CLASS.search(text)
    owner = problem[1] if problem else owner
    if match:
        ways = " ".join(f"--{key}.{name} {name.upper()}" for name in match[1].split(", "))
        places = " and ".join(f"{key}.init_args.{name}" for name in match[1].split(", "))
        return f"{places} must be given: {owner} has no default for it; got null. Pass {ways}."
    if _NO_CLASS.search(text):
        return f"{key}.class_path must be the name of a class; got null. Pass --{key} CLASS."
    if _NO_ARGUMENTS.search(text):
        return f"{key}.init_args must hold arguments by name; got null. Leave it out, or write them below it."
    if keys and _NO_SETTINGS.search(message):
        return f"{key} must hold settings by name; got null. Leave it out, or write them below it."
    if match := _ABSTRACT.search(text):
        return _abstract(key, match[1] or match[2])
    match = _NAMED_ABSTRACT.search(text)
    return _abstract(key, match[1]) if match else None


def missing_init(message: str) -> str | None:
    """The sentence where a class does not call ``super().__init__()``; None where the message is of another kind.

    Args:
        message: As for :func:`wrong_value`.
    """
    match = _NO_INIT.search(message)
    if match is None:
        return None
    name = match[1].rpartition(".")[2]
    return (
        f"{name}.__init__() must call super().__init__() before it keeps a layer; got a layer first. Make it the first "
        f"line of {name}.__init__()."
    )


def missing_class(message: str) -> str | None:
    """The sentence where a module has no class of the name that is given; None where the message is of another kind.

    Args:
        message: As for :func:`wrong_value`.
    """
    keys, _, body = _innermost(message.splitlines())
    key, text = ".init_args.".join(keys), "\n".join(body)
    if not keys:
        return None
    if moved := _MOVED.search(text):
        return f"{key} must name a class; {moved[0]}"
    if match := _NO_MODULE.search(text):
        return f"{key} must name a class; there is no module {match[1]!r}.{_way_to_import(match[1])}"
    if match := _NOT_THERE.search(text):
        module = importlib.import_module(match[1])
        known = [name for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
        return f"{key} must name a class; {match[1]} has no {match[2]!r}{nearest(match[2], known)}"
    return None


def _way_to_import(module: str) -> str:
    """Remedy for a module that is not on the path, on which the working directory is not put unasked."""
    package, folder = module.partition(".")[0], Path.cwd()
    if any(Path(place or ".").resolve() == folder for place in sys.path):
        return f" Correct the name, or install {package}."
    if Path(f"{package}.py").exists() or Path(package).is_dir():
        return f" {package} lies in this folder: run `python -m ddcl_lightning` instead of `ddcl`, or set PYTHONPATH=."
    return f" Install {package}, or run `python -m ddcl_lightning` from the folder that holds {package}.py."


def innermost_key(message: str) -> str | None:
    """The last part of the key that is wrong."""
    keys, _, _ = _innermost(message.splitlines())
    return keys[-1] if keys else None


def find_class(path: str) -> type | None:
    """The class of a path in a parser's message, which has imported it; None where it is none."""
    module, _, name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), name, None) if module else None
    return owner if inspect.isclass(owner) else None


def _abstract(key: str, path: str) -> str:
    owner = find_class(path)
    if owner is None or owner.__module__.partition(".")[0] in _NOT_THE_USERS:
        return f"{key} must name a class of its own; got {path}, or arguments alone. Pass --{key} CLASS."
    missing = " and ".join(sorted(getattr(owner, "__abstractmethods__", ())))
    return f"{key} must name a class with all of its methods; {path} is abstract: write {missing}."


def wrong_value(message: str) -> str | None:
    """The sentence, or None where the message is of another kind.

    Args:
        message: Of jsonargparse, nested by indentation: keys, classes, and the types that were tried.
    """
    keys, owner, body = _innermost(message.splitlines())
    if not keys:
        return None
    expected: dict[str, None] = {}
    given = foreign = base = None
    for line in body:
        if match := _EXPECTED.match(line):
            expected[_in_words(match[1])] = None
            given = given or match[2]
        elif match := _SUBCLASS.match(line):
            expected[f"the name of a {match[1]}"] = None
            given = given or match[2]
        elif match := _FOREIGN.match(line):
            expected[f"the name of a {match[2]}"] = None
            foreign, base = match[1] or foreign, match[2]
        match = _GIVEN.match(line)
        if match:
            given = match[1]  # of the outermost union: it comes last
    given = foreign or given
    if not expected or given is None:
        return None
    of = f" (an argument of {owner})" if owner else ""
    mappings = _mappings("\n".join(body))
    choices = [*(words for words in expected if words not in mappings), *mappings.values()]
    choices.sort(key=lambda words: words == "null")
    given = "null" if given == "None" else given
    shown = given if len(given) <= 200 else given[:200] + "..."
    rule = f"{'.init_args.'.join(keys)} must be {' or '.join(choices)}"
    remedy = f" Name a subclass of {base}." if base else ""
    return f"{rule}; got {shown or 'nothing'}{of}.{renamed_value(given, rule) or remedy}"


def _mappings(text: str) -> dict[str, str]:
    """Settings of dataclasses, which would do as well, by the words for the class."""
    subtypes = _SUBTYPES.search(text)
    classes = [find_class(path) for path in re.findall(r"<class '([\w.]+)'>", subtypes[1])] if subtypes else []
    fields = {
        kind.__name__: ", ".join(field.name for field in dataclasses.fields(kind))
        for kind in classes
        if kind is not None and dataclasses.is_dataclass(kind)
    }
    return {
        f"the name of a {name}": f"a mapping of {' and '.join(names.rsplit(', ', 1))}" for name, names in fields.items()
    }


def _innermost(lines: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Keys from the outermost to the innermost, the class that has the last one, and what is said of it."""
    keys: list[str] = []
    body: list[str] = []
    owner, depth = None, -1
    for line in lines:
        match = _KEY.match(line)
        indent = len(line) - len(line.lstrip())
        if match and indent > depth:
            problem = _CLASS.search("\n".join(body)) if keys else None
            owner = problem[1] if problem else owner
            keys.append(match[2])
            depth, body = indent, [line[match.end() :].lstrip(": ")]
        elif keys and line.strip() and indent <= depth:
            break  # the next alternative
        elif keys:
            body.append(line)
    return keys, owner, body


def _in_words(kind: str) -> str:
    literal = _LITERAL.match(kind)
    if literal:
        return f"one of {literal[1]}"
    name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _WORDS.get(name, f"a{'n' * (name[:1] in 'AEIOU')} {name}")
