"""What signs say: numbers that were judged, and remedies that somebody with such codes can follow."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ddcl_lightning import CodebookMonitor, CollapseRules, PrototypeBank, VectorQuantizer, find_codebooks
from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory
from ddcl_lightning.monitoring.remedies import BANK, FIXED, GENERIC, sentence
from ddcl_lightning.monitoring.signals import HeadSignals
from ddcl_lightning.monitoring.signs import SIGNS, dead, drifting, falling, few_codes

RULES = CollapseRules()
HEALTHY = CodebookReport(8, 1000, 1.0, 7.5, (), 1.0, (2, 5), 0, 8.0, 7.0, 16, 1.0, 0.3, 2.0, 3)


def text_of_falling(*readings: tuple[float, float], ratios: tuple[float, ...] = ()) -> str:
    """Of readings of a distance of the closest codes and a spread; of a bank with ratios T / T_c."""
    past = HeadHistory()
    for number, (distance, spread) in enumerate(readings):
        report = replace(HEALTHY, separation=distance / spread, spread=spread)
        if ratios:
            counts, ratio = torch.full((8,), 9), ratios[number]
            bank = HeadSignals(distance, distance, (2, 5), spread, 8.0, ratio, 1.0, 1.0, 8, counts / 72, counts)
            report = replace(report, bank=bank, advice=BANK)
        past.add(report)
    return falling(report, past, RULES)


def test_falling_says_what_fell_of_a_distance_and_a_spread_since_the_best() -> None:
    text = text_of_falling((1.0, 1.0), (1.1, 2.0), (1.2, 4.0))
    assert (
        "fell to 0.3 of its highest value 1; since then the smallest distance of two codes went from 1 to 1.2" in text
    )
    assert "the spread from 1 to 4: the tokens spread, and the codes stay behind" in text
    text = text_of_falling((1.0, 1.0), (0.5, 1.1), (0.3, 1.2))
    assert "the smallest distance of two codes went from 1 to 0.3, and the spread from 1 to 1.2: codes 2 and 5" in text


def test_falling_compares_the_spread_with_that_at_the_best_and_not_the_first() -> None:
    text = text_of_falling((2.0, 2.0), (8.0, 5.0), (2.0, 4.0), (1.0, 3.0))
    assert "the spread from 5 to 3: the tokens shrink too" in text
    text = text_of_falling((2.0, 1.0), (3.8, 2.0), (2.0, 1.9), (0.5, 2.0))
    assert "from 1 to 2" in text


def test_falling_of_a_bank_blames_the_temperature_only_where_it_has_risen() -> None:
    course = ((1.0, 1.0), (0.6, 1.0), (0.3, 1.0))
    hot, cold = (text_of_falling(*course, ratios=ratios) for ratios in ((0.1, 0.5, 0.9), (0.5, 0.3, 0.1)))
    assert hot.startswith("Delta fell to 0.3 of its highest value 1;")
    assert "T / T_c rose from 0.1 to 0.9" in hot
    assert "Lower the temperature" in hot
    assert "temperature" not in cold.lower()
    assert "not measured" in cold


def test_no_sign_fails_or_prints_a_missing_number_whatever_is_not_known() -> None:
    fields = ("perplexity", "separation", "token_rank", "code_rank", "spread", "commitment", "extent", "explained")
    for lost in (fields, *((field,) for field in fields)):
        past = HeadHistory()
        for n in range(8):
            past.add(replace(HEALTHY, separation=0.5**n, spread=2.0**n, token_rank=8 * 0.5**n, code_rank=7 * 0.5**n))
        now = replace(HEALTHY, closest=None, farthest=None, duplicates=None, dead=None, non_finite=3)
        now = replace(now, **dict.fromkeys(lost, math.nan))
        past.add(now)
        for sign in SIGNS.values():
            assert not re.search(r"\bnan\b|None", sign(now, past, RULES))


class VQGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)


def named_vqgan() -> nn.Module:
    return nn.Sequential(VQGAN())


def library(kind: str, **arguments: Any) -> nn.Module:
    return getattr(pytest.importorskip("vector_quantize_pytorch"), kind)(**arguments)


KINDS = {
    "FSQ": (lambda: library("FSQ", levels=[8, 5]), "kmeans|learning rate of the codes|dead codes|ema", "fewer levels"),
    "LFQ": (
        lambda: library("LFQ", codebook_size=8, dim=3),
        "kmeans|of the codes|dead codes|ema",
        "entropy_loss_weight",
    ),
    "SimVQ": (lambda: library("SimVQ", dim=4, codebook_size=8), "kmeans|ema_dead", "codebook_size"),
    "VectorQuantize": (
        lambda: library("VectorQuantize", dim=4, codebook_size=8),
        "KMeansInitialization",
        r"kmeans_init=True.*threshold_ema_dead_code=2",
    ),
    "VectorQuantize, set": (
        lambda: library("VectorQuantize", dim=4, codebook_size=8, kmeans_init=True, threshold_ema_dead_code=2),
        "kmeans|ema_dead",
        "codebook_size",
    ),
    "nn.Embedding": (named_vqgan, "kmeans_init|ema_dead|KMeansInitialization", "into the weight"),
    "nn.Linear": (lambda: nn.ModuleDict({"prototypes": nn.Linear(4, 8)}), "kmeans|ema_dead|from tokens", "Sinkhorn"),
    "VectorQuantizer": (lambda: VectorQuantizer(4, 8), "kmeans_init|ema_dead", "init='kmeans'"),
    "VectorQuantizer, set": (lambda: VectorQuantizer(4, 8, init="kmeans"), "kmeans", "fewer codes"),
}
NAMED = {"nn.Embedding": ["0.embedding"], "nn.Linear": ["prototypes"]}


@pytest.mark.parametrize("kind", KINDS)
def test_remedies_can_be_followed_with_codes_of_that_kind(kind: str) -> None:
    make, never, always = KINDS[kind]
    (source,) = find_codebooks(make(), NAMED.get(kind, ())).values()
    now = replace(HEALTHY, dead=tuple(range(7)), perplexity=1.01, advice=source.advice)
    text = dead(now, HeadHistory(), RULES) + few_codes(now, HeadHistory(), RULES)
    assert not re.search(never, text), text
    assert re.search(always, text), text


def test_advice_reaches_the_finding_from_the_module() -> None:
    model = nn.Sequential(VectorQuantizer(2, 8, init="kmeans"))
    monitor = CodebookMonitor(model, every_n_calls=1, on_collapse="ignore")
    model.eval()
    for _ in range(6):
        model(torch.ones(1, 100, 2))
        monitor.check()
    texts = [finding.text for finding in monitor.findings if finding.sign in ("dead", "few_codes")]
    assert texts
    assert not any("kmeans" in text for text in texts)
    monitor.close()


def test_a_bank_has_the_advice_of_banks() -> None:
    bank = PrototypeBank(4, 2)
    monitor = CodebookMonitor(bank, every_n_calls=1)
    bank(torch.randn(1, 50, 2))
    assert monitor.report()[""].advice == BANK
    monitor.close()


def test_codes_that_have_left_the_tokens_are_not_blamed_on_the_encoder() -> None:
    text = drifting(replace(HEALTHY, commitment=50.0, extent=1e4), HeadHistory(), RULES)
    assert "encoder" not in text
    assert "Lower the learning rate of the codes, or check that an optimizer steps the codes" in text
    assert "not measured" in drifting(replace(HEALTHY, commitment=50.0), HeadHistory(), RULES)


def test_a_sentence_leaves_out_what_there_is_not() -> None:
    assert sentence("a", "", "b", "c") == "A, b, or c"
    assert sentence("", "a") == "A"
    assert sentence(FIXED.start, GENERIC.fewer) == "Use fewer codes"
