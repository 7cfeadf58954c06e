"""Thresholds of the signs of a collapse, and of the harm that makes an alarm of a sign."""

import math
from dataclasses import dataclass, fields

from ddcl_lightning._utils.arguments import require_at_least


@dataclass(frozen=True)
class CollapseRules:
    """Thresholds of the signs of a collapse, and of the harm that makes an alarm of a sign.

    Attributes:
        duplicate_distance: Distance, relative to the spread of the tokens, up to which codes are near-duplicates.
        max_drop: Share of its highest value that the separation Delta may lose.
        max_entropy: Largest H / ln K.
        min_rank: Smallest effective rank, of tokens and of codes, relative to its highest value.
        min_perplexity: Smallest perplexity relative to K.
        max_dead: Largest share of dead codes.
        max_growth: Largest growth of the tokens' spread since the start; its inverse is the smallest.
        max_extent: Largest distance of a code to the mean of the tokens, relative to their spread.
        patience: Readings for which a sign must hold.
        min_explained: Smallest share of a probe's first variance that codes explain, relative to its highest value.
        min_information: Smallest logarithm of the perplexity relative to ln K.
        min_fall: Smallest fall of the loss, relative to its first value, before it may stall.
        max_regain: Largest share of its fall that the loss may rise again.

    Raises:
        ValueError: If a number is out of its range.
    """

    duplicate_distance: float = 0.02
    max_drop: float = 0.5
    max_entropy: float = 0.98
    min_rank: float = 0.5
    min_perplexity: float = 0.25
    max_dead: float = 0.1
    max_extent: float = 10.0
    max_growth: float = 10.0
    patience: int = 3
    min_explained: float = 0.9
    min_information: float = 0.25
    min_fall: float = 0.65
    max_regain: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name == "patience"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value < math.inf:
                kind = "a whole number" if whole else "a finite number"
                raise ValueError(f"{field.name} must be {kind}; got {value!r}. Its default is {field.default}.")
        for name in ("max_drop", "max_entropy", "min_rank", "min_perplexity", "min_explained", "min_information"):
            _require_share(name, getattr(self, name))
        _require_share("min_fall", self.min_fall)
        if not 0 <= self.max_dead <= 1:
            raise ValueError(
                f"max_dead must be in [0, 1], a share of the codes; got {self.max_dead}. Pass a share such as 0.1."
            )
        for name in ("duplicate_distance", "max_extent", "max_growth", "max_regain"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}. Pass 0 or more.")
        require_at_least(1, patience=self.patience)


def _require_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]; got {value}. Leave it out for the default.")
