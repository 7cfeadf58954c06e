"""Signals of a bank's health, computed from one record of a call."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddcl_lightning.functional import (
    assignment_statistics,
    critical_temperature,
    effective_dimension,
    separation,
    total_variance,
)
from ddcl_lightning.monitoring.recording import BankRecord


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
    """

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
        return {
            "delta_min": self.delta_min,
            "delta_mean": self.delta_mean,
            "delta_relative": self.relative_separation,
            "embedding_scale": self.scale,
            "effective_dimension": self.dimension,
            "temperature_ratio": self.temperature_ratio,
            "entropy": self.entropy,
            "entropy_ratio": self.entropy_ratio,
            "used_in_batch": self.used_in_batch,
        }


@torch.no_grad()
def read_signals(
    record: BankRecord, detach_assignments: bool = False, recent_tokens: Tensor | None = None
) -> list[HeadSignals]:
    """Signals of each head from one record.

    Args:
        record: What a forward call of the bank read.
        detach_assignments: The bank's own setting, on which T_c depends.
        recent_tokens: Valid tokens ``(H, M, d)`` of this and earlier batches, for a steadier T_c and scale; by default
            this batch's.

    Returns:
        One entry per head. T_c is 0 and T / T_c infinite where the tokens have no variance.
    """
    tokens = record.valid_tokens() if recent_tokens is None else recent_tokens
    apart = separation(record.codebook)
    use = assignment_statistics(record.tokens, record.codebook, record.temperature, record.mask)
    critical = critical_temperature(tokens, detach_assignments=detach_assignments)
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
            mass=use.mass[head].cpu(),
            counts=use.counts[head].cpu(),
        )
        for head in range(record.codebook.shape[0])
    ]
