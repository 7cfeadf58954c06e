"""Signals of a bank's health, computed from one record of a call."""

import math
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddcl_lightning.functional import (
    assignment_statistics,
    critical_temperature,
    decompose,
    effective_dimension,
    lyapunov,
    separation,
    total_variance,
)
from ddcl_lightning.monitoring.records import BankRecord


class Signal(ABC):
    """A number that tells of a codebook's health, for :class:`~ddcl_lightning.CollapseWarning` to log and to judge.

    Subclass it, name it and write ``read``; ``sign`` too where some values call for a warning.

    Attributes:
        name: Under which it is logged, and reported.
    """

    name: str

    @abstractmethod
    def read(self, record: BankRecord) -> Tensor:
        """The signal of each head, ``(H,)``, from one batch of all processes together."""

    def sign(self, value: float, earlier: Sequence[float]) -> str | None:
        """A sentence with the value and the remedy where it speaks of a collapse, else None.

        Args:
            value: The latest value of one head.
            earlier: Its values before, up to 20, the oldest first.
        """
        return None


def check_signals(argument: str, signals: Sequence[Signal], taken: Collection[str]) -> None:
    """Refuse signals that could not be told apart.

    Args:
        argument: That they come from, for the error.
        signals: All of them.
        taken: Names that something else has.

    Raises:
        ValueError: If one has no name, or one that another signal or something else has.
    """
    earlier: set[str] = set()
    for signal in signals:
        owner, name = type(signal).__name__, getattr(signal, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{argument} must hold signals with a name; got {name!r} of {owner}. Set its name, a string."
            )
        if re.search(r"[\s/]", name):
            raise ValueError(
                f"{argument} must hold signals whose names have no spaces and no '/', since they are logged as "
                f"ddcl/NAME/CODEBOOK; got {name!r} of {owner}. Write '_' in their place."
            )
        if name in earlier:
            raise ValueError(f"{argument} must hold signals of different names; got {name!r} twice. Rename one.")
        if name in taken:
            raise ValueError(
                f"{argument} must hold signals of names that are free; got {name!r} of {owner}. Rename it: taken are "
                f"{', '.join(sorted(taken))}."
            )
        earlier.add(name)


def read_signal(signal: Signal, record: BankRecord) -> list[float]:
    """Values of a signal, one per head.

    Raises:
        ValueError: If it fails, or reads anything but ``(H,)`` floats.
    """
    try:
        values: object = signal.read(record)
    except Exception as error:
        raise _failed("read", signal, error) from error
    heads = len(record.codebook)
    if isinstance(values, Tensor) and values.is_floating_point() and values.shape == (heads,):
        return [float(value) for value in values]
    got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"{values!r:.80}"
    raise ValueError(
        f"read of the signal {signal.name!r} must return floats of shape ({heads},), one per head; got {got}. Return a "
        "tensor, as torch.stack makes of numbers, or as record.codebook.mean((1, 2)) is one."
    )


def read_sign(signal: Signal, value: float, earlier: Sequence[float]) -> str:
    """Sentence of a signal about its latest value, empty where that is no sign.

    Raises:
        ValueError: If it fails, or its ``sign`` is neither a string nor None.
    """
    try:
        text: object = signal.sign(value, earlier)
    except Exception as error:
        raise _failed("sign", signal, error) from error
    if text is None or isinstance(text, str):
        return text or ""
    raise ValueError(
        f"sign of the signal {signal.name!r} must return a sentence, or None where there is nothing to say; got "
        f"{text!r:.80}. Return a string."
    )


def _failed(method: str, signal: Signal, error: Exception) -> ValueError:
    """An error of somebody's method, with its place in their code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ValueError(
        f"{method} of the signal {signal.name!r} must work on every record of a bank; got {type(error).__name__}: "
        f"{error} (line {place.lineno} of {place.filename}). Correct it, or leave {type(signal).__name__} out."
    )


@dataclass(frozen=True)
class HeadSignals:
    """Health of one head of a bank; plain numbers.

    Attributes:
        delta_min: Smallest distance between two prototypes (eq. 8).
        delta_mean: Mean distance between prototypes.
        closest: The pair at the smallest distance.
        scale: Root mean squared distance of the tokens to their mean.
        dimension: Effective dimension of the tokens (participation ratio), NaN where they have no variance.
        temperature: T.
        critical: T_c of the tokens.
        entropy: H in nats (eq. 9).
        num_prototypes: K.
        mass: Mean soft assignment, K numbers.
        counts: Tokens nearest to each prototype, K numbers.
        descends: What descent on ``L_q`` lowers: ``L_q``, with detached assignments ``L_q - T H``
            (:func:`~ddcl_lightning.functional.lyapunov`).
        fits_dtype: Whether the squared scale is a normal number in the dtype of the prototypes; elsewhere the bank's
            own distances are none.
        logged: Attributes for a logger, by the names that they have there.
    """

    logged: ClassVar[dict[str, str]] = {
        "delta_min": "delta_min",
        "delta_mean": "delta_mean",
        "delta_relative": "relative_separation",
        "embedding_scale": "scale",
        "effective_dimension": "dimension",
        "temperature_ratio": "temperature_ratio",
        "entropy": "entropy",
        "entropy_ratio": "entropy_ratio",
        "used_in_batch": "used_in_batch",
        "lyapunov": "descends",
    }

    delta_min: float
    delta_mean: float
    closest: tuple[int, int]
    scale: float
    dimension: float
    temperature: float
    critical: float
    entropy: float
    num_prototypes: int
    mass: Tensor
    counts: Tensor
    descends: float = math.nan
    fits_dtype: bool = True

    @property
    def relative_separation(self) -> float:
        """Delta over the scale of the tokens."""
        return self.delta_min / self.scale if self.scale > 0 else math.nan

    @property
    def temperature_ratio(self) -> float:
        """T / T_c; above 1 the bank collapses towards the mean."""
        return self.temperature / self.critical if self.critical > 0 else math.inf

    @property
    def entropy_ratio(self) -> float:
        """H / ln K, 1 for uniform assignments; NaN for a single prototype."""
        return self.entropy / math.log(self.num_prototypes) if self.num_prototypes > 1 else math.nan

    @property
    def used_in_batch(self) -> float:
        """Share of the prototypes that a token of this batch is nearest to; a small batch cannot use them all."""
        return float((self.counts > 0).float().mean())

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger, by name."""
        return {name: float(getattr(self, attribute)) for name, attribute in self.logged.items()}


@torch.no_grad()
def read_signals(record: BankRecord, recent_tokens: Tensor | None = None) -> list[HeadSignals]:
    """Signals of each head from one record.

    Args:
        record: What a forward call of the bank read.
        recent_tokens: Valid tokens ``(H, M, d)`` of this and earlier batches, for a steadier T_c and scale; by default
            this batch's.

    Returns:
        One entry per head. T_c is 0 and T / T_c infinite where the tokens have no variance.
    """
    tokens = record.valid_tokens() if recent_tokens is None else recent_tokens
    batch, codebook, temperature = record.tokens.double(), record.codebook.double(), record.temperature.double()
    apart = separation(codebook)
    use = assignment_statistics(batch, codebook, temperature, record.mask)
    loss = decompose(batch, codebook, temperature, record.mask).loss
    descends = lyapunov(loss, temperature, use.entropy, detach_assignments=record.detach_assignments)
    critical = critical_temperature(tokens, detach_assignments=record.detach_assignments)
    limits = torch.finfo(record.codebook.dtype)
    scale, dimension = total_variance(tokens).sqrt(), effective_dimension(tokens)
    return [
        HeadSignals(
            delta_min=float(apart.minimum[head]),
            delta_mean=float(apart.mean[head]),
            closest=(int(apart.closest[head, 0]), int(apart.closest[head, 1])),
            scale=float(scale[head]),
            dimension=float(dimension[head]),
            temperature=float(record.temperature[head]),
            critical=float(critical[head]),
            entropy=float(use.entropy[head]),
            num_prototypes=record.codebook.shape[1],
            mass=use.mass[head].float().cpu(),
            counts=use.counts[head].cpu(),
            descends=float(descends[head]),
            fits_dtype=limits.tiny < float(scale[head]) ** 2 < limits.max or not scale[head] > 0,
        )
        for head in range(record.codebook.shape[0])
    ]
