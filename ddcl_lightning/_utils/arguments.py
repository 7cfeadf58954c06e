"""Arguments of constructors, held against their annotations: a wrong type is one sentence, at once."""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from ddcl_lightning._utils.old_names import renamed_argument

F = TypeVar("F", bound=Callable[..., Any])
_WORDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", types.NoneType: "None"}
_LISTS = (list, tuple, Sequence)
LARGEST = 2**63 - 1  # torch counts with 64 bits
_NO_MEMORY = re.compile(r"allocate memory|out of memory|overflow", re.IGNORECASE)


def typed(function: F) -> F:
    """Decorate a constructor: its arguments must be what their annotations say.

    An integer is no float with a fraction, no text and no bool, and fits into 64 bits; a number is finite; text is no
    list. Scalars of NumPy become Python's, so that what is kept of them is plain data.

    Raises:
        ValueError: From the constructor, naming the argument, what it must be and what it got; or the sizes for which
            there is not enough memory.
        TypeError: From the constructor, naming a keyword that it does not have, and those that it has.
    """
    signature = inspect.signature(function)
    named = {name for name, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            bases = type(args[0]).__mro__ if args else ()
            owner = next((base for base in bases if vars(base).get(function.__name__) is checked), None)
            sentence = renamed_argument(owner, kwargs) if owner else None
            unknown = [] if takes_any else [name for name in kwargs if name not in named]
            if sentence is None and unknown:  # which bind mentions after what is missing in their place
                known = ", ".join(name for name in signature.parameters if name in named - {"self"})
                title = owner.__name__ if owner else function.__name__
                sentence = f"{title} got an unexpected keyword argument {unknown[0]!r}. It takes {known}."
            if sentence is None:
                raise
            raise TypeError(sentence) from None
        hints = _hints(function)
        for name in named & set(bound.arguments) & set(hints):
            bound.arguments[name] = conform(name, bound.arguments[name], hints[name])
        try:
            return function(*bound.args, **bound.kwargs)
        except (MemoryError, RuntimeError) as error:
            sizes = {name: value for name, value in bound.arguments.items() if type(value) is int and value > 1}
            if not (sizes and is_memory_short(error)):
                raise
            given = ", ".join(f"{name} = {value}" for name, value in sizes.items())
            raise ValueError(f"sizes must fit into memory; got {given}. Lower the largest.") from error

    checked.__signature__ = signature  # type: ignore[attr-defined] # for getfullargspec, which follows no __wrapped__
    return checked  # type: ignore[return-value]


def conform(name: str, value: Any, hint: Any) -> Any:
    """Value in plain Python, checked against the annotation.

    Args:
        name: Of the argument, for the error.
        value: Anything.
        hint: A type.

    Raises:
        ValueError: If it is not.
    """
    kinds = _alternatives(hint)
    for kind in kinds:
        try:
            return _fit(value, kind)
        except _Misfit:
            continue
    words = " or ".join(dict.fromkeys(_in_words(kind) for kind in kinds))
    raise ValueError(f"{name} must be {words}; got {value!r:.200}.{_remedy(value, kinds)}")


def as_plain(value: Any) -> Any:
    """A dataclass as a mapping of its fields, anything else as it is; :func:`typed` makes the dataclass again."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def require_at_least(minimum: float, **values: float | None) -> None:
    """Raise a ValueError that names the first argument below a minimum; None passes."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {value}. Pass {minimum} or more.")


def width_per_head(num_heads: int, remedy: str, **width: int) -> int:
    """The named width divided among heads.

    Args:
        num_heads: H.
        remedy: The argument that sets the width of one head instead.
        **width: The whole width, by the name of its argument.

    Raises:
        ValueError: If it cannot be divided.
    """
    ((name, value),) = width.items()
    if num_heads < 1 or value % num_heads:
        raise ValueError(
            f"{name} must be divisible by num_heads; got {value} and {num_heads}. Set {remedy} to choose the dimension "
            "of a head yourself."
        )
    return value // num_heads


def described(value: Any) -> str:
    """A value that should have been another, in words: ``"a tensor (2, 3) of torch.float32"``, ``"a dict"``."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if value is None:
        return "None"
    if type(value) in (tuple, list):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def is_memory_short(error: BaseException) -> bool:
    """True if an error says that something is too large for this machine."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def nearest(word: str, known: Iterable[str]) -> str:
    """``". Did you mean ...?"``, or the valid words where none is near."""
    words = sorted(set(known))
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if close:
        return f". Did you mean {close[0]!r}?"
    return f". Valid are: {', '.join(words)}." if 0 < len(words) <= 30 else "."


class _Misfit(Exception):
    pass


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError:  # a name that only type checkers import
        return {}


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        # bool before int before float: the narrowest that fits is kept.
        kinds = [kind for argument in get_args(hint) for kind in _alternatives(argument)]
        return sorted(kinds, key=lambda kind: kind is float)
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    return [hint]


def _fit(value: Any, kind: Any) -> Any:
    """The value in plain Python; a _Misfit where it is not of the kind."""
    origin = get_origin(kind) or kind
    if origin is Any:  # a class since Python 3.11
        return value
    if origin is Literal:
        # Which words there are the constructors say, with their meaning.
        return _require(value, isinstance(value, str) or any(_equal(value, choice) for choice in get_args(kind)))
    if origin is types.NoneType:
        return _require(value, value is None)
    if origin is bool:
        return bool(_require(value, isinstance(value, (bool, np.bool_))))
    if origin is int:
        whole = _is_real(value) and isinstance(value, Integral)
        return int(_require(value, whole and abs(int(value)) <= LARGEST))
    if origin is float:
        if isinstance(value, Tensor):  # one per head, say
            looks = value.device.type == "cpu" and value.is_floating_point()
            return _require(value, not looks or bool(value.isfinite().all()))
        _require(value, _is_real(value) and math.isfinite(value))
        return value.item() if isinstance(value, np.generic) else value
    if origin in _LISTS:
        return _fit_list(value, get_args(kind))
    if origin is type:
        bases = get_args(kind) or (object,)
        return _require(value, isinstance(value, type) and issubclass(value, bases))
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):  # as a checkpoint or a file of settings has it
        fields = {field.name for field in dataclasses.fields(origin) if field.init}
        return cast(Any, origin)(**_require(value, set(value) <= fields))
    if not isinstance(origin, type) or origin is object or getattr(origin, "_is_protocol", False):
        return value  # not for us to judge
    if origin.__module__ == "collections.abc" and origin is not Mapping:
        return _require(value, origin.__name__ != "Callable" or callable(value))
    if origin is os.PathLike or issubclass(origin, os.PathLike):
        return _require(value, isinstance(value, os.PathLike))
    return _require(value, isinstance(value, origin))


def _fit_list(value: Any, arguments: tuple[Any, ...]) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    _require(value, isinstance(value, (list, tuple)))
    fixed = [argument for argument in arguments if argument is not ...]
    if len(fixed) > 1:
        _require(value, len(value) == len(fixed))
    hints = fixed if len(fixed) > 1 else (fixed or [Any]) * len(value)
    items = []
    for argument, hint in zip(value, hints, strict=True):
        for kind in _alternatives(hint):
            try:
                items.append(_fit(argument, kind))
                break
            except _Misfit:
                continue
        else:
            raise _Misfit
    return type(value)(items) if type(value) in (list, tuple) else value


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise _Misfit
    return value


def _is_real(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _equal(value: Any, choice: Any) -> bool:
    return type(value) is type(choice) and bool(value == choice)


def _in_words(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is type and arguments:
        return f"a subclass of {arguments[0].__name__}"
    if origin in _LISTS:
        fixed = [argument for argument in arguments if argument is not ...]
        inner = " or ".join(_in_words(argument).removeprefix("an ").removeprefix("a ") for argument in fixed[:1])
        size = f"{len(fixed)} " if len(fixed) > 1 else ""
        plural = f"subclasses{inner.removeprefix('subclass')}" if inner.startswith("subclass of ") else f"{inner}s"
        return f"a list of {size}{plural}".replace("anys", "values") if inner else "a list"
    if isinstance(origin, type):
        name = origin.__name__
        return f"a{'n' * (name[0] in 'AEIOU')} {name}"
    return str(kind)


def _remedy(value: Any, kinds: list[Any]) -> str:
    numbers = int in kinds or float in kinds
    if isinstance(value, str) and numbers:
        return " Leave out the quotes." if _is_number(value) else " Pass a number."
    if isinstance(value, bool) and numbers:
        return " Pass the number that you mean."
    if _is_real(value) and isinstance(value, Integral) and int in kinds:
        return f" Pass {LARGEST} at most."
    if _is_real(value) and int in kinds:
        return " Round it." if math.isfinite(value) else " Pass a number that can be counted to."
    if isinstance(value, str) and any((get_origin(kind) or kind) in _LISTS for kind in kinds):
        return " Put it in a list."
    if value is None:
        return " Leave it out for the default."
    if str in kinds:
        return " Put quotes around it."
    created = [kind.__name__ for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    if created:
        return f" Pass {created[0]}(...)."
    if numbers and not _is_real(value):
        return " Pass a number."
    if bool in kinds:
        return " Write True or False."
    if numbers and not math.isfinite(value):
        return " Pass a finite one."
    return " Correct its values." if isinstance(value, (list, tuple)) else " Pass one."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
