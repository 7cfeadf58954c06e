"""What is not here yet: optional packages and files from the network, each failing in one sentence."""

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

TIMEOUT_SECONDS = 15  # without an answer; the system's own limit is minutes, for every mirror and retry


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        ImportError: If it is missing, naming the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'ddcl-lightning[{extra}]'."
        ) from None


@contextmanager
def downloading(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever a download fails with into one ConnectionError, after seconds.

    Args:
        name: Data set, for the message.
        remedy: What to do without a network.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors; torchvision raises RuntimeError
        raise ConnectionError(unavailable(name, f"the download failed ({reason(error)})", remedy)) from None
    finally:
        socket.setdefaulttimeout(before)


def unavailable(name: str, why: str, remedy: str) -> str:
    """Message that a data set cannot be downloaded, and what to do."""
    return f"{name} is not on this machine, and {why}. {remedy}"


def reason(error: Exception) -> str:
    """Last line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def cache_folder() -> Path:
    """Default folder of downloads: ``~/.cache/ddcl_lightning``, or below ``$XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddcl_lightning"
