"""Config files and settings in words, looked at before they are parsed: what is wrong is one sentence with the line."""

import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ddcl_lightning._utils.arguments import LARGEST

GROUPS = ("trainer", "model", "summary", "predictions", "interruption")
CONFIG_OPTIONS = ("--config", "-c")
MAX_EXPANDED = 10_000  # values after aliases; the longest recipe has 150
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_NUMBERS = {f"{_TAG}int": "an integer", f"{_TAG}float": "a number"}
_KINDS = {**_NUMBERS, f"{_TAG}bool": "true or false", f"{_TAG}null": "null"}
_TEXT = {f"{_TAG}{kind}" for kind in ("str", "timestamp", "value")}  # the parser reads a date as text
_PLAIN = {*_KINDS, *_TEXT, _MERGE, f"{_TAG}seq", f"{_TAG}map"}
SUFFIXES = {".yaml", ".yml", ".json"}


def check_config(path: str | Path, option: str = "--config") -> None:
    """Refuse a file that is no config, or that says one thing twice.

    Args:
        path: Of the file.
        option: That gave it.

    Raises:
        ValueError: If it cannot be read, is not YAML in UTF-8, holds no settings by name, holds a key twice or one that
            is no text, an object of Python, an integer beyond 64 bits, or aliases that stand for too much.
    """
    place = f"{option} {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be in UTF-8; byte {error.start} is not. Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{place} must be a file that you may read ({reason}). Correct the path.") from None
    check_text(text, place)


def check_text(text: str, place: str) -> None:
    """Refuse a text that is no config, as :func:`check_config` does.

    Args:
        text: Of a config.
        place: Where it is, for the error.

    Raises:
        ValueError: As :func:`check_config`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, MappingNode):
            raise ValueError(
                f"{place} must hold settings by name, such as 'model:'; got {text.strip()[:40] or 'nothing'!r}. "
                "`ddcl recipes copy` gives one to start from."
            )
        _Check(place).run(root, _Names.SETTINGS)
        for key, value in root.value:
            if key.value == "config":
                raise ValueError(
                    f"{place} must not name another config ({_line(key)}). Take it out, and pass both with --config."
                )
            nothing_else = isinstance(value, SequenceNode) or value.tag in (*_NUMBERS, f"{_TAG}bool")
            if key.value in GROUPS and nothing_else:
                raise ValueError(
                    f"{place} must hold settings by name below {key.value!r}; got {_described(value)} in "
                    f"{_line(value)}. Write them as NAME: VALUE."
                )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        hint = " Indent by spaces, not tabs." if "'\\t'" in str(error) else " Correct that line."
        raise ValueError(f"{place} must be YAML; {error.problem or error.context}{line}.{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{place} must be YAML; {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ValueError(f"{place} must not be nested so deeply. Write it flat.") from None


def check_words(words: Sequence[str]) -> None:
    """Refuse settings given as words, ``--trainer '{max_epochs: 1}'`` or ``--model FILE.yaml``, likewise.

    Args:
        words: After ``ddcl``.

    Raises:
        ValueError: As :func:`check_config`, naming the word.
    """
    for option, value in options(words):
        if option in CONFIG_OPTIONS:
            continue
        if Path(value).suffix.lower() in SUFFIXES and "\n" not in value and Path(value).is_file():
            check_config(value, option)
            continue
        if option[2:] in GROUPS and value != "null":
            check_text(value, option)
            continue
        try:
            root = yaml.compose(value, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):  # a word need not be YAML; where it must be, the parser says so
            continue
        if isinstance(root, ScalarNode):
            # Which of its kinds a single value is the parser knows, but it cannot read an integer like that.
            if root.tag in _NUMBERS and len(value) > sys.int_info.default_max_str_digits:
                _Check(option).run(root, _Names.FREE)
        elif root is not None:
            names = re.fullmatch(r"--\w+|--model\.\w+|.*\.init_args", option)
            _Check(option).run(root, _Names.SETTINGS if names else _Names.FREE)


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options with their values."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not option.startswith("-"):
            continue
        if equals:
            yield option, value
        elif place + 1 < len(words) and not words[place + 1].startswith("--"):
            yield option, words[place + 1]


class _Names(Enum):
    """Kinds of the keys of a mapping."""

    SETTINGS = "names of settings, and so are those below"
    ARGUMENTS = "names of arguments, whose values are anything"
    FREE = "anything"

    @property
    def below(self) -> "_Names":
        """Kind of the keys of its values."""
        return _Names.FREE if self is _Names.ARGUMENTS else self


class _Check:
    """Checks of the nodes of a text, each looked at once, however often aliases repeat it.

    Args:
        place: Where the text is, for the error.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._sizes: dict[int, int] = {}  # values of a node after aliases
        self._open: set[int] = set()

    def run(self, root: Node, names: _Names) -> None:
        """Check all of it."""
        expanded = self._visit(root, names)
        if expanded > max(MAX_EXPANDED, len(self._sizes)):
            number = f"{expanded:,}" if expanded < 10**9 else f"more than 10^{len(str(expanded)) - 1}"
            raise ValueError(
                f"{self.place} must not repeat more than {MAX_EXPANDED:,} values by aliases; it stands for {number}. "
                "Take aliases of aliases out."
            )

    def _visit(self, node: Node, names: _Names) -> int:
        if id(node) in self._open:
            raise ValueError(f"{self.place} must not contain itself ({_line(node)}). Take the alias out.")
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        if node.tag not in _PLAIN:
            raise ValueError(
                f"{self.place} must hold plain values; got the tag {_short(node.tag)} in {_line(node)}. Write text, "
                "numbers, lists and mappings, and classes as class_path."
            )
        self._open.add(id(node))
        size = 1
        if isinstance(node, ScalarNode):
            self._check_scalar(node)
        elif isinstance(node, SequenceNode):
            size += sum(self._visit(child, names) for child in node.value)
        elif isinstance(node, MappingNode):
            size += self._visit_mapping(node, names)
        self._open.remove(id(node))
        self._sizes[id(node)] = size
        return size

    def _check_scalar(self, node: ScalarNode) -> None:
        kind = _NUMBERS.get(node.tag)
        if kind is None:
            return
        got = f"got {node.value[:40]!r} in {_line(node)}"
        if ":" in node.value:
            raise ValueError(f"{self.place} must not count in sixties; {got}, a number in YAML. Put it in quotes.")
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (ValueError, KeyError):
            value = None
        if value is None or (kind == "an integer" and abs(value) > LARGEST):
            most = f" of at most {LARGEST}" if kind == "an integer" else ""
            raise ValueError(f"{self.place} must have {kind}{most} there; {got}. Correct it, or put text in quotes.")

    def _visit_mapping(self, node: MappingNode, names: _Names) -> int:
        if any(key.value == "class_path" for key, _ in node.value) and names is _Names.FREE:
            names = _Names.SETTINGS
        size = 0
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            self._check_key(key, value, names)
            if key.tag != _MERGE and (key.tag, key.value) in first:
                raise ValueError(
                    f"{self.place} must give every key once; {key.value!r} is in lines {first[key.tag, key.value]} and "
                    f"{key.start_mark.line + 1}. Remove one of them."
                )
            first[key.tag, key.value] = key.start_mark.line + 1
            below = _Names.ARGUMENTS if key.value in ("init_args", "dict_kwargs") else names.below
            size += 1 + self._visit(value, below)
        return size

    def _check_key(self, key: Node, value: Node, names: _Names) -> None:
        if not isinstance(key, ScalarNode):
            raise ValueError(
                f"{self.place} must have text as keys; got {_described(key)} in {_line(key)}. Write a name there."
            )
        if key.tag == _MERGE:
            merged = value.value if isinstance(value, SequenceNode) else [value]
            if not all(isinstance(each, MappingNode) for each in merged):
                raise ValueError(
                    f"{self.place} must merge mappings; got another value after << in {_line(value)}. Write *NAME of a "
                    "mapping."
                )
        elif names is not _Names.FREE and key.tag not in _TEXT:
            kind = _KINDS.get(key.tag, _short(key.tag))
            raise ValueError(
                f"{self.place} must have text as keys; got {key.value or 'null'!r} in {_line(key)}, which is {kind} in "
                "YAML. Write the name of a setting, or put it in quotes."
            )


def _described(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return repr(node.value[:40])
    return "a list" if isinstance(node, SequenceNode) else "a mapping"


def _line(node: Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _short(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag
