"""SIGTERM and Ctrl-C while the command is still importing torch and Lightning: a line, and the exit code of the signal.

Nothing is lost yet, and a traceback would tell of somebody else's import. Once the command runs it takes the signals
itself, see :mod:`ddcl_lightning._utils.interruption`. A program that imports this package keeps its own handlers.
"""

import os
import signal
import sys
from pathlib import PurePath
from types import FrameType
from typing import NoReturn

COMMANDS = ("ddcl", "ddcl.exe", "ddcl-script.py", "ddcl-script.pyw")  # as pip installs the entry point
MODULES = ("ddcl_lightning", "ddcl_lightning.__main__")  # the second is how Lightning starts further processes
DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
NAMES = {signal.SIGTERM: b"SIGTERM", signal.SIGINT: b"Ctrl-C"}


def is_command() -> bool:
    """True if this process was started as ``ddcl`` or ``python -m ddcl_lightning``.

    It asks what the interpreter was given: processes that multiprocessing spawns carry their parent's ``sys.argv``.
    """
    if not 0 < len(sys.argv) < len(sys.orig_argv):
        return False
    program = sys.orig_argv[-len(sys.argv)]
    if sys.argv[0] == "-m":
        return program.removeprefix("-m") in MODULES
    return program == sys.argv[0] and PurePath(program).name in COMMANDS


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Leave at once; of several processes of a run the first one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"Ended by " + NAMES[signal.Signals(number)] + b".\n")
    os._exit(128 + number)


if is_command():
    for taken, default in DEFAULTS.items():
        if signal.getsignal(taken) == default:  # a shell's background job ignores Ctrl-C, and goes on doing so
            signal.signal(taken, end)
