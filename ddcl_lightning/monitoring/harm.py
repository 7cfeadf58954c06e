"""Harm that can be measured without labels: what makes an alarm of a sign."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory, LossHistory
from ddcl_lightning.monitoring.signs import CollapseRules

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
    """Harm beside signs that hold."""
    if not signs:
        return []
    first = next(iter(signs))
    numbers = Harm("numbers", "non_finite", "no number can be trained on") if "non_finite" in signs else None
    by_codes = None if past.travels else _told_by_codes(now, loss, rules, signs)
    trained = _of_loss(loss, rules, first, signs) if loss.readings else _of_probe(past, rules, first)
    return [harm for harm in (numbers, by_codes, trained) if harm is not None]


def _told_by_codes(
    now: CodebookReport, loss: LossHistory, rules: CollapseRules, signs: Mapping[str, str]
) -> Harm | None:
    """Codes that tell next to nothing of the tokens; soft ones matter where they are all that goes on."""
    if "uniform" in signs and now.bank is not None and (now.quantizes or not loss.readings):
        told = float(torch.special.entr(now.bank.mass.double()).sum()) - now.bank.entropy
        text = f"the assignments tell {max(told, 0.0):.2g} of ln K = {math.log(now.num_codes):.2g} nats"
        return Harm("codes", "uniform", text)
    told = math.log(now.perplexity) if now.perplexity > 0 else math.nan
    if "few_codes" in signs and told < rules.min_information * math.log(now.num_codes):
        text = f"the codes tell {told:.2g} of ln K = {math.log(now.num_codes):.2g} nats of a token"
        return Harm("codes", "few_codes", text)
    return None


def _of_loss(loss: LossHistory, rules: CollapseRules, first: str, signs: Mapping[str, str]) -> Harm | None:
    """A loss that rises again, or that stalls early while the tokens explode."""
    regain = loss.regain
    if regain > rules.max_regain:
        text = f"the loss has risen again by {regain:.0%} of its fall"
        return Harm("loss", first, text, 1 if loss.has_jumped else rules.patience)
    text = f"the loss has stalled at {loss.lowest:.4g}, where it began at {loss.first:.4g}"
    if "exploding" in signs and loss.has_stalled(rules.min_fall):
        return Harm("loss", "exploding", text, rules.patience)
    severe = next((sign for sign in SEVERE if sign in signs), None)
    if severe is not None and loss.has_stalled(HARDLY):
        return Harm("loss", severe, text, rules.patience)
    return None


def _of_probe(past: HeadHistory, rules: CollapseRules, first: str) -> Harm | None:
    """Codes that no longer tell apart what they told apart, where the codebook's own loss is all that is trained."""
    if not past.share_of_best("explained") < rules.min_explained:
        return None
    now, best = past.recent["explained"][-1], past.best["explained"]
    return Harm("probe", first, f"the codes explain {now:.0%} of the probe's first variance, at best {best:.0%}")
