"""States that a callback's ``state_dict`` did not give: one sentence that names the callback and what to do."""

import inspect
import re
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from ddcl_lightning import CodebookMonitor, callbacks
from tests.tiny import clustering_module, loader, quiet_trainer


def stateful() -> list[type[Callback]]:
    """Every callback that restores something and needs no argument."""
    kinds = [kind for kind in vars(callbacks).values() if inspect.isclass(kind) and issubclass(kind, Callback)]
    return [
        kind
        for kind in kinds
        if kind.load_state_dict is not Callback.load_state_dict and kind not in (callbacks.BankCallback,)
    ]


def refusal(kind: type) -> str:
    """Its sentence, or that of the monitor inside."""
    names = f"({kind.__name__}|{CodebookMonitor.__name__})"
    return rf"^state must be what {names}\.state_dict\(\) gave; got .+\. Pass the state of a {names}, or leave it out "


def test_there_are_some() -> None:
    assert len(stateful()) >= 8


@pytest.mark.filterwarnings("ignore:CollapseWarning. the checkpoint is from before version 0.2")
@pytest.mark.parametrize("kind", stateful(), ids=lambda kind: kind.__name__)
def test_a_state_with_a_missing_or_wrong_entry_is_one_sentence(kind: type[Callback]) -> None:
    state = kind().state_dict()
    for wrong in ({}, None, [], "text", 3):
        with pytest.raises(ValueError, match=refusal(kind)):
            kind().load_state_dict(wrong)  # type: ignore[arg-type]
    later = {"monitor", "smallest_variance"}  # older versions do not have them
    for key in state.keys() - later:
        with pytest.raises(ValueError, match=refusal(kind)):
            kind().load_state_dict({name: value for name, value in state.items() if name != key})
        with pytest.raises(ValueError, match=refusal(kind)):
            kind().load_state_dict({**state, key: object()})
    kind().load_state_dict(state)


def without(state: Any, path: tuple[Any, ...]) -> Any:
    """The state without the entry at a path."""
    key, *rest = path
    if not rest:
        return {name: value for name, value in state.items() if name != key}
    return {**state, key: without(state[key], tuple(rest))}


def paths(state: Any) -> list[tuple[Any, ...]]:
    """Paths of all entries of nested mappings."""
    if not isinstance(state, dict):
        return []
    return [path for key, value in state.items() for path in [(key,), *((key, *rest) for rest in paths(value))]]


@pytest.mark.filterwarnings("ignore:CollapseWarning. the checkpoint is from before version 0.2")
def test_a_collapse_warning_misses_an_inner_entry_in_one_sentence() -> None:
    """Or does without it: nothing else is raised."""
    callback = callbacks.CollapseWarning(every_n_batches=1)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(clustering_module(), loader())
    state = callback.state_dict()
    refused = []
    for path in paths(state):
        try:
            callbacks.CollapseWarning().load_state_dict(without(state, path))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(re.match(refusal(callbacks.CollapseWarning), message) for message in refused), refused
