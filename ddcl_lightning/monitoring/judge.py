"""From readings to findings: which signs have held long enough, and which of them come with measured harm."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ddcl_lightning.monitoring.findings import Finding
from ddcl_lightning.monitoring.harm import harm_of_probe, measured_harm
from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory, LossHistory, histories_from
from ddcl_lightning.monitoring.records import belongs_to
from ddcl_lightning.monitoring.rules import CollapseRules
from ddcl_lightning.monitoring.signs import OF_ANNEALING, SEVERAL_CODES, SIGNS

END_OF_ANNEALING = 0.2  # T / T_c below which a planned schedule explains no sign any more


class Judge:
    """Judge of the readings of every codebook, one after the other.

    Args:
        rules: Thresholds.

    Attributes:
        histories: By the name of a codebook or head.
        loss: Course of the loss, if it is given.
        findings: All so far.
    """

    def __init__(self, rules: CollapseRules) -> None:
        self.rules = rules
        self.histories: dict[str, HeadHistory] = {}
        self.loss = LossHistory()
        self.findings: list[Finding] = []

    def judge(
        self,
        step: int,
        reports: Mapping[str, CodebookReport],
        loss: float | None = None,
        *,
        planned_end: Mapping[str, float] | None = None,
        from_data: bool = True,
    ) -> list[Finding]:
        """Findings that are new with this reading.

        Args:
            step: Step of the reading.
            reports: Health by the name of a codebook or head.
            loss: Mean loss since the last reading, of a task or a reconstruction; None where the only loss is that of
                the codebook.
            planned_end: Temperature that a schedule ends at, by the same names.
            from_data: Whether codes started from tokens.
        """
        new = []
        if loss is not None:
            new += self._judge_loss(step, next(iter(reports), ""), loss)
        for name, now in reports.items():
            past = self.histories.setdefault(name, HeadHistory())
            end = (planned_end or {}).get(name, float("inf"))
            if past.readings == 0 and now.bank is not None and now.bank.temperature_ratio >= 1:
                past.planned = end < now.bank.critical
            past.add(now, from_data)
            new += self._judge(step, name, now, past, end)
        self.findings += new
        return new

    def _judge_loss(self, step: int, name: str, loss: float) -> list[Finding]:
        """A loss that is no number is an alarm, the first time."""
        known = self.loss.is_broken
        self.loss.add(loss)
        if known or not self.loss.is_broken:
            return []
        text = f"the loss is {loss}. Lower the learning rates or clip the gradients. Harm: no number can be trained on."
        return [Finding("alarm", "non_finite", name, step, text)]

    def _judge(self, step: int, name: str, now: CodebookReport, past: HeadHistory, end: float) -> list[Finding]:
        texts = {sign: find(now, past, self.rules) for sign, find in SIGNS.items()}
        for sign in (
            *(SEVERAL_CODES if now.num_codes < 2 else ()),
            *(OF_ANNEALING if _anneals(now, past, end) else ()),
        ):
            texts[sign] = ""
        if texts["out_of_scale"]:
            texts = {sign: text if sign in ("non_finite", "out_of_scale") else "" for sign, text in texts.items()}
        new = []
        for sign, text in texts.items():
            past.streaks[sign] = past.streaks.get(sign, 0) + 1 if text else 0
            if past.streaks[sign] == self._patience(sign):
                new.append(Finding("notice", sign, name, step, text))
        holding = {sign: text for sign, text in texts.items() if past.streaks[sign] >= self._patience(sign)}
        if self.loss.has_jumped:  # no time to wait for a sign to last
            holding = {sign: text for sign, text in texts.items() if text}
        holding = {sign: holding[sign] for sign in earliest_first(holding, past)}
        harms = {harm.kind: harm for harm in measured_harm(now, past, self.loss, self.rules, holding)}
        past.alarmed = [kind for kind in past.alarmed if kind in harms]
        past.harmed = {kind: past.harmed.get(kind, 0) + 1 for kind in harms}
        for kind, harm in harms.items():
            if past.harmed[kind] >= harm.patience and kind not in past.alarmed:
                past.alarmed.append(kind)
                new.append(Finding("alarm", harm.sign, name, step, f"{holding[harm.sign]} Harm: {harm.text}."))
        return new

    def judge_probe(self, step: int, reports: Mapping[str, CodebookReport]) -> list[Finding]:
        """Alarms of signs that hold in the last reading, if a probe that was read since then shows harm.

        Args:
            step: Step of that reading.
            reports: Its reports with what the probe told now. What goes on from here goes on from the probe before.
        """
        new = []
        for name, now in reports.items():
            past = self.histories.get(name, HeadHistory())
            if math.isnan(now.explained) or self.loss.readings or "probe" in past.alarmed:
                continue
            signs = {sign: SIGNS[sign](now, past, self.rules) for sign in earliest_first(self.holding(name), past)}
            signs = {sign: text for sign, text in signs.items() if text}
            harm = harm_of_probe(now.explained, past, self.rules, next(iter(signs), ""))
            if signs and harm is not None:
                new.append(Finding("alarm", harm.sign, name, step, f"{signs[harm.sign]} Harm: {harm.text}."))
        self.findings += new
        return new

    def _patience(self, sign: str) -> int:
        """Dead codes have been watched for long, and a value that is no number says enough."""
        return 1 if sign in ("dead", "few_codes", "non_finite", "out_of_scale") else self.rules.patience

    def holding(self, name: str) -> list[str]:
        """Signs of a codebook that hold now; then harm is worth a measurement."""
        past = self.histories.get(name, HeadHistory())
        return [sign for sign in past.streaks if past.streaks[sign] >= self._patience(sign) and sign in SIGNS]

    def best_explained(self, name: str) -> float:
        """Highest share of the probe's first variance that the codes explained."""
        return self.histories.get(name, HeadHistory()).best.get("explained", math.nan)

    def forget(self, name: str) -> None:
        """Drop the history of a codebook, and of its heads, that was resized."""
        self.histories = {key: past for key, past in self.histories.items() if not belongs_to(key, name)}

    def state_dict(self) -> dict[str, Any]:
        """Histories, loss and findings as plain numbers and text."""
        return {
            "heads": {name: past.state_dict() for name, past in self.histories.items()},
            "loss": vars(self.loss).copy(),
            "findings": [vars(finding).copy() for finding in self.findings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.histories = histories_from(state["heads"])
        self.loss = LossHistory(**state["loss"])
        self.findings = [Finding(**saved) for saved in state["findings"]]


def earliest_first(signs: Iterable[str], past: HeadHistory) -> list[str]:
    """Signs in the order in which they came: the first is the likely cause of the others."""
    return sorted(signs, key=lambda sign: -past.streaks.get(sign, 0))


def _anneals(now: CodebookReport, past: HeadHistory, end: float) -> bool:
    """True while a temperature that started above the critical one falls as planned; the separation starts anew."""
    if not past.planned or now.bank is None:
        return False
    if now.bank.temperature_ratio > END_OF_ANNEALING and now.bank.temperature > end * (1 + 1e-6):
        past.forget_best(("delta", "separation", "code_rank", "perplexity"))
        return True
    past.planned = False
    return False
