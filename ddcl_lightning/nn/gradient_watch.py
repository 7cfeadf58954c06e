"""Whether gradients of a backward pass were dropped before a step, told by a parameter that they reach."""

import weakref
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST_NODES = 10_000  # of a graph that are looked at for a parameter


class GradientWatch:
    """A parameter behind the tokens of calls, whose gradient tells whether somebody has set theirs to None.

    So batches are known that were skipped by the ``zero_grad`` of an optimizer that holds the encoder alone. Tokens
    without a parameter behind them tell nothing.
    """

    def __init__(self) -> None:
        self._graded: weakref.ref[Tensor] | None = None  # has a gradient of calls that no step has taken yet
        self._resets = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(self, tokens: Tensor, output: Tensor) -> None:
        """Note the backward passes that come through ``output`` to what made the tokens."""
        parameter = parameter_behind(tokens)
        if parameter is not None:
            output.register_hook(partial(self._pass, parameter))  # type: ignore[no-untyped-call]

    def resets(self) -> int:
        """Number of times that such gradients were set to None."""
        parameter = None if self._graded is None else self._graded()
        if parameter is not None and parameter.grad is None:
            self._resets, self._graded = self._resets + 1, None
        return self._resets

    def forget(self) -> None:
        """Forget the backward passes so far: a step has taken them."""
        self._graded = None

    def _pass(self, parameter: "weakref.ref[Tensor]", gradient: Tensor) -> None:
        # Parameters get their gradients later in the pass.
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._note, parameter))

    def _note(self, parameter: "weakref.ref[Tensor]") -> None:
        held = parameter()
        if held is not None and held.grad is not None:
            self._graded = parameter

    def __getstate__(self) -> dict[str, Any]:
        return {"_graded": None, "_resets": self._resets}


def parameter_behind(tokens: Tensor) -> "weakref.ref[Tensor] | None":
    """The nearest parameter that a gradient of tokens reaches, or None."""
    nodes, known = deque([tokens.grad_fn]), {tokens.grad_fn}
    while nodes and len(known) < MOST_NODES:
        node = nodes.popleft()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            return weakref.ref(leaf)
        for following, _ in node.next_functions:
            if following not in known:
                known.add(following)
                nodes.append(following)
    return None
