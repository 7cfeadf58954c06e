"""The temperature of a bank: its value, what the value is relative to, and how it follows the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional import TokenStatistics, critical_factor
from ddcl_lightning.nn.guarded_state import NOT_NEGATIVE, POSITIVE, Rules, keep_unless, running_dtype
from ddcl_lightning.nn.running_covariance import RunningCovariance
from ddcl_lightning.nn.running_distortion import RunningDistortion
from ddcl_lightning.nn.settled_state import SettledState

TemperatureUnit = Literal["critical", "initial", "distortion", "absolute"]
DEFAULT_TEMPERATURE = 0.1
DISTORTION_TEMPERATURE = 0.03  # in units of the distortion


def _plain(value: Any) -> float | list[float]:
    """The numbers of a tensor or a tuple, for what is kept and saved."""
    plain: float | list[float] = value
    if isinstance(value, Tensor):
        plain = value.tolist()
    elif isinstance(value, Sequence):
        plain = list(value)
    return plain


@dataclass(frozen=True)
class Temperature:
    """Temperature T: a value and the unit that it is relative to.

    Wherever a class takes ``temperature``, a plain number is ``Temperature(number)``: a fraction of the critical
    temperature of the tokens, above which all prototypes are drawn to one point. It means the same at every scale.

    Args:
        value: Finite and > 0, one for all heads or a list with one per head.
        unit: ``"critical"``: a fraction of the critical temperature of the tokens, which is followed from step to step
            while training. ``"initial"``: a fraction of the critical temperature that the tokens have when the bank is
            initialized (else at its first training batch); T stays when the encoder changes their scale.
            ``"distortion"``: a multiple of twice the mean squared distance of the tokens from their nearest codes per
            dimension, which is followed from step to step while training: T falls as the codes fit better, without a
            schedule. It suits codes that start near tokens; below 1, or T would raise itself.
            ``"absolute"``: T itself, in units of squared distance, as in the paper.

    Raises:
        ValueError: If the value is not finite and > 0, or the unit is unknown.
    """

    value: float | list[float]
    unit: TemperatureUnit = "critical"

    @typed
    def __init__(self, value: float | list[float], unit: TemperatureUnit = "critical") -> None:
        value = _plain(value)
        values = value if isinstance(value, list) else [value]
        if not values or not all(number > 0 for number in values):
            raise ValueError(
                f"a temperature must be > 0, one number or one per head; got {value}. As a fraction of the critical "
                f"temperature {DEFAULT_TEMPERATURE} is a good start."
            )
        if unit not in get_args(TemperatureUnit):
            raise ValueError(
                f"unit of a temperature must be one of {get_args(TemperatureUnit)}; got {unit!r}. Choose one of them."
            )
        if unit == "distortion" and max(values) >= 1:
            raise ValueError(
                f"a temperature in units of the distortion must be < 1, or it would raise itself; got {value}. "
                f"{DISTORTION_TEMPERATURE} is a good value."
            )
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "unit", unit)

    @classmethod
    def of(cls, temperature: "float | list[float] | Temperature") -> "Temperature":
        """The temperature that an argument means: a number is a fraction of the critical one."""
        return temperature if isinstance(temperature, Temperature) else cls(temperature)

    def per_head(self, num_heads: int) -> list[float]:
        """One value for each head.

        Raises:
            ValueError: If there is a list of another length.
        """
        values = list(self.value) if isinstance(self.value, Sequence) else [self.value]
        if len(values) not in (1, num_heads):
            raise ValueError(
                f"a temperature must be one number, or one per head, {num_heads}; got {len(values)}: {self.value}. "
                "Give one for each head."
            )
        return values * num_heads if len(values) == 1 else values


class BankTemperature(SettledState):
    """T of every head, in units of squared distance, kept in step with the tokens that it is relative to.

    In training it measures the tokens of every call, or, of a bank that moves its own prototypes, those that belong to
    a step. T moves when an optimizer steps: all calls between two steps see the same T.

    Args:
        temperature: Initial value, see :class:`Temperature`.
        num_heads: H.
        dim: d.
        detach_assignments: Of the bank; it halves the critical temperature.
        measure: Measure the covariance for units that need none too, for owners that read :attr:`variance`.

    Attributes:
        value: Buffer ``(H,)``, in the unit of the temperature.
        current: Buffer ``(H,)``, T in units of squared distance; 1 before the first tokens of a relative temperature.
        variance: Buffer ``(H,)``, total variance of the tokens as of T, not saved; 0 before the first tokens.
        unit: See :class:`Temperature`.

    Raises:
        ValueError: If the list of values has not one per head.
    """

    value: Tensor
    current: Tensor
    variance: Tensor
    state_rules: ClassVar[Rules] = {"value": POSITIVE, "current": POSITIVE, "variance": NOT_NEGATIVE}

    def __init__(
        self,
        temperature: Temperature,
        num_heads: int,
        dim: int,
        *,
        detach_assignments: bool = False,
        measure: bool = False,
    ) -> None:
        super().__init__()
        self.unit, self.num_heads = temperature.unit, num_heads
        self.factor = critical_factor(detach_assignments)
        dtype = running_dtype()
        self.register_buffer("value", torch.ones(num_heads, dtype=dtype))
        self.register_buffer("current", torch.ones(num_heads, dtype=dtype))
        self.register_buffer("variance", torch.zeros(num_heads, dtype=dtype), persistent=False)
        measure = measure or self.unit in ("critical", "initial")
        self.covariance = RunningCovariance(num_heads, dim) if measure else None
        self.distortion = RunningDistortion(num_heads) if self.unit == "distortion" else None
        self._per_dim = 2 / dim
        self._fixed = False  # what T is relative to has been measured once
        self.set(temperature)

    @torch.no_grad()
    def set(self, temperature: Temperature) -> None:
        """Set the value, in the unit that the bank was built with.

        Raises:
            ValueError: If the unit is another one, or there is not one value per head.
        """
        if temperature.unit != self.unit:
            raise ValueError(
                f"the temperature of this bank has the unit {self.unit!r}; got {temperature}. Pass "
                f"Temperature(..., unit={self.unit!r}), or build the bank with another unit."
            )
        self.set_values(torch.tensor(temperature.per_head(self.num_heads)))

    @torch.no_grad()
    def set_values(self, values: Tensor) -> None:
        """Set values ``(H,)`` in the unit of the temperature, as a schedule does at every step."""
        self.value.copy_(values)
        self.take_over()

    @torch.no_grad()
    def observe(self, tokens: Tensor, mask: Tensor | None, prototypes: Tensor) -> None:
        """Measure ``(H, N, d)`` tokens of a training call with mask ``(H, N)`` before they are assigned."""
        if not self._follows:
            return
        first = self._unmeasured()
        if self.covariance is not None:
            self.covariance(tokens.detach(), mask)
        if self.distortion is not None:
            self.distortion(tokens.detach(), mask, prototypes.detach())
        self._note(first)

    @torch.no_grad()
    def observe_first(self, tokens: Tensor, mask: Tensor | None, prototypes: Tensor) -> None:
        """Measure tokens as :meth:`observe` does until T is set; the first step's tokens take the place of these."""
        if self._fixed or not self._follows:
            return
        self.observe(tokens, mask, prototypes)
        self._fixed = not bool(self._unmeasured().any())
        for running in (self.covariance, self.distortion):
            if running is not None:
                running.num_batches.zero_()

    @torch.no_grad()
    def observe_step(self, statistics: TokenStatistics, prototypes: Tensor) -> None:
        """Measure the tokens of a step; cells and moments of them where the unit needs them."""
        if not self._follows:
            return
        first = self._unmeasured()
        if self.covariance is not None and statistics.moments is not None:
            self.covariance.add(statistics.moments)
        if self.distortion is not None and statistics.cells is not None:
            cells = statistics.cells
            self.distortion.add(cells.distortion.sum(-1), cells.counts[0].sum(), prototypes)
        self._note(first)

    @property
    def _follows(self) -> bool:
        """True if there is something to measure."""
        measures = self.covariance is not None or self.distortion is not None
        return measures and not (self.unit == "initial" and self._fixed)

    def _note(self, first: Tensor) -> None:
        if self.unit == "initial":
            self._fixed = not bool(self._unmeasured().any())
        self.measured(first)

    def _unmeasured(self) -> Tensor:
        """The heads of which nothing was measured yet, ``(H,)`` boolean."""
        running = [self.covariance.lambda_max] if self.covariance is not None else []
        running += [self.distortion.mean] if self.distortion is not None else []
        return torch.stack([value == 0 for value in running]).any(0)

    @torch.no_grad()
    def start(self, tokens: Tensor, prototypes: Tensor) -> None:
        """Measure a sample ``(H, N, d)``, the same on every process, in place of what was measured before."""
        if self.covariance is not None:
            self.covariance.start(tokens)
        if self.distortion is not None:
            self.distortion.start(tokens.to(prototypes.device), prototypes)
        if self.covariance is not None or self.distortion is not None:
            self._fixed = not bool(self._unmeasured().any())
            self.take_over()

    @property
    def is_measured(self) -> bool:
        """True if T was set from tokens; an absolute one needs none."""
        return self.unit == "absolute" or bool((self.reference() > 0).all())

    def reference(self) -> Tensor:
        """Unit of the value, ``(H,)``: the measured critical temperature, that of the distortion, or 1."""
        if self.distortion is not None:
            return self._per_dim * self.distortion.mean
        if self.covariance is None or self.unit == "absolute":
            return torch.ones_like(self.value)
        return self.factor * self.covariance.lambda_max

    def take_over(self, where: Tensor | bool = True) -> None:
        """Set T; tokens without variance have no critical temperature and leave it as it is."""
        latest = (self.value * self.reference()).to(self.current.dtype)
        keep_unless((latest > 0) & torch.isfinite(latest) & where, self.current, latest)
        if self.covariance is not None:
            keep_unless(where, self.variance, self.covariance.total_variance())

    def begin_from_state(self) -> None:
        """Set the variance from the loaded covariance; T was loaded itself."""
        if self.covariance is not None and not self.variance.is_meta:
            self.variance.copy_(self.covariance.total_variance())
        elif self.covariance is not None:
            self.variance = self.covariance.total_variance()
        elif self.variance.is_meta:
            self.variance = torch.zeros_like(self.value)
        if self.covariance is not None or self.distortion is not None:
            self._fixed = not bool(self._unmeasured().any())

    def extra_repr(self) -> str:
        """Value and unit, for ``print``."""
        return f"{[round(float(value), 6) for value in self.value]}, unit={self.unit!r}"
