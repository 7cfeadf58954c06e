"""Callbacks that one config asks for and a later one takes away: a list in YAML replaces the list before it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

NOTHING = {"", "~", "null", "Null", "NULL"}  # as YAML writes it


def dropped_callbacks(configs: Sequence[str], final: Iterable[Any]) -> list[str]:
    """Names of callbacks that are in one of several configs and not in what was made of them.

    Args:
        configs: The YAML of every ``--config``, in their order.
        final: ``trainer.callbacks`` as parsed: entries with a ``class_path``.
    """
    requested: Counter[str] = Counter()
    for text in configs:
        configured: Counter[str] = Counter()
        settings = yaml.load(text, Loader=yaml.BaseLoader)  # names alone, whatever the values are
        trainer = settings.get("trainer") if isinstance(settings, dict) else None
        if not isinstance(trainer, dict):
            continue
        for key in ("callbacks", "callbacks+"):
            configured.update(_names(trainer.get(key)))
        requested |= configured
    return sorted((requested - Counter(_names(list(final)))).elements())


def _names(entries: Any) -> list[str]:
    """Class names of a list of callbacks, or of a single one."""
    entries = entries if isinstance(entries, list) else [entries]
    paths = (entry.get("class_path") if hasattr(entry, "get") else entry for entry in entries)
    return [path.rpartition(".")[2] for path in paths if isinstance(path, str) and path not in NOTHING]
