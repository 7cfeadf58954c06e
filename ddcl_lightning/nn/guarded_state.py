"""Modules whose state is validated when it is loaded, and whose running statistics stay finite and in float32."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

DAMAGED = ". The state is damaged"


class Rule(NamedTuple):
    """Condition on the values of an entry of a state.

    Attributes:
        says: In words, after "must be".
        kind: ``"float"``, ``"integer"`` or ``"flag"`` (boolean, integer or float).
        holds: Whether each value is, a boolean tensor of the same shape.
    """

    says: str
    kind: str
    holds: Callable[[Tensor], Tensor]


def _is_covariance(value: Tensor) -> Tensor:
    """Variances ``(d,)``, or ``(*, d, d)``, symmetric and within what the diagonal allows."""
    if value.dim() == 1:
        return torch.isfinite(value) & (value >= 0)
    variance = value.diagonal(dim1=-2, dim2=-1)
    deviation = variance.clamp(min=0.0).sqrt()
    limit = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    # Rounded in half precision, or averaged; where a variance is zero, what others leave of it by rounding.
    rounding = 1e-5 * variance.amax(-1)[..., None, None].clamp(min=0.0)
    slack = 1e-2 * limit + rounding + torch.finfo(torch.float32).tiny
    return torch.isfinite(value) & (value.abs() <= limit + slack) & ((value - value.mT).abs() <= slack)


Rules = Mapping[str, Rule]

FINITE = Rule("finite", "float", torch.isfinite)
POSITIVE = Rule("finite and > 0", "float", lambda value: torch.isfinite(value) & (value > 0))
NOT_NEGATIVE = Rule("finite and >= 0", "float", lambda value: torch.isfinite(value) & (value >= 0))
SHARE = Rule("in [0, 1]", "float", lambda value: (value >= 0) & (value <= 1 + 1e-5))
COUNT = Rule("an integer >= 0", "integer", lambda value: value >= 0)
FLAG = Rule("0 for no, or > 0 for yes", "flag", lambda value: torch.isfinite(value) & (value >= 0))
COVARIANCE = Rule("the covariance of something, finite and symmetric", "float", _is_covariance)
DIRECTION = Rule(
    "finite and not zero", "float", lambda value: torch.isfinite(value) & value.any(-1, keepdim=True).expand_as(value)
)


class GuardedState(nn.Module):
    """A module whose state is validated before it is loaded, and whose buffers stay in float32 or wider.

    A state that breaks a rule is refused with the name of the entry, and this module keeps its own. Flags are kept
    as numbers, which averages of weights can average; those of older states were boolean.

    Attributes:
        state_rules: Rule of each parameter and buffer, by its name.
    """

    state_rules: ClassVar[Rules] = {}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        complaints = []
        for name, rule in self.state_rules.items():
            value = state_dict.get(prefix + name)
            own = getattr(self, name)
            if own is None or not isinstance(value, Tensor) or value.is_meta:
                continue  # what is missing, one too many or no tensor at all, torch refuses
            complaint = _complain(prefix + name, rule, value, own)
            complaints += complaint
            if rule.kind == "flag" and not complaint:
                state_dict[prefix + name] = value.to(torch.float32)
        error_msgs += complaints
        if not complaints:
            self.fit_to_state(prefix, state_dict)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def fit_to_state(self, prefix: str, state_dict: dict[str, Any]) -> None:
        """Make room for a state that is about to be loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GuardedState":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self


def running_dtype() -> torch.dtype:
    """Dtype of running statistics: the default one, but float32 where that is a half precision."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def keep_unless(usable: Tensor | bool, kept: Tensor, new: Tensor) -> None:
    """Replace a buffer in place where ``usable``, without a wait for the device."""
    if isinstance(usable, Tensor):
        new = torch.where(usable, new, kept)
    elif not usable:
        return
    kept.copy_(new)


def _complain(key: str, rule: Rule, value: Tensor, own: Tensor) -> list[str]:
    kinds = {"float": value.is_floating_point(), "integer": _is_integer(value), "flag": not value.is_complex()}
    if not kinds[rule.kind]:
        return [f"{key} must be {rule.says}; got values of {value.dtype}{DAMAGED}: load another."]
    if value.dim() != own.dim() or (rule is COVARIANCE and value.shape != own.shape):
        return []  # torch says so
    broken = ~rule.holds(value)
    if not bool(broken.any()):
        return []
    return [
        f"{key} must be {rule.says}; got {value[broken].flatten()[0].item()} among its {value.numel()} values"
        f"{DAMAGED}: load another."
    ]


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def require_finite(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise if parameters in a state are NaN or infinite.

    Args:
        state: Tensors by name, of a checkpoint.
        names: The entries to check; entries that the state lacks are skipped.

    Raises:
        ValueError: If one of them holds NaN or infinity.
    """
    for name in names:
        value = state.get(name)
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(
                f"{name} in a checkpoint must be finite; got NaN or infinity in {bad} of {value.numel()} values. The "
                "file is damaged, or its run had diverged: take an earlier one."
            )
