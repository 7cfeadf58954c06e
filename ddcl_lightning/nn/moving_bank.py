"""A bank that moves its own prototypes, for quantizers that need no optimizer of the codes."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import exporting
from ddcl_lightning._utils.distributed import from_first_process, warn, world_size
from ddcl_lightning.functional import BankOutput
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.gradient_watch import GradientWatch
from ddcl_lightning.nn.guarded_state import NOT_NEGATIVE, Rules, running_dtype
from ddcl_lightning.nn.initialization import first_codes
from ddcl_lightning.nn.settled_state import SettledState
from ddcl_lightning.nn.step_statistics import StepCalls, StepStatistics
from ddcl_lightning.nn.straight_through import anchor_of
from ddcl_lightning.nn.token_step import check_step, move_prototypes

CALLS_WITHOUT_STEP = 1000  # after so many a loop has no optimizer, or accumulates over more batches than anybody does


@dataclass(frozen=True)
class CodeUpdate:
    """Numbers by which a quantizer moves its own codes, see :class:`~ddcl_lightning.TokenNormalized`.

    Args:
        step_size: Share of the distance to the mean of its tokens that a code covers per step, in (0, 1].
        relocation_threshold: Share of the mean load in [0, 1) under which a code moves to a crowded cell; 0 never
            moves any.
        load_exponent: What codes share evenly, in [0, 1]: 0 the distortion, 1 the tokens, or a mixture.

    Raises:
        ValueError: If a number is out of its range.
    """

    step_size: float = 0.05
    relocation_threshold: float = 0.5
    load_exponent: float = 0.75

    @typed
    def __init__(self, step_size: float = 0.05, relocation_threshold: float = 0.5, load_exponent: float = 0.75) -> None:
        check_step("step_size of a CodeUpdate", step_size, relocation_threshold, load_exponent)
        for name, value in (
            ("step_size", step_size),
            ("relocation_threshold", relocation_threshold),
            ("load_exponent", load_exponent),
        ):
            object.__setattr__(self, name, value)


class StepLook(NamedTuple):
    """Functions of somebody who looks at the tokens of some steps.

    Attributes:
        is_due: Whether the tokens of the next step are to be looked at.
        step: Called at each step that moves the prototypes with its calls, which have cells and moments where that is
            due; returns True where it has set the prototypes itself.
    """

    is_due: Callable[[], bool]
    step: Callable[[StepCalls], bool]


class MovingBank(PrototypeBank, SettledState):
    """A :class:`~ddcl_lightning.PrototypeBank` whose prototypes move when an optimizer of anything steps.

    They are a buffer: no optimizer moves or decays them, and they stay in float32 in a model of half precision. They
    take the token-normalized step of :class:`~ddcl_lightning.TokenNormalized`, over the tokens of the calls in training
    mode that a backward pass went through since the step before: calls without gradients, in evaluation mode, or whose
    gradients were set to None do not count. So two calls between two steps read the same prototypes. In a loop without
    an optimizer of torch, :meth:`settle` stands for the step, and all calls since the last count. T follows the same
    tokens; before the first step it is that of the first call.

    ``requires_grad_(False)`` keeps prototypes and T where they are. Copies move on their own.

    Args:
        num_prototypes: K, prototypes per head, at least 1.
        dim: d, dimension of one head's prototypes.
        update: How they move.
        **kwargs: Further arguments of a :class:`~ddcl_lightning.PrototypeBank`.

    Attributes:
        loads: Buffer ``(H, K, 2)``, running distortion and number of tokens of the cells, of all processes.
        num_steps: Steps of optimizers that this object has seen, of those without its tokens too.

    Raises:
        ValueError: As a bank does.
    """

    loads: Tensor
    state_rules: ClassVar[Rules] = {**PrototypeBank.state_rules, "loads": NOT_NEGATIVE}

    def __init__(self, num_prototypes: int, dim: int, *, update: CodeUpdate, **kwargs: Any) -> None:
        super().__init__(num_prototypes, dim, trainable=False, **kwargs)
        self.update = update
        self.register_buffer("loads", torch.zeros(self.num_heads, num_prototypes, 2, dtype=running_dtype()))
        self._statistics: StepStatistics | None = None
        self.look: StepLook | None = None
        self.gradient_watch: GradientWatch | None = None  # on the gradients of what made the tokens
        self._calls = 0
        self.num_steps = 0

    @property
    def is_frozen(self) -> bool:
        """True if the prototypes stay where they are in training mode too."""
        return not self.marker.requires_grad

    def _begin(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.training and not exporting():
            self._follow()
        return super()._begin(tokens, mask)

    def _observe(self, heads: Tensor, mask: Tensor | None) -> None:
        """Give T a value for the first call; it follows at the steps."""
        self.temperature_state.observe_first(heads, mask, self.prototypes)

    def _end(
        self, tokens: Tensor, mask: Tensor | None, heads: Tensor, flat_mask: Tensor | None, output: BankOutput
    ) -> BankOutput:
        output = super()._end(tokens, mask, heads, flat_mask, output)
        if not self.training and torch.is_grad_enabled() and not self.is_frozen and world_size() > 1:
            # DDP waits for a gradient of the marker in evaluation mode too.
            output = output.replaced(anchor=anchor_of(self.marker))
        return output

    @torch.no_grad()
    def start(self, tokens: Tensor, *, final: bool) -> None:
        """Start prototypes and T on the first tokens.

        Args:
            tokens: ``(N, H * d)``, the same on every process; the first process clusters them.
            final: Whether there are enough; a start on fewer is random tokens, and leaves the bank uninitialized.
        """
        heads = self.split_heads(tokens)[0]
        codes = from_first_process(
            lambda: torch.stack([first_codes(head, self.num_prototypes, cluster=final) for head in heads]),
            "the codes of a quantizer cannot start",
        )
        self.prototypes.copy_(codes.to(self.prototypes))
        self.temperature_state.start(heads, self.prototypes)
        self.initialized.fill_(float(final))

    @torch.no_grad()
    def settle(self) -> None:
        """Move prototypes and T by the calls since the last step, as the step of an optimizer does."""
        self._move(need_backward=False)

    @torch.no_grad()
    def settle_after_step(self) -> None:
        """Move prototypes and T by the calls that a backward pass went through."""
        self._move(need_backward=True)

    def next_call(self) -> int:
        """Number of the next call with gradients in training mode, as in the calls of a step."""
        return 0 if self._statistics is None else self._statistics.next_number

    def resets(self) -> int:
        """Number of times that gradients of calls were set to None: what those calls measured counts for nothing."""
        return 0 if self._statistics is None else self._statistics.resets(self.marker)

    def begin_from_state(self) -> None:
        """Drop what was seen before the state was loaded."""
        if self._statistics is not None:
            self._statistics.drop(self.marker)

    def take_over(self, where: Tensor | bool = True) -> None:
        """No effect: prototypes move by :meth:`settle`."""

    def _move(self, *, need_backward: bool) -> None:
        self.num_steps += 1
        if self._statistics is None or not self.training:
            return
        calls = self._statistics.take_if_any(self.marker, need_backward=need_backward)
        self._statistics.drop(self.marker)
        if calls is None:
            return
        self._calls = 0
        self.temperature_state.observe_step(calls.statistics, self.prototypes)
        self.temperature_state.settle()
        if self.look is not None and self.look.step(calls):
            return
        loads = move_prototypes(
            self.prototypes,
            calls.statistics,
            self.loads,
            step_size=self.update.step_size,
            relocation_threshold=self.update.relocation_threshold,
            load_exponent=self.update.load_exponent,
        )
        if loads is not None:
            self.loads.copy_(loads)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _follow(self) -> None:
        """Have the tokens of training calls counted."""
        if self._statistics is None:
            own = weakref.ref(self)  # a copy has its own
            self._statistics = StepStatistics(
                {"": self}, lambda: _needs_cells(own()), lambda: _needs_moments(own()), self.gradient_watch
            )
        self._calls += 1
        if self._calls == CALLS_WITHOUT_STEP and not self.is_frozen:
            warn(
                f"codes have not moved in {CALLS_WITHOUT_STEP} calls in training mode: they move when an optimizer of "
                "torch steps after a backward pass through the quantizer. In a loop without one call settle() of the "
                "quantizer after each batch, with gradients enabled and before they are set to None; to keep the codes "
                "where they are call requires_grad_(False) or eval()."
            )

    def _make_room(self, num_prototypes: int) -> None:
        super()._make_room(num_prototypes)
        self.loads = self.loads.new_zeros(self.num_heads, num_prototypes, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_statistics": None}


def _needs_cells(bank: MovingBank | None) -> bool:
    if bank is None:
        return False
    return bank.update.relocation_threshold > 0 or bank.temperature_state.distortion is not None or _looks(bank)


def _needs_moments(bank: MovingBank | None) -> bool:
    return bank is not None and (bank.temperature_state.covariance is not None or _looks(bank))


def _looks(bank: MovingBank) -> bool:
    return bank.look is not None and bank.look.is_due()
