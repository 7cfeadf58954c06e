"""Plug-ins of a user's that are not finished."""

from ddcl_lightning import Head, Signal, Task


class Headless(Head):
    """A head without ``forward``."""


class Taskless(Task):
    """A task without ``losses``."""


class Unread(Signal):
    """A signal without ``read``."""

    name = "unread"


class Other:
    """A class that plugs in nowhere."""
