"""Signals that ended another process of a run, so that the others end alike and say so."""

from contextlib import suppress
from typing import Any

import torch.distributed as dist

KEY = "ddcl_ended_by"


def tell_others(number: int) -> None:
    """Leave word for the other processes that a signal of this number ends this one.

    The first process holds what is said: that it ends itself, a launcher has to pass on.
    """
    store = _store()
    if store is not None:
        with suppress(RuntimeError):
            store.set(KEY, str(number))


def told_by_others() -> int | None:
    """Number of the signal that has ended another process; None if none has, or it could not say so."""
    store = _store()
    with suppress(RuntimeError):
        if store is not None and store.check([KEY]):
            return int(store.get(KEY))
    return None


def _store() -> Any:
    """Store that the processes have met in, or None outside of a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed import distributed_c10d  # not there in a build without it

    return distributed_c10d._get_default_store()
