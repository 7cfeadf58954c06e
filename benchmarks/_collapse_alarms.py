"""Alarms that others would use, as functions of a recording: each returns the step of its first alarm, or None.

Any codebook of the run counts, and any head of it. Thresholds are the usual ones, chosen before the runs were made.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Recording = Mapping[str, Any]
Values = Mapping[tuple[str, int], float]  # by the codebook's name and the head
WINDOW = 2_048  # tokens, the latest, from which a rank is computed
SMOOTHING, LOSS_SMOOTHING = 0.9, 0.95  # of counts, per reading; of the loss, per step


def _by_head(recording: Recording, needs: str) -> Iterator[tuple[int, dict[tuple[str, int], dict[str, Any]]]]:
    """Every reading as step and fields of each head, of codebooks whose records have what is needed."""
    for reading in recording["readings"]:
        heads = {}
        for name, fields in reading["records"].items():
            if fields[needs] is None:
                continue
            for head in range(len(fields[needs])):
                kept = ("tokens", "codebook", "counts")
                cut = {key: None if fields[key] is None else fields[key][head] for key in kept}
                heads[name, head] = {**cut, "mask": fields["mask"], "num_codes": fields["num_codes"]}
        yield reading["step"], heads


def _first(steps: Iterator[tuple[int, bool]]) -> int | None:
    return next((step for step, alarm in steps if alarm), None)


def _rank(tokens: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values, without centering (RankMe)."""
    if not bool(torch.isfinite(tokens).all()):
        return 0.0
    share = torch.linalg.svdvals(tokens.double())
    share = share / share.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp())


def low_rank(recording: Recording) -> int | None:
    """RankMe of the latest tokens falls to half of its best so far."""
    windows: dict[tuple[str, int], deque[Tensor]] = {}
    best: dict[tuple[str, int], float] = {}

    def steps() -> Iterator[tuple[int, bool]]:
        for step, heads in _by_head(recording, "tokens"):
            alarm = False
            for key, fields in heads.items():
                window = windows.setdefault(key, deque())
                window.append(fields["tokens"])
                while sum(map(len, window)) - len(window[0]) >= WINDOW:
                    window.popleft()
                if sum(map(len, window)) >= WINDOW:
                    rank = _rank(torch.cat(list(window)))
                    best[key] = max(best.get(key, 0.0), rank)
                    alarm |= rank <= 0.5 * best[key]
            yield step, alarm

    return _first(steps())


def low_perplexity(recording: Recording) -> int | None:
    """Perplexity of the codes, of counts averaged over readings, falls below a quarter of K."""
    mean: dict[tuple[str, int], Tensor] = {}

    def steps() -> Iterator[tuple[int, bool]]:
        for step, heads in _by_head(recording, "counts"):
            alarm = False
            for key, fields in heads.items():
                counts = fields["counts"]
                mean[key] = SMOOTHING * mean.get(key, torch.zeros_like(counts)) + counts
                share = mean[key] / mean[key].sum().clamp(min=1e-30)
                alarm |= float(torch.special.entr(share).sum().exp()) < 0.25 * fields["num_codes"]
            yield step, alarm

    return _first(steps())


def low_usage(recording: Recording) -> int | None:
    """A batch uses less than half of the codes that it could: all K, or as many as it has tokens."""
    steps = (
        (
            step,
            any(
                float((fields["counts"] > 0).sum()) < 0.5 * min(fields["num_codes"], float(fields["counts"].sum()))
                for fields in heads.values()
            ),
        )
        for step, heads in _by_head(recording, "counts")
    )
    return _first(steps)


def rising_loss(recording: Recording) -> int | None:
    """The smoothed loss is a tenth above its lowest; if that is not positive, a tenth of its range so far."""
    mean: float | None = None
    lowest, highest = math.inf, -math.inf
    for step, loss in enumerate(recording["losses"]):
        mean = loss if mean is None else LOSS_SMOOTHING * mean + (1 - LOSS_SMOOTHING) * loss
        lowest, highest = min(lowest, mean), max(highest, mean)
        if mean > lowest + 0.1 * (lowest if lowest > 0 else highest - lowest):
            return step
    return None


def low_separation(recording: Recording) -> int | None:
    """The smallest distance between two codes has lost more than half of its peak."""
    peak: dict[tuple[str, int], float] = {}

    def steps() -> Iterator[tuple[int, bool]]:
        for step, heads in _by_head(recording, "codebook"):
            alarm = False
            for key, fields in heads.items():
                distance = separation(fields["codebook"])
                peak[key] = max(peak.get(key, 0.0), distance)
                alarm |= distance < 0.5 * peak[key]
            yield step, alarm

    return _first(steps())


def separation(codebook: Tensor) -> float:
    """Smallest distance between two rows."""
    distances = torch.cdist(codebook.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    return float(distances.min())


def final_use(recording: Recording) -> dict[str, float]:
    """Perplexity and usage of the last look at the fixed training samples over K, of the worst codebook."""
    records = recording["probes"][-1]["records"] if recording["probes"] else {}
    counts = [row for fields in records.values() for row in fields["counts"]]
    shares = [row / row.sum().clamp(min=1e-30) for row in counts]
    perplexities = [float(torch.special.entr(share).sum().exp()) / len(share) for share in shares]
    usages = [float((row > 0).float().mean()) for row in counts]
    return {"perplexity": round(min(perplexities, default=0.0), 4), "usage": round(min(usages, default=0.0), 4)}


RULES: dict[str, tuple[str, Callable[[Recording], int | None]]] = {
    "rank": ("RankMe of tokens, half of its best", low_rank),
    "perplexity": ("perplexity < K / 4", low_perplexity),
    "usage": ("usage of a batch < 50 %", low_usage),
    "loss": ("loss 10 % above its lowest", rising_loss),
    "separation": ("Δ, half of its peak", low_separation),
}
