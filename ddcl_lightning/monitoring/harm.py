"""Harm that can be measured without labels: what makes an alarm of a sign."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory, LossHistory
from ddcl_lightning.monitoring.rules import CollapseRules

SEVERE = ("uniform", "few_codes", "flat", "exploding", "drifting", "diverging")  # beside a loss that never fell
HARDLY = 0.1  # of a loss: a fall that is none


@dataclass(frozen=True)
class Harm:
    """Harm that was measured.

    Attributes:
        kind: How it was measured: ``"numbers"``, ``"codes"``, ``"loss"`` or ``"probe"``; each is reported by itself.
        sign: The sign that it confirms.
        text: What was measured.
        patience: Readings for which it must hold: one where it was measured on a fixed probe.
    """

    kind: str
    sign: str
    text: str
    patience: int = 1


def measured_harm(
    now: CodebookReport, past: HeadHistory, loss: LossHistory, rules: CollapseRules, signs: Mapping[str, str]
) -> list[Harm]:
    """Harm beside signs that hold, of which the earliest come first."""
    if not signs:
        return []
    first = next(iter(signs))
    numbers = Harm("numbers", "non_finite", _of_numbers(now)) if "non_finite" in signs else None
    by_codes = None if past.travels else _told_by_codes(now, past, loss, rules, signs)
    trained = _of_loss(loss, rules, first, signs) if loss.readings else None
    if not loss.readings and "explained" in past.recent and "explained" not in past.unknown:
        trained = harm_of_probe(past.recent["explained"][-1], past, rules, first)
    return [harm for harm in (numbers, by_codes, trained) if harm is not None]


def _of_numbers(now: CodebookReport) -> str:
    if now.non_finite > now.out_of_range:
        return "no number can be trained on"
    return "an index out of range is that of no code"


def _told_by_codes(
    now: CodebookReport, past: HeadHistory, loss: LossHistory, rules: CollapseRules, signs: Mapping[str, str]
) -> Harm | None:
    """Codes that tell next to nothing of the tokens; soft ones matter where they are all that goes on.

    Counts reach back to the start of a codebook that may have begun with few codes, so while they tell more from
    reading to reading, it is not known yet.
    """
    if "uniform" in signs and now.bank is not None and (now.quantizes or not loss.readings):
        told = float(torch.special.entr(now.bank.mass.double()).sum()) - now.bank.entropy
        text = f"the assignments tell {max(told, 0.0):.2g} of ln K = {math.log(now.num_codes):.2g} nats"
        return Harm("codes", "uniform", text)
    told = math.log(now.perplexity) if now.perplexity > 0 else math.nan
    recovers = "codes" not in past.alarmed and past.is_recovering("perplexity", rules.patience)
    if "few_codes" in signs and not recovers and told < rules.min_information * math.log(now.num_codes):
        text = f"the codes tell {told:.2g} of ln K = {math.log(now.num_codes):.2g} nats of a token"
        return Harm("codes", "few_codes", text)
    return None


def _of_loss(loss: LossHistory, rules: CollapseRules, first: str, signs: Mapping[str, str]) -> Harm | None:
    """A loss that rises again, or that stalls early while the tokens explode."""
    regain = loss.regain
    if regain > rules.max_regain:
        text = f"the loss has risen again from {loss.lowest:.4g} to {loss.smooth:.4g}, "
        text += f"{regain:.0%} of its fall" if regain < 1 else f"above its first value {loss.first:.4g}"
        return Harm("loss", first, text, 1 if loss.has_jumped else rules.patience)
    text = f"the loss has stalled at {loss.lowest:.4g}, where it began at {loss.first:.4g}"
    if "exploding" in signs and loss.has_stalled(rules.min_fall):
        return Harm("loss", "exploding", text, rules.patience)
    severe = next((sign for sign in signs if sign in SEVERE), None)
    if severe is not None and loss.has_stalled(HARDLY):
        return Harm("loss", severe, text, rules.patience)
    return None


def harm_of_probe(now: float, past: HeadHistory, rules: CollapseRules, first: str) -> Harm | None:
    """Codes that no longer tell apart what they told apart, where the codebook's own loss is all that is trained."""
    best = past.best.get("explained", math.nan)
    if not (best > 0 and now / best < rules.min_explained):
        return None
    return Harm("probe", first, f"the codes explain {now:.0%} of the probe's first variance, at best {best:.0%}")
