"""Alarms of collapse on many short runs, of which some collapse and some do not.

Every run of ``_collapse_cases.py`` is recorded (``_collapse_runs.py``): what passes through its codebooks, its losses,
and its quality on held-out data at 23 moments, a task metric alone: mutual information of clusters and classes, the
explained variance of reconstructed images, accuracy above that of the largest class. Whether a run has collapsed is
read from the quality and from nothing else:

- The level of a run is the best quality that it had itself (means of two evaluations that follow each other), or that
  of the reference of its kind at the end (median over seeds), whichever is higher; negative qualities count as 0.
- r is its final quality, the mean of the last two evaluations, over that level. It has collapsed if r < 0.8, is healthy
  if r >= 0.9, and is left out between.
- The quality is lost at the first evaluation from which on it stays below 0.9 of the level: 0 where it never was there.

Thresholds may be chosen on the half ``tuned``; kinds of the half ``held-out`` are other ones. ``in time`` counts, among
collapsed runs that had a quality to lose, those whose alarm came no later than the loss; the lead is how much earlier,
as a share of the run, over those with an alarm. Alarms are functions of a recording, and runs that
are in the folder of recordings are not trained again.

    python benchmarks/collapse_warning.py --fashion FOLDER --cifar FILE.npz --recordings FOLDER
    python benchmarks/collapse_warning.py ... --cases 'tuned/*' --seeds 0
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from _collapse_alarms import RULES, final_use
from _collapse_cases import CASES, QUICK
from _collapse_runs import recording
from _study import Options, Study
from _tables import Config, Results, Run, Table

COLLAPSED, HEALTHY = 0.8, 0.9  # r below, r from
Quality = list[tuple[int, float]]
VERDICTS = ("collapsed", "healthy", "between")
# Rows of the tables of alarms: the key in a run's "alarms", and the label.
ROWS = {name: label for name, (label, _) in RULES.items()}


def run(config: Config, seed: int, options: Options) -> Run:
    """Record the run, or load it, and apply every rule."""
    recorded = recording(config, seed, options)
    return {
        "steps": recorded["steps"],
        "quality": [[step, round(value, 4)] for step, value in recorded["quality"]],
        "final": round(final_quality(recorded["quality"]), 4),
        **final_use(recorded),
        "error": recorded["error"],
        # Alarms of a monitor join here, by names that ROWS has too.
        "alarms": {name: rule(recorded) for name, (_, rule) in RULES.items()},
    }


def final_quality(quality: Iterable[tuple[int, float]]) -> float:
    """Mean of the last two evaluations, negative ones as 0."""
    return statistics.fmean(max(value, 0.0) for _, value in list(quality)[-2:])


def verdict(quality: Quality, reference: float) -> tuple[str, float, int | None]:
    """Verdict on a run: whether it has collapsed, r, and the step at which the quality was lost, None where it was not.

    Args:
        quality: Steps and values.
        reference: Final quality of the reference, its median over seeds.
    """
    values = [max(value, 0.0) for _, value in quality]
    best = max(statistics.fmean(pair) for pair in pairwise(values))
    level = max(best, reference)
    r = final_quality(quality) / level if level > 0 else 0.0
    name = "collapsed" if r < COLLAPSED else "healthy" if r >= HEALTHY else "between"
    lost: int | None = None
    for (step, _), value in zip(reversed(quality), reversed(values), strict=True):
        if value >= HEALTHY * level > 0:
            break
        lost = step
    return name, r, lost


def judged(results: Results, half: str) -> list[dict[str, Any]]:
    """The runs of a half, each with its ``kind``, ``verdict``, ``r`` and ``lost``."""
    references: dict[str, float] = {}
    rows = []
    for case in results.where(half=half):
        config = results.configs[case]
        reference = config["reference"]
        if reference not in references:
            finals = [final_quality(run["quality"]) for run in results.of(reference)]
            references[reference] = statistics.median(finals) if finals else 0.0
        for run in results.of(case):
            name, r, lost = verdict(run["quality"], references[reference])
            rows.append({**run, "kind": config["kind"], "verdict": name, "r": r, "lost": lost})
    return rows


def alarms(results: Results, half: str) -> Table:
    """Alarms of each rule on a half: recall, false alarms, and how early."""
    rows = judged(results, half)
    collapsed = [row for row in rows if row["verdict"] == "collapsed"]
    healthy = [row for row in rows if row["verdict"] == "healthy"]
    had_quality = [row for row in collapsed if row["lost"]]
    table = [["rule", "recall", "false alarms", "in time", "median lead"]]
    for name, label in ROWS.items():
        recall, false = (alarm_count(name, group) for group in (collapsed, healthy))
        early = [row for row in had_quality if (alarm := row["alarms"].get(name)) is not None and alarm <= row["lost"]]
        table.append([label, recall, false, share(len(early), len(had_quality)), lead(name, had_quality)])
    return table


def alarm_count(name: str, rows: list[dict[str, Any]]) -> str:
    return share(sum(row["alarms"].get(name) is not None for row in rows), len(rows))


def share(count: int, total: int) -> str:
    return f"{count} of {total}"


def lead(name: str, rows: list[dict[str, Any]]) -> str:
    """Median of the share of a run between alarm and loss of the quality, of runs with an alarm."""
    shares = [(row["lost"] - row["alarms"][name]) / row["steps"] for row in rows if row["alarms"].get(name) is not None]
    return f"{statistics.median(shares):+.2f}" if shares else ""


def kinds(results: Results, half: str) -> Table:
    """Number of runs of each kind that have collapsed or not."""
    counts: dict[str, Counter[str]] = {}
    for row in judged(results, half):
        counts.setdefault(row["kind"], Counter())[row["verdict"]] += 1
    rows: Mapping[str, Counter[str]] = {**counts, "all": sum(counts.values(), Counter())}
    return [["kind", *VERDICTS], *([kind, *(str(row[name]) for name in VERDICTS)] for kind, row in rows.items())]


TABLES = {
    f"{name}-{half}": lambda results, make=make, half=half: make(results, half)
    for half in ("tuned", "held-out")
    for name, make in (("kinds", kinds), ("alarms", alarms))
}
STUDY = Study(
    "collapse_warning",
    CASES,
    run,
    TABLES,
    seeds=(0, 1, 2),
    settings={"collapsed": COLLAPSED, "healthy": HEALTHY},
    quick=QUICK,
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
