"""Harm that can be measured without labels: what makes an alarm of a sign."""

from collections.abc import Mapping
from dataclasses import dataclass

from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory, LossHistory
from ddcl_lightning.monitoring.signs import CollapseRules


@dataclass(frozen=True)
class Harm:
    """Harm that was measured.

    Attributes:
        sign: The sign that it confirms.
        text: What was measured.
        patience: Readings for which it must hold: one where it was measured on a fixed probe.
    """

    sign: str
    text: str
    patience: int = 1


def measured_harm(
    now: CodebookReport, past: HeadHistory, loss: LossHistory, rules: CollapseRules, signs: Mapping[str, str]
) -> Harm | None:
    """Harm beside signs that hold, or None."""
    if not signs:
        return None
    first = next(iter(signs))
    if "non_finite" in signs:
        return Harm("non_finite", "no number can be trained on")
    if loss.readings:
        regain = loss.regain
        if regain > rules.max_regain:
            return Harm(first, f"the loss has risen again by {regain:.0%} of its fall", rules.patience)
        return None
    share = past.share_of_best("explained")
    if share < rules.min_explained:
        return Harm(
            first,
            f"the codes explain {past.recent['explained'][-1]:.0%} of the probe's first variance, at best "
            f"{past.best['explained']:.0%}",
        )
    return None
