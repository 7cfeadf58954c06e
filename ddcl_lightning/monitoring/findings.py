"""What a monitor has to say: findings of two levels, and a verdict."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.signs import SIGNS


class CollapseError(RuntimeError):
    """Error that a codebook collapses."""


Level = Literal["notice", "alarm"]


@dataclass(frozen=True)
class Finding:
    """One thing that a monitor says of a codebook.

    Attributes:
        level: ``"notice"``: a sign, which may be harmless. ``"alarm"``: a sign, and harm that was measured.
        sign: Its name.
        codebook: Name of the codebook, with that of the head where there are several.
        step: Step at which it was read.
        text: Figures, codes and remedy.
    """

    level: Level
    sign: str
    codebook: str
    step: int
    text: str

    def __str__(self) -> str:
        return f"{self.sign} in {self.codebook or 'the codebook'} at step {self.step}: {self.text}"


def verdict(
    name: str,
    now: CodebookReport,
    findings: Sequence[Finding],
    holding: Collection[str],
    best: float = math.nan,
    probed: int | None = None,
) -> str:
    """One line on a codebook: how it is now, and which signs came first and when, confirmed by harm or not.

    Args:
        name: Of the codebook, or of one of its heads.
        now: Its health.
        findings: All findings, of this codebook and others.
        holding: Names of its signs that are still there.
        best: Highest share of the probe's first variance that its codes ever explained.
        probed: Step at which the probe was read.
    """
    if not now.num_tokens:
        return f"{name or 'codebook'}: no token yet"
    about = [f"perplexity {now.perplexity:.1f} of {now.num_codes}"]
    if not math.isnan(now.explained):
        when = f"{'' if probed is None else f'at step {probed}, '}at best {best:.0%}"
        about.append(f"codes explain {now.explained:.0%} of how samples differed at the start ({when})")
    own = sorted((finding for finding in findings if finding.codebook == name), key=lambda finding: finding.step)
    alarms = _first_steps(finding for finding in own if finding.level == "alarm")
    notices = _first_steps(finding for finding in own if finding.sign not in alarms)
    if alarms:
        about.append("ALARM: " + ", then ".join(f"{sign} at step {step}" for sign, step in alarms.items()))
    if notices:
        gone = {sign for sign in SIGNS if sign not in holding}
        listed = ", ".join(
            f"{sign} at step {step}{' (gone)' if sign in gone else ''}" for sign, step in notices.items()
        )
        about.append(f"noticed, no harm measured: {listed}")
    if now.dead is None:  # neither dead codes nor few of them are judged so early
        about.append(f"too few tokens read to say{' more' if own else ''} ({now.num_tokens} of {now.enough})")
    elif not own:
        about.append("no sign of a collapse")
    return f"{name or 'codebook'}: {'; '.join(about)}"


def _first_steps(findings: Iterable[Finding]) -> dict[str, int]:
    """Step of the first finding of each sign, the earliest sign first."""
    steps: dict[str, int] = {}
    for finding in findings:
        steps.setdefault(finding.sign, finding.step)
    return steps
