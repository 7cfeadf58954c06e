"""From readings to findings: how long a sign has to hold, what makes an alarm of it, and what is remembered."""

import io
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from ddcl_lightning import CollapseRules
from ddcl_lightning.monitoring.findings import Finding, verdict
from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import (
    TREND_READINGS,
    HeadHistory,
    LossHistory,
    histories_from,
    trend,
)
from ddcl_lightning.monitoring.judge import Judge
from ddcl_lightning.monitoring.signals import HeadSignals

RULES = CollapseRules()
HEALTHY = CodebookReport(
    num_codes=8,
    num_tokens=1000,
    usage=1.0,
    perplexity=7.5,
    dead=(),
    separation=0.8,
    closest=(0, 1),
    duplicates=0,
    token_rank=12.0,
    code_rank=7.0,
    dim=16,
    spread=1.0,
    commitment=0.3,
    extent=2.0,
    farthest=3,
    explained=0.6,
)


def bank(ratio: float, delta: float = 1.0, uniform: float = 0.5) -> HeadSignals:
    """Signals of a bank at T / T_c, where T_c is 1."""
    evenly = torch.full((8,), 1 / 8)
    entropy = math.log(8) * uniform
    return HeadSignals(delta, delta, (0, 1), 1.0, 8.0, ratio, 1.0, entropy, 8, evenly, torch.full((8,), 9))


def told(judge: Judge, *reports: CodebookReport, loss: float | None = None, **kwargs: Any) -> list[Finding]:
    """What is found in some readings of one codebook, after those before."""
    steps = judge.histories["book"].readings if "book" in judge.histories else 0
    return [
        finding
        for number, report in enumerate(reports)
        for finding in judge.judge(steps + number, {"book": report}, loss, **kwargs)
    ]


def signs(findings: list[Finding], level: str = "notice") -> list[str]:
    return [finding.sign for finding in findings if finding.level == level]


def test_a_healthy_codebook_has_no_finding() -> None:
    judge = Judge(RULES)
    assert told(judge, *[HEALTHY] * 50, loss=1.0) == []
    assert told(judge, *[replace(HEALTHY, bank=bank(0.1))] * 50) == []
    assert judge.holding("book") == []


def merged(share: int) -> CodebookReport:
    """So many of 8 codes are near-duplicates."""
    return replace(HEALTHY, duplicates=share, separation=1e-4, closest=(2, 5))


SICK = {
    "non_finite": replace(HEALTHY, non_finite=4),
    "above_critical": replace(HEALTHY, bank=bank(3.0)),
    "flat": replace(HEALTHY, token_rank=1.0),
    "flat_codes": replace(HEALTHY, code_rank=1.0),
    "merged": merged(8),
    "uniform": replace(HEALTHY, bank=bank(0.5, uniform=0.999)),
    "dead": replace(HEALTHY, dead=(1, 2, 3, 4, 5, 6, 7)),
    "few_codes": replace(HEALTHY, perplexity=1.01),
    "drifting": replace(HEALTHY, commitment=50.0),
    "diverging": replace(HEALTHY, extent=1e4),
}
NAMED = {
    "non_finite": "4 tokens or codes were NaN",
    "above_critical": r"T = 3 is 3\.00 times .*Lower the temperature",
    "flat": r"tokens fell from 12 to 1 of 16.*bound the scale of the tokens",
    "flat_codes": r"codes fell from 7 to 1 of 16.*start the codes from tokens",
    "merged": r"8 of 8 codes .*closest are 2 and 5, 0\.0001.*fewer codes",
    "uniform": r"0\.999 of ln K.*at T / T_c = 0\.5\. .*lower the learning rates",
    "dead": r"7 of 8 codes \(1, 2, 3, 4, 5, 6, 7\).*put tokens in the place of dead codes",
    "few_codes": r"perplexity is 1\.0 of 8.*fewer codes",
    "drifting": r"50 of their variance.*commitment",
    "diverging": r"code 3 is 1e\+04 times.*Lower the learning rate",
}


@pytest.mark.parametrize("sign", SICK)
def test_each_sign_is_noticed_once_with_its_figures_and_a_remedy(sign: str) -> None:
    judge = Judge(RULES)
    told(judge, *[replace(HEALTHY, bank=bank(0.1))] * 3)
    findings = [finding for finding in told(judge, *[SICK[sign]] * 20) if finding.level == "notice"]
    (notice,) = [finding for finding in findings if finding.sign == sign]
    assert notice.codebook == "book"
    assert notice.step >= 3
    assert re.search(NAMED[sign], notice.text), notice.text
    assert str(notice).startswith(f"{sign} in book at step {notice.step}: ")
    assert judge.holding("book") or sign == "non_finite"  # there were no new ones


def test_a_falling_separation_is_noticed_and_says_whether_the_tokens_fall_too() -> None:
    for shrink, words in ((1.0, "the spread from 1 to 1: codes 0 and 1 approach"), (0.8, ": the tokens shrink too")):
        judge = Judge(RULES)
        course = [replace(HEALTHY, separation=0.8**n, spread=shrink**n) for n in range(25)]
        (notice,) = [finding for finding in told(judge, *course) if finding.sign == "falling"]
        assert words in notice.text


def test_a_low_separation_that_does_not_fall_is_no_sign() -> None:
    judge = Judge(RULES)
    assert told(judge, HEALTHY, *[replace(HEALTHY, separation=0.1 + 0.001 * n) for n in range(40)])[1:] == []


def test_the_fall_of_codes_that_travel_to_the_tokens_is_no_sign() -> None:
    def falls(from_data: bool) -> list[int]:
        judge = Judge(RULES)
        travel, rest = [5.0 - 0.3 * n for n in range(15)], [0.8] * 10
        course = [*travel, *rest, *[0.8 * 0.8**n for n in range(1, 15)]]
        findings = told(judge, *[replace(HEALTHY, separation=value) for value in course], from_data=from_data)
        return [finding.step for finding in findings if finding.sign == "falling"]

    (early,) = falls(True)
    (late,) = falls(False)
    assert early < 15
    assert late > 25


def test_a_sign_that_comes_and_goes_is_none_and_one_that_comes_back_is_noticed_again() -> None:
    judge = Judge(RULES)
    sick = SICK["drifting"]
    for _ in range(10):
        assert told(judge, *[sick] * (RULES.patience - 1), HEALTHY) == []
    for _ in range(2):
        assert signs(told(judge, *[sick] * 10, HEALTHY)) == ["drifting"]


def test_one_code_has_no_sign_that_speaks_of_several() -> None:
    for report in SICK.values():
        single = replace(
            report, num_codes=1, perplexity=1.0, dead=(), duplicates=None, closest=None, separation=math.nan
        )
        findings = told(Judge(RULES), *[HEALTHY] * 3, *[single] * 10)
        assert not {"above_critical", "falling", "merged", "uniform", "dead", "few_codes"} & set(signs(findings))


# Harm of their own: codes or assignments that tell next to nothing of the tokens.
HARMFUL = ("non_finite", "uniform", "few_codes")


@pytest.mark.parametrize("sign", HARMFUL)
def test_codes_that_tell_nothing_are_an_alarm_by_themselves(sign: str) -> None:
    judge = Judge(RULES)
    told(judge, *[replace(HEALTHY, bank=bank(0.1))] * 5)
    assert signs(told(judge, *[SICK[sign]] * 50), "alarm") == [sign]


@pytest.mark.parametrize("sign", [sign for sign in SICK if sign not in HARMFUL])
def test_a_sign_alone_is_never_an_alarm(sign: str) -> None:
    judge = Judge(RULES)
    told(judge, *[replace(HEALTHY, bank=bank(0.1))] * 5)
    assert signs(told(judge, *[SICK[sign]] * 50), "alarm") == []


@pytest.mark.parametrize("sign", SICK)
def test_a_sign_beside_codes_that_tell_less_of_the_probe_is_an_alarm_once(sign: str) -> None:
    judge = Judge(RULES)
    told(judge, *[replace(HEALTHY, bank=bank(0.1))] * 5)
    findings = told(judge, *[replace(SICK[sign], explained=0.01)] * 50)
    alarms = [finding.text for finding in findings if finding.level == "alarm"]
    assert all("Harm: " in text for text in alarms)
    assert len(alarms) == 1 + (sign == "non_finite" or "ln K = 2.1 nats" in alarms[0])
    if sign != "non_finite":
        assert "1% of the probe's first variance, at best 60%" in alarms[-1]


def test_codes_that_tell_less_of_the_probe_without_a_sign_are_no_alarm() -> None:
    judge = Judge(RULES)
    assert told(judge, *[HEALTHY] * 5, *[replace(HEALTHY, explained=0.01)] * 50) == []


def test_values_that_are_no_numbers_are_an_alarm_at_once() -> None:
    judge = Judge(RULES)
    assert signs(told(judge, HEALTHY, SICK["non_finite"]), "alarm") == ["non_finite"]


def test_flat_tokens_beside_a_loss_that_rises_are_an_alarm() -> None:
    judge = Judge(RULES)
    for n in range(30):
        assert told(judge, HEALTHY, loss=2.0 - n / 30) == []
    findings = [finding for n in range(30) for finding in told(judge, SICK["flat"], loss=1.0 + n / 10)]
    assert signs(findings) == ["flat"]
    assert signs(findings, "alarm") == ["flat"]


def test_flat_tokens_beside_a_loss_that_falls_are_no_alarm() -> None:
    judge = Judge(RULES)
    findings = [
        finding for n in range(60) for finding in told(judge, HEALTHY if n < 10 else SICK["flat"], loss=2 * 0.9**n)
    ]
    assert signs(findings, "alarm") == []


def test_few_codes_that_become_more_from_reading_to_reading_are_no_alarm() -> None:
    """Counts reach back to the start; those that stay few, or become fewer, are one."""

    def alarms(*perplexities: float) -> list[str]:
        judge = Judge(RULES)
        course = [replace(HEALTHY, num_codes=64, perplexity=value) for value in perplexities]
        unknown = [replace(report, dead=None) for report in course[:5]]
        return signs(told(judge, *unknown, *course[5:]), "alarm")

    recovering = [3.0, 2.5, 2.0, 2.1, 2.2, 2.3, 2.5, 2.7, 3.0, 4.0, 8.0, 16.0, 30.0]
    assert alarms(*recovering) == []
    assert alarms(*[2.3] * 10) == ["few_codes"]
    assert alarms(*[2.8 - 0.1 * n for n in range(10)]) == ["few_codes"]
    assert alarms(*recovering, *[2.0] * 3) == ["few_codes"]
    assert alarms(*[2.0] * 8, 2.1, 2.2, 2.3, 2.4, *[2.2] * 8) == ["few_codes"]  # once


def test_the_numbers_of_a_loss_that_rises_are_those_that_were_judged() -> None:
    judge = Judge(RULES)
    for n in range(30):
        told(judge, HEALTHY, loss=2.0 - n / 30)
    told(judge, *[SICK["flat"]] * 3, loss=1.03)
    (alarm,) = [find for find in told(judge, *[SICK["flat"]] * 9, loss=900.0) if find.level == "alarm"]
    assert re.search(r"risen again from 1\.\d+ to \d+\.?\d*, above its first value 2\.", alarm.text), alarm.text
    assert "%" not in alarm.text.partition("Harm")[2]


def test_indices_out_of_range_are_told_apart_from_values_that_are_no_numbers() -> None:
    findings = told(Judge(RULES), replace(HEALTHY, non_finite=3, out_of_range=3))
    assert {finding.sign for finding in findings} == {"non_finite"}
    assert all("3 indices were neither in [0, 8) nor -1" in finding.text for finding in findings)
    assert not any("NaN" in finding.text for finding in findings)
    both = told(Judge(RULES), replace(HEALTHY, non_finite=5, out_of_range=3))
    assert "2 tokens or codes were NaN or infinite" in both[0].text


def test_a_number_that_is_not_known_now_is_not_judged_by_the_one_before() -> None:
    past = HeadHistory()
    for report in (HEALTHY, replace(HEALTHY, token_rank=1.0), replace(HEALTHY, token_rank=math.nan)):
        past.add(report)
    assert math.isnan(past.share_of_best("token_rank"))


def course_of_annealing(start: float, end: float, readings: int = 30) -> list[CodebookReport]:
    """From one point above T_c to prototypes that split."""
    reports = []
    for n in range(readings):
        ratio = start * (end / start) ** (n / (readings - 1))
        apart = max(1 - ratio, 0.0)
        report = replace(HEALTHY, duplicates=8 if ratio > 0.9 else 0, separation=apart, bank=bank(ratio, apart))
        reports.append(report)
    return reports


def test_a_planned_annealing_from_above_is_no_sign_until_it_has_ended() -> None:
    judge = Judge(RULES)
    assert told(judge, *course_of_annealing(2.0, 0.05), planned_end={"book": 0.05}) == []
    assert signs(told(judge, *[replace(merged(8), bank=bank(0.05, 1e-4))] * 30, planned_end={"book": 0.05}))


def test_annealing_that_is_not_planned_or_ends_above_is_a_sign() -> None:
    above = [replace(merged(8), bank=bank(2.0, 1e-4))] * 10
    for ends in ({}, {"book": 1.5}, {"another": 0.05}):
        assert "above_critical" in signs(told(Judge(RULES), *above, planned_end=ends))


def test_a_temperature_that_rises_above_later_is_a_sign_also_with_a_schedule() -> None:
    judge = Judge(RULES)
    below, above = replace(HEALTHY, bank=bank(0.1)), replace(HEALTHY, bank=bank(2.0))
    assert "above_critical" in signs(told(judge, below, *[above] * 10, planned_end={"book": 0.05}))


def test_histories_start_anew_for_a_codebook_and_its_heads_that_are_forgotten() -> None:
    judge = Judge(RULES)
    names = ("a", "a/head0", "a/head1", "ab", "b/head0")
    judge.judge(0, dict.fromkeys(names, HEALTHY))
    judge.forget("a")
    assert list(judge.histories) == ["ab", "b/head0"]
    assert signs(told(judge, *[SICK["flat"]] * 10)) == []  # it was never better


def test_codebooks_are_judged_one_by_one() -> None:
    judge = Judge(RULES)
    for step in range(20):
        judge.judge(step, {"good": HEALTHY, "bad": HEALTHY if step < 5 else SICK["flat"]})
    assert {finding.codebook for finding in judge.findings} == {"bad"}


@pytest.mark.parametrize("at", range(1, 40, 5))
def test_a_judge_restored_from_a_file_finds_what_the_whole_one_does(at: int) -> None:
    sick = replace(SICK["flat"], explained=0.1)
    course = [*course_of_annealing(2.0, 0.05, 15), *[HEALTHY] * 5, *[sick] * 20]

    def run(judge: Judge, first: int, last: int) -> Judge:
        for step in range(first, last):
            judge.judge(step, {"book": course[step]}, 1.0 / (step + 1), planned_end={"book": 0.05})
        return judge

    whole, first = run(Judge(RULES), 0, 40), run(Judge(RULES), 0, at)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    run(first, at, 40)  # what goes on leaves what was saved alone
    file.seek(0)
    resumed = Judge(RULES)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, at, 40)
    assert whole.findings
    assert resumed.findings == whole.findings
    assert resumed.histories == whole.histories
    assert resumed.loss == whole.loss


def test_a_state_is_a_copy_that_later_readings_leave_alone() -> None:
    judge = Judge(RULES)
    told(judge, *[HEALTHY] * 3)
    state = judge.state_dict()
    kept = repr(state)
    told(judge, *[SICK["flat"]] * 10, loss=1.0)
    assert repr(state) == kept
    other = Judge(RULES)
    other.load_state_dict(state)
    told(other, *[SICK["flat"]] * 10, loss=1.0)
    assert repr(state) == kept


def test_a_history_keeps_the_first_best_and_latest_values_that_are_finite() -> None:
    past = HeadHistory()
    for value in (math.nan, 2.0, 5.0, math.inf, 3.0):
        past.add(replace(HEALTHY, token_rank=value))
    assert (past.first["token_rank"], past.best["token_rank"]) == (2.0, 5.0)
    assert past.recent["token_rank"] == [2.0, 5.0, 3.0]
    assert past.share_of_best("token_rank") == pytest.approx(0.6)
    assert math.isnan(past.share_of_best("delta"))
    for _ in range(2 * TREND_READINGS):
        past.add(HEALTHY)
    assert len(past.recent["token_rank"]) == TREND_READINGS
    assert past.readings == 5 + 2 * TREND_READINGS
    assert histories_from({"book": past.state_dict()}) == {"book": past}


def test_the_loss_remembers_its_lowest_and_what_it_has_risen_since() -> None:
    loss = LossHistory()
    assert math.isnan(loss.regain)
    for value in (4.0, 3.0, 2.0, 1.0, math.nan, *[0.0] * 40):
        loss.add(value)
    assert loss.first == 4.0
    assert loss.lowest == pytest.approx(0, abs=0.1)
    assert loss.regain == pytest.approx(0, abs=0.02)
    for _ in range(40):
        loss.add(2.0)
    assert loss.regain == pytest.approx(0.5, abs=0.02)
    assert loss.since_lowest >= 40
    assert loss.readings == 4 + 1 + 40 + 40


def test_trend_is_the_slope_of_the_least_squares_line() -> None:
    assert trend([]) == trend([1.0]) == 0.0
    assert trend([3.0, 2.5, 2.0]) == pytest.approx(-0.5)
    assert trend([math.log(2)] * 5) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("max_drop", 0.0, r"max_drop must be in \(0, 1\]; got 0.0"),
        ("max_entropy", 1.1, r"max_entropy must be in \(0, 1\]; got 1.1"),
        ("min_rank", 0.0, "min_rank must be in"),
        ("min_perplexity", 2.0, "min_perplexity must be in"),
        ("min_explained", 0.0, "min_explained must be in"),
        ("duplicate_distance", -1.0, "duplicate_distance must be >= 0; got -1.0"),
        ("max_dead", math.nan, "max_dead must be a finite number; got nan"),
        ("max_extent", -0.1, "max_extent must be >= 0"),
        ("max_regain", -0.1, "max_regain must be >= 0"),
        ("patience", 0, "patience must be at least 1; got 0"),
    ],
)
def test_rules_refuse_numbers_out_of_their_range(argument: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseRules(**{argument: value})


def test_the_verdict_names_the_first_step_of_each_alarm_the_earliest_alarm_first() -> None:
    findings = [
        Finding("alarm", sign, "book", step, "")
        for sign, step in (("dead", 30), ("falling", 10), ("few_codes", 20), ("falling", 40), ("dead", 50))
    ]
    line = verdict("book", HEALTHY, findings, [])
    assert "; ALARM: falling at step 10, then few_codes at step 20, then dead at step 30" in line


def test_an_alarm_is_of_the_sign_that_came_first() -> None:
    judge = Judge(RULES)
    told(judge, *[replace(HEALTHY, bank=bank(0.1))] * 3)
    late = replace(HEALTHY, extent=1e4, bank=bank(0.1))
    told(judge, *[late] * 5)
    (alarm,) = (
        finding
        for finding in told(judge, *[replace(late, token_rank=1.0, explained=0.01)] * 5)
        if finding.level == "alarm"
    )
    assert alarm.sign == "diverging"  # `flat` comes first in the list of signs
