"""Plug-ins of a user's that are not finished."""

from torch import nn

from ddcl_lightning import Head, Signal, Task, TensorDataModule


class Headless(Head):
    """A head without ``forward``."""


class Taskless(Task):
    """A task without ``losses``."""


class Unread(Signal):
    """A signal without ``read``."""

    name = "unread"


class Other:
    """A class that plugs in nowhere."""


class Uninitialized(Head):
    """A head that forgets ``super().__init__()``."""

    def __init__(self) -> None:
        self.linear = nn.Linear(2, 2)

    def forward(self, *_: object) -> None:  # type: ignore[override]
        """Nothing."""


class Rowless(TensorDataModule):
    """A data module without ``tensors``."""

    feature_names = class_names = ()


class UninitializedRows(Rowless):
    """A data module that forgets ``super().__init__()``."""

    def __init__(self) -> None:
        self.rows = 3

    def tensors(self) -> None:  # type: ignore[override]
        """Nothing."""
