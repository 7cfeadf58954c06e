"""What a checkpoint holds for a callback, held against what the callback gives: any other state is one sentence."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ddcl_lightning._utils.arguments import described

Load = TypeVar("Load", bound=Callable[..., None])


class StateError(ValueError):
    """Error that a saved state is not what an object of the class gives."""


@contextmanager
def reading(sentence: Callable[[str], str]) -> Iterator[None]:
    """Context manager in which whatever goes wrong with a saved state is a :class:`StateError`.

    Args:
        sentence: Makes the sentence of the words for what was got.
    """
    try:
        yield
    except StateError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateError(sentence(f"one that cannot be read ({type(error).__name__}: {error})")) from None


def restores(**kinds: type | tuple[type, ...]) -> Callable[[Load], Load]:
    """Decorate ``load_state_dict`` of a callback: what it cannot take is one sentence, and never an error of its code.

    Args:
        **kinds: Types of the entries that the state must have, by name.

    Raises:
        StateError: From the method, naming the callback, what is wrong, and what to do.
    """

    def decorate(load: Load) -> Load:
        @functools.wraps(load)
        def checked(callback: Any, state_dict: Any) -> None:
            name = type(callback).__name__
            if not isinstance(state_dict, Mapping):
                raise StateError(_sentence(name, described(state_dict)))
            missing = [key for key in kinds if key not in state_dict]
            if missing:
                raise StateError(_sentence(name, f"one without {', '.join(map(repr, missing))}"))
            for key, kind in kinds.items():
                if not _fits(state_dict[key], kind):
                    raise StateError(_sentence(name, f"{described(state_dict[key])} under {key!r}"))
            with reading(functools.partial(_sentence, name)):
                load(callback, state_dict)

        return checked  # type: ignore[return-value]

    return decorate


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, str) and Sequence in kinds:
        return str in kinds
    return isinstance(value, kinds)


def _sentence(name: str, got: str) -> str:
    return (
        f"state must be what {name}.state_dict() gave; got {got}. Pass the state of a {name}, or leave it out to start "
        "anew (remove it from the 'callbacks' of a checkpoint)."
    )
