"""State of CollapseWarning between its readings."""

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

ENOUGH_TOKENS = 2048  # for one covariance: earlier readings are kept until there are as many
TREND_READINGS = 20


@dataclass
class PrototypeUse:
    """Waiting times of prototypes for a token; ``(K,)`` each."""

    hits: Tensor  # tokens nearest to each so far
    idle: Tensor  # tokens seen since the last of them
    share: Tensor  # share of the tokens that was its, when it was last hit
    num_tokens: int = 0

    @classmethod
    def empty(cls, size: int) -> "PrototypeUse":
        """Waiting times of K prototypes before the first token."""
        return cls(torch.zeros(size), torch.zeros(size), torch.zeros(size))

    def add(self, counts: Tensor) -> None:
        """Add the counts ``(K,)`` of one batch."""
        self.num_tokens += int(counts.sum())
        self.hits = self.hits + counts
        hit = counts > 0
        self.idle = torch.where(hit, 0.0, self.idle + counts.sum())
        self.share = torch.where(hit, self.hits / max(self.num_tokens, 1), self.share)

    def dead(self) -> list[int]:
        """Prototypes without a token among 50 K, and for 20 times as long as they used to wait for one."""
        patience = (20 / self.share).nan_to_num(posinf=0.0).clamp(min=50 * len(self.idle))
        return torch.nonzero(self.idle >= patience).flatten().tolist()


@dataclass
class HeadHistory:
    """State of one head between readings."""

    use: PrototypeUse
    tokens: deque[Tensor] = field(default_factory=deque)
    readings: int = 0
    log_delta: deque[float] = field(default_factory=lambda: deque(maxlen=TREND_READINGS))
    peak_delta: float = 0.0
    scale_at_peak: float = math.nan
    peak_dimension: float = 0.0
    streaks: dict[str, int] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)  # the latest of additional signals, by name

    def add_value(self, name: str, value: float) -> list[float]:
        """Keep the value of a signal; those before it, at most 20."""
        earlier = self.values.get(name, [])
        self.values[name] = [*earlier, value][-TREND_READINGS:]
        return earlier

    def add_tokens(self, tokens: Tensor) -> None:
        """Add every n-th of a batch's ``(N, d)`` tokens, and drop the oldest that are no longer needed."""
        self.tokens = deque(earlier.to(tokens.device) for earlier in self.tokens)  # a resumed run's come from a file
        self.tokens.append(tokens[:: math.ceil(len(tokens) / ENOUGH_TOKENS)].float())
        while sum(map(len, self.tokens)) - len(self.tokens[0]) >= ENOUGH_TOKENS:
            self.tokens.popleft()


def trend(values: deque[float]) -> float:
    """Slope of the least-squares line through equally spaced values, per reading; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    y = torch.tensor(list(values), dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    x -= x.mean()
    return float((x * y).sum() / x.square().sum())
