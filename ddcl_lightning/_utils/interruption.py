"""SIGTERM and Ctrl-C: at once where nothing is lost, at the next safe place where something is."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_SIGNAL = 1.0  # seconds within which signals are one: a launcher sends it to all, and the first process passes it on


class Interrupted(SIGTERMException):
    """A signal ended the run; the process exits with 128 + its number, as shells report it.

    Attributes:
        reported: Whether the user has been told.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.reported = False


class Interruption:
    """The signals that this process takes, one for all trainers of it.

    Attributes:
        received: Number of the first signal, or None.
        deferred: Whether a signal waits for somebody who looks at ``received``; a later one does not.
        forward: Called with the number of the first signal: it passes it on to processes that were started from here.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self.forward: Callable[[int], Any] | None = None
        self._before: dict[int, Any] = {}
        self._process = 0
        self._since = 0.0

    def begin(self) -> bool:
        """Take the signals; False where they are taken already, or this is not the main thread."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return False
        self.received, self.deferred, self.forward, self._process = None, False, None, os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return True

    def end(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.deferred, self.forward = {}, False, None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a data loader, which its parent ends
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            if self.forward is not None:
                self.forward(number)
            if not self.deferred:
                raise Interrupted(number)
        elif now - self._since > ONE_SIGNAL:
            raise Interrupted(number)


INTERRUPTION = Interruption()


@contextmanager
def interruptible() -> Iterator[None]:
    """Take the signals for the length of a block; no effect inside of another one."""
    outermost = INTERRUPTION.begin()
    try:
        yield
    finally:
        if outermost:
            INTERRUPTION.end()


def signal_name(number: int) -> str:
    """``SIGTERM``, or ``Ctrl-C`` for what that sends."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
