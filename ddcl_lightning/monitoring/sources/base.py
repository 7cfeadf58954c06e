"""The protocol of codebooks whose calls can be recorded."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import GENERIC, Advice
from ddcl_lightning.monitoring.sources.observed_calls import Call


class CodebookSource(ABC):
    """A kind of codebook in somebody's module, and how one call of it becomes a record.

    Subclass it and write :meth:`recognizes` and :meth:`read`; hand the class to
    :func:`~ddcl_lightning.find_codebooks` or :class:`~ddcl_lightning.CodebookMonitor` as ``kinds=[...]``. Recognition
    looks at names of classes and attributes and imports nothing. Levels of a residual quantizer are modules of their
    own, and so are sources of their own; groups and heads that are quantized in one call are heads of one record.

    Args:
        module: The module whose calls are read.

    Attributes:
        method: Name of the method that is called, ``"forward"`` unless a kind says otherwise.
        advice: What can be done about codes of this kind.
    """

    method: str = "forward"
    advice: Advice = GENERIC

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """True if a module is a codebook of this kind; False for kinds that a user names."""
        return False

    @classmethod
    def sources_in(cls, module: nn.Module) -> Mapping[str, "CodebookSource"]:
        """The codebooks of this kind that a module is, or that it holds as its own, by their path below it."""
        return {"": cls(module)} if cls.recognizes(module) else {}

    def observed(self) -> Iterable[tuple[nn.Module, str]]:
        """Modules and names of their methods whose calls are shown to :meth:`before` and :meth:`after`."""
        return [(self.module, self.method)]

    def before(self, call: Call) -> None:
        """Keep in ``call.state`` what the call itself will change: nothing, by default."""
        call.state = None

    def after(self, call: Call) -> CodebookRecord | None:
        """The record of a call, or None if there is nothing to record."""
        return self.read(call)

    @abstractmethod
    def read(self, call: Call) -> CodebookRecord | None:
        """The record of a call with its output, without gradients; None if there is nothing to record."""


def integers_in(output: Any) -> Tensor | None:
    """The first tensor of integers in an output, however nested: its codes."""
    if isinstance(output, Tensor):
        integer = not (output.is_floating_point() or output.is_complex() or output.dtype == torch.bool)
        return output if integer else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((codes for value in values if (codes := integers_in(value)) is not None), None)


def tokens_of(values: Any, dim: int, number: int) -> Tensor | None:
    """Tokens ``(N, d)`` of a tensor with its channels where they are, or None if it is not made of N tokens.

    Feature maps ``(*, d, H, W)`` have them third from the end, sequences last, or else they come second.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.numel() != number * dim:
        return None
    for axis in (-3, -1, 1) if values.dim() >= 4 else (-1, 1):
        if values.dim() >= 2 and values.shape[axis] == dim:
            return values.detach().movedim(axis, -1).reshape(-1, dim)
    return None
