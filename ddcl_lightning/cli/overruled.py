"""Settings of the model that a checkpoint overrules: which of them are refused, and which are only named."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ddcl_lightning.cli.config_files import CONFIG_OPTIONS, SUFFIXES, options
from ddcl_lightning.cli.wrong_values import find_class

CLASS = ".class_path"


class Overruled(NamedTuple):
    """A setting of the model that a checkpoint has another value for.

    Attributes:
        name: Dotted, such as ``model.head.init_args.num_prototypes``.
        stored: In the checkpoint.
        given: In configs, words and defaults.
        explicit: Whether a word of the command line gives it.
    """

    name: str
    stored: Any
    given: Any
    explicit: bool

    @property
    def refused(self) -> bool:
        """True if training or evaluating the checkpoint's model is not what was asked for."""
        return self.explicit or (self.name.endswith(CLASS) and self.given is not None)


def overruled_settings(given: Mapping[str, Any], stored: Mapping[str, Any], words: Sequence[str]) -> list[Overruled]:
    """Settings of the model that a checkpoint overrules, classes without their arguments.

    Args:
        given: Settings by dotted names, as configs, words and defaults give them.
        stored: The same, with those of the checkpoint in their place.
        words: Of the command line.
    """
    named = set(_named(words))
    different = [
        Overruled(f"model.{name}", value, given.get(name), _is_named(f"model.{name}", given, named))
        for name, value in stored.items()
        if not _equal(name, value, given.get(name)) and value == value  # NaN is refused elsewhere
    ]
    classes = {setting.name.removesuffix(CLASS) for setting in different if setting.name.endswith(CLASS)}
    return [
        setting
        for setting in different
        if setting.name.endswith(CLASS) or not any(setting.name.startswith(f"{owner}.init_args.") for owner in classes)
    ]


def refusal(settings: Sequence[Overruled], path: Any) -> str:
    """Sentence that refuses a checkpoint whose model is not the one that was asked for.

    Args:
        settings: What differs.
        path: Of the checkpoint.
    """
    listed = ", ".join(f"{_short(s.name)} = {_value(s.stored)} (got {_value(s.given)})" for s in settings)
    return (
        f"ckpt_path must be of the model that the config and the options give; {str(path)!r} was trained with {listed}"
        ". Give what it was trained with, leave the option out, or name another checkpoint."
    )


def _equal(name: str, stored: Any, given: Any) -> bool:
    if stored == given:
        return True
    if not (name.endswith("class_path") and isinstance(stored, str) and isinstance(given, str)):
        return False
    return _class(stored) is _class(given) is not None  # a class may have several paths


def _is_named(name: str, given: Mapping[str, Any], named: set[str]) -> bool:
    """True if a word gives a setting, as a whole or in its entries."""
    short = _short(name)
    if any(word == short or word.startswith(f"{short}.") for word in named):
        return not (name.endswith(CLASS) and short not in named)
    # A word for a setting that has entries of its own, such as a temperature, gives all of them; one for a class not.
    owners = (word for word in named if short.startswith(f"{word}."))
    classes = {_short(f"model.{key}") for key in given if key.endswith(CLASS)} | {"model"}
    return any(owner not in classes for owner in owners)


def _named(words: Sequence[str]) -> Iterator[str]:
    """Names of the settings of the model that words give, without ``init_args`` and ``class_path``."""
    for option, value in options(words):
        name = option.lstrip("-").rstrip("+")
        if option in CONFIG_OPTIONS or name.partition(".")[0] != "model":
            continue
        if Path(value).suffix.lower() in SUFFIXES and Path(value).is_file():
            value = Path(value).read_text(encoding="utf-8-sig")
        try:
            settings = yaml.safe_load(value)
        except yaml.YAMLError:
            settings = None
        for entry in _leaves(settings, name):
            yield _short(entry)


def _leaves(value: Any, name: str) -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield name
        return
    for key, entry in value.items():
        yield from _leaves(entry, f"{name}.{key}")


def _short(name: str) -> str:
    """Name of a setting as a word may give it."""
    return name.replace(".init_args", "").removesuffix(CLASS)


def _value(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) and _class(value) else repr(value)


def _class(path: str) -> type | None:
    try:
        return find_class(path)
    except (ImportError, ValueError):
        return None
