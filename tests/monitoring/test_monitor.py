"""The numbers of a monitor's report, on examples that can be counted by hand."""

import copy
import gc
import math
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ddcl_lightning import CodebookMonitor, CollapseRules, DDCLAttention, PrototypeBank, VectorQuantizer
from ddcl_lightning.monitoring.code_window import SAMPLE
from tests.processes import results_of_processes

TOKENS = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
CODES = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
INDICES = torch.tensor([0, 1, 2, 2])


def fed(
    tokens: Tensor | None = TOKENS,
    codes: Tensor | None = CODES,
    indices: Tensor = INDICES,
    times: int = 50,
    **kwargs: Any,
) -> CodebookMonitor:
    monitor = CodebookMonitor()
    for _ in range(times):
        monitor.update(tokens, codes, indices, **kwargs)
    return monitor


def test_report_is_right_on_an_example_counted_by_hand() -> None:
    row = fed().report()["codebook"]
    assert (row.num_codes, row.num_tokens, row.usage, row.dead) == (4, 200, 0.75, (3,))
    assert row.perplexity == pytest.approx(2**1.5)  # a quarter, a quarter and a half
    assert (row.separation, row.closest, row.duplicates) == (0.0, (2, 3), 2)
    assert row.token_rank == pytest.approx(2)
    assert row.code_rank == pytest.approx(2)
    assert row.commitment == pytest.approx((1 + 1 + 1 + 9) / 4 / 4)  # the variance is 4
    assert row.non_finite == 0


def test_separation_is_relative_to_the_spread_of_tokens() -> None:
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
    assert fed(codes=codes).report()["codebook"].separation == pytest.approx(0.25)
    assert fed(10 * TOKENS, 10 * codes).report()["codebook"].separation == pytest.approx(0.25)
    codes[3, 1] = 0.97
    assert fed(codes=codes).report()["codebook"].duplicates == 2
    monitor = CodebookMonitor(rules=CollapseRules(duplicate_distance=0.01))
    monitor.update(TOKENS, codes, INDICES)
    assert monitor.report()["codebook"].duplicates == 0


def test_cosine_geometry_sees_directions_only() -> None:
    lengths = torch.tensor([[1.0], [5.0], [0.1], [3.0]])
    row = fed(TOKENS * lengths, CODES * lengths, geometry="cosine").report()["codebook"]
    plain = fed(TOKENS / 2, CODES).report()["codebook"]
    assert row.separation == pytest.approx(plain.separation)
    assert row.commitment == pytest.approx((0 + 0 + 0 + 4) / 4)
    assert row.token_rank == pytest.approx(2)


def test_codes_are_dead_only_after_enough_tokens() -> None:
    assert fed(times=49).report()["codebook"].dead is None
    assert fed(times=50).report()["codebook"].dead == (3,)


def test_a_stream_in_the_order_of_classes_has_no_dead_code_before_a_whole_pass() -> None:
    monitor = CodebookMonitor(tokens_per_pass=4000)
    for step in range(120):
        code = step // 10 % 4  # a thousand tokens of each
        monitor.update(None, CODES, torch.full((100,), code))
        dead = monitor.report()["codebook"].dead
        assert dead is None if step < 39 else dead == ()
    short = CodebookMonitor()
    for step in range(30):
        short.update(None, CODES, torch.full((100,), step // 10))
    assert short.report()["codebook"].dead  # a window of 200 tokens cannot know


def test_a_code_that_is_no_longer_used_is_dead_after_a_window() -> None:
    monitor = fed(indices=torch.arange(4), times=100)
    assert monitor.report()["codebook"].dead == ()
    for _ in range(100):
        monitor.update(TOKENS, CODES, INDICES)
    assert monitor.report()["codebook"].dead == (3,)


def test_the_monitor_is_of_bounded_size() -> None:
    monitor = CodebookMonitor()
    sizes = []
    for _ in range(60):
        monitor.update(torch.randn(500, 2), CODES, torch.randint(4, (500,)))
        sizes.append(len(pickle.dumps(monitor._windows)))
    assert max(sizes[30:]) <= max(sizes[:30])
    assert monitor.report()["codebook"].num_tokens <= 2 * 500
    assert max(sizes) < 4 * 2 * SAMPLE * 3 * 4


def test_the_sample_follows_tokens_that_change() -> None:
    """Also where the counts of a pass reach back to the tokens before."""
    monitor = CodebookMonitor(tokens_per_pass=4000)
    for scale, calls in ((1.0, 20), (0.0, 11)):
        for _ in range(calls):
            monitor.update(torch.randn(200, 2) * scale + 1.0, CODES, torch.randint(4, (200,)))
    row = monitor.report()["codebook"]
    assert row.num_tokens == 6200
    assert row.token_rank == pytest.approx(1, abs=1e-3)


def test_padding_counts_nowhere() -> None:
    tokens = torch.cat([TOKENS, torch.full((2, 2), math.nan)])
    indices = torch.cat([INDICES, torch.tensor([3, 3])])
    mask = torch.arange(6) < 4
    expected = repr(fed().report()["codebook"])  # by what it says: NaN equals nothing
    assert repr(fed(tokens, indices=indices, mask=mask).report()["codebook"]) == expected
    assert repr(fed(tokens, indices=indices.masked_fill(~mask, -1)).report()["codebook"]) == expected


def test_heads_are_reported_one_by_one() -> None:
    report = fed(
        torch.cat([TOKENS, TOKENS], 1),
        torch.stack([CODES, CODES]),
        torch.stack([INDICES, torch.zeros_like(INDICES)], 1),
    ).report()
    assert list(report) == ["codebook/head0", "codebook/head1"]
    assert repr(report["codebook/head0"]) == repr(fed().report()["codebook"])
    assert (report["codebook/head1"].usage, report["codebook/head1"].dead) == (0.25, (1, 2, 3))


def test_implicit_codebooks_have_usage_and_perplexity_only() -> None:
    row = fed(None, None, num_codes=4).report()["codebook"]
    assert (row.usage, row.perplexity, row.dead) == (0.75, pytest.approx(2**1.5), (3,))
    assert all(math.isnan(value) for value in (row.separation, row.token_rank, row.code_rank, row.commitment))
    assert row.duplicates is None
    with pytest.raises(ValueError, match="num_codes must be given for a codebook without vectors"):
        fed(None, None)


def test_values_that_are_not_finite_are_counted_and_leave_the_rest_alone() -> None:
    tokens, codes = TOKENS.clone(), CODES.clone()
    tokens[0, 1], codes[1] = math.nan, math.inf
    row = fed(tokens, codes, torch.tensor([0, 1, 2, 7]), times=3).report()["codebook"]
    assert row.non_finite == 3 + 3 + 1  # a token and a code that is none, three times, and a vector
    assert math.isfinite(row.token_rank)
    assert row.num_tokens == 9


def test_one_code_has_no_separation_and_equal_tokens_no_commitment() -> None:
    row = fed(torch.ones(4, 2), CODES[:1], torch.zeros(4, dtype=torch.int64)).report()["codebook"]
    assert math.isnan(row.separation)
    assert math.isnan(row.commitment)
    assert (row.usage, row.token_rank) == (1.0, pytest.approx(1))


def test_a_table_names_every_codebook_and_what_is_not_known() -> None:
    monitor = fed()
    monitor.update(None, None, INDICES, name="fsq", num_codes=4)
    head, first, second = str(monitor.report()).splitlines()
    assert head.split("  ")[0] == "codebook"
    assert "75.0%" in first
    assert "1 (3)" in first
    assert second.startswith("fsq ")
    assert second.count(" -") == 6
    assert str(CodebookMonitor().report()) == "no codebook was called"


def test_a_model_is_watched_without_a_change_to_it() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"bank": DDCLAttention(8, 4), "vq": VectorQuantizer(8, 6)})
    plain, states = copy.deepcopy(model), len(pickle.dumps(model))
    monitor = CodebookMonitor(model, every_n_calls=3)
    assert list(monitor.codebooks) == ["bank.bank", "vq"]
    assert len(pickle.dumps(model)) == states
    for _ in range(9):
        values = torch.randn(2, 10, 8)
        watched, alone = model["vq"](values), plain["vq"](values)
        assert torch.equal(watched.quantized, alone.quantized)
        model["bank"].bank.quantize(values)
    monitor.armed = False
    model["vq"](values)
    monitor.armed = True
    rows = monitor.report()
    assert {name: row.num_tokens for name, row in rows.items()} == {"bank.bank": 60, "vq": 60}
    monitor.reset()
    monitor.close()
    model["vq"](values)
    assert not monitor.report()


def test_a_monitor_that_is_gone_leaves_the_class_as_it_was() -> None:
    forward, model = VectorQuantizer.forward, VectorQuantizer(4, 3)
    monitor = CodebookMonitor(model)
    assert VectorQuantizer.forward is not forward
    del monitor
    gc.collect()
    assert VectorQuantizer.forward is forward


def test_a_module_that_holds_its_monitor_can_be_copied_and_pickled() -> None:
    model = nn.Sequential(VectorQuantizer(2, 4))
    model.monitor = CodebookMonitor(model, every_n_calls=1)
    model(TOKENS[None])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.monitor.report()["0"].num_tokens == 4
        twin(TOKENS[None])
        twin.monitor.close()
        assert twin.monitor.report()["0"].num_tokens == 4
    model(TOKENS[None])
    assert model.monitor.report()["0"].num_tokens == 8
    model.monitor.close()


def test_one_in_so_many_calls_is_not_always_that_of_one_level() -> None:
    """Two calls a step, as of levels that share a codebook, and every second call is read."""
    model = VectorQuantizer(2, 4)
    monitor = CodebookMonitor(model, every_n_calls=2)
    with torch.no_grad():
        model.codebook.copy_(CODES + 0.1 * torch.arange(4).unsqueeze(1))
    for _ in range(8):
        model(TOKENS[None, :1])
        model(TOKENS[None, 1:2])
    assert monitor.report()[""].usage == 0.5


def test_monitor_refuses_a_model_without_codebooks() -> None:
    with pytest.raises(ValueError, match=r"got none in Linear. Name its module \(named="):
        CodebookMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every_n_calls must be at least 1; got 0"):
        CodebookMonitor(every_n_calls=0)
    with pytest.raises(ValueError, match="duplicate_distance must be >= 0; got -1"):
        CollapseRules(duplicate_distance=-1)
    with pytest.raises(TypeError, match=r"codes must be integers; got torch.float32"):
        CodebookMonitor().update(TOKENS, CODES, INDICES.float())
    with pytest.raises(ValueError, match=r"codebook must hold at least one code; got shape \(1, 0, 2\)"):
        CodebookMonitor().update(TOKENS, CODES[:0], INDICES)
    with pytest.raises(ValueError, match=r"tokens must be as many as codes"):
        CodebookMonitor().update(TOKENS, CODES, INDICES[:3])


BROKEN = {
    "codes": lambda tokens, codes: codes.fill_(math.nan),
    "tokens": lambda tokens, codes: tokens.fill_(math.nan),
    "both": lambda tokens, codes: (codes.fill_(math.inf), tokens.fill_(math.nan)),
    "one code": lambda tokens, codes: codes[..., 3, :].fill_(math.nan),
    "all but one code": lambda tokens, codes: codes[..., 1:, :].fill_(-math.inf),
    "huge tokens": lambda tokens, codes: tokens.mul_(1e36),
    "huge codes": lambda tokens, codes: codes.mul_(1e36),
    "equal tokens": lambda tokens, codes: tokens.zero_(),
    "equal codes": lambda tokens, codes: codes.zero_(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_no_reading_fails_whatever_becomes_of_tokens_and_codes(kind: str) -> None:
    """Also once Delta has fallen; what is no number is an alarm."""
    torch.manual_seed(0)
    start, monitor = torch.randn(32, 8), CodebookMonitor(on_collapse="ignore")
    for step in range(20):
        tokens, codes = torch.randn(500, 8) * (1 + step), start.clone()
        if step >= 12:
            BROKEN[kind](tokens, codes)
        monitor.update(tokens, codes, torch.cdist(tokens, codes).argmin(1))
        monitor.check(1.0)
        str(monitor.report()), monitor.verdict()
    alarms = {finding.sign for finding in monitor.findings if finding.level == "alarm"}
    assert ("non_finite" in alarms) == (kind in ("codes", "tokens", "both", "one code", "all but one code"))


@pytest.mark.parametrize("kind", BROKEN)
def test_no_reading_of_a_bank_fails_whatever_becomes_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)  # as on a GPU
    torch.manual_seed(0)
    bank = PrototypeBank(8, 4)
    start = bank.prototypes.detach().clone()
    monitor = CodebookMonitor(bank, every_n_calls=1, on_collapse="ignore")
    for step in range(10):
        tokens, codes = torch.randn(1, 300, 4) * (1 + step), start.clone()
        if step >= 6:
            BROKEN[kind](tokens, codes)
        with torch.no_grad():
            bank.prototypes.copy_(codes)
            bank(tokens)
        monitor.check()
    str(monitor.report()), monitor.verdict()
    monitor.close()


def test_a_codebook_of_another_dimension_starts_anew() -> None:
    monitor = CodebookMonitor(on_collapse="ignore")
    for dim in (4, 6):
        for _ in range(3):
            monitor.update(torch.randn(50, dim), torch.randn(3, dim), torch.zeros(50, dtype=torch.int64))
            monitor.check()
    row = monitor.report()["codebook"]
    assert (row.dim, row.num_tokens) == (6, 150)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)])
def test_empty_codes_of_one_and_none_are_read(shape: tuple[int, int]) -> None:
    number = shape[0]
    monitor = CodebookMonitor(on_collapse="ignore")
    for _ in range(8):
        monitor.update(torch.randn(shape), torch.randn(1, shape[1]), torch.zeros(number, dtype=torch.int64))
        monitor.check(1.0)
    assert monitor.report()["codebook"].num_tokens == 8 * number
    assert monitor.verdict()


def test_the_verdict_says_how_many_tokens_are_still_missing() -> None:
    monitor = fed(times=20)
    monitor.check()
    assert monitor.verdict() == "codebook: perplexity 2.8 of 4; too few tokens read to say (80 of 200)"
    for _ in range(40):
        monitor.update(TOKENS, torch.randn(4, 2), torch.arange(4))
    monitor.check()
    assert monitor.verdict().endswith("; no sign of a collapse")


@pytest.mark.parametrize("period", [2, 7, 10, 11, 20])
def test_domains_that_take_turns_are_read_evenly(period: int) -> None:
    codes = torch.arange(4 * period).float().unsqueeze(1)
    model = nn.ModuleDict({"quantizer": nn.Identity()})
    monitor = CodebookMonitor(model, {"quantizer": lambda module, inputs, output: (None, codes, inputs[0])})
    for step in range(30 * 10 * period):
        model["quantizer"](4 * (step % period) + torch.arange(4).repeat(4))
    row = monitor.report()["quantizer"]
    assert row.usage == 1
    assert row.perplexity > 3.9 * period
    monitor.close()


def test_a_resumed_monitor_reads_the_calls_that_the_whole_one_does() -> None:
    def read(monitor: CodebookMonitor, model: nn.Module, steps: range) -> None:
        for step in steps:
            model["quantizer"](torch.full((1,), step))

    def made() -> tuple[CodebookMonitor, nn.Module, list[int]]:
        calls: list[int] = []
        model = nn.ModuleDict({"quantizer": nn.Identity()})

        def reader(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> tuple[None, Tensor, Tensor]:
            calls.append(int(inputs[0]))
            return None, torch.zeros(4, 1), inputs[0] % 4

        return CodebookMonitor(model, {"quantizer": reader}, every_n_calls=7), model, calls

    (whole, model, expected), (first, its_model, calls) = made(), made()
    read(whole, model, range(200))
    read(first, its_model, range(60))
    resumed, other, rest = made()
    resumed.load_state_dict(first.state_dict())
    read(resumed, other, range(60, 200))
    assert calls + rest == expected
    assert expected[0] == 0
    assert len(expected) in (28, 29)


def test_a_pass_is_counted_in_the_tokens_that_are_read_of_it() -> None:
    """One call in four of 40 with 25 tokens each: a code of the second half is known before it counts as dead."""
    model = VectorQuantizer(2, 4).eval()
    with torch.no_grad():
        model.codebook.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]))
    monitor = CodebookMonitor(model, every_n_calls=4, tokens_per_pass=2000)
    dead = []
    for step in range(160):
        model(torch.tensor([[1.0, 0.0], [0.0, 1.0]])[step // 40 % 2].expand(1, 25, 2))
        dead.append(monitor.report()[""].dead)
    assert all(known is None for known in dead[:75])
    assert dead[85] == (1, 3)
    monitor.close()


def share_of_a_process(rank: int) -> dict[str, dict[str, Any]]:
    monitor = CodebookMonitor()
    for _ in range(50):
        monitor.update(TOKENS[rank::2], CODES, INDICES[rank::2])
    if rank == 0:
        monitor.update(TOKENS, CODES, INDICES, name="of one process")
    return {name: asdict(row) for name, row in monitor.report().items()}


@pytest.mark.slow
def test_report_of_two_processes_is_that_of_all_tokens(tmp_path: Path) -> None:
    first, second = results_of_processes(tmp_path, share_of_a_process)
    assert repr(first) == repr(second)  # NaN too
    assert list(first) == ["codebook"]
    for key, value in asdict(fed().report()["codebook"]).items():
        expected = pytest.approx(value, nan_ok=True) if isinstance(value, float) else value
        assert first["codebook"][key] == expected or key == "farthest"  # there are several


def at_scale(scale: float, geometry: Literal["euclidean", "cosine"], dtype: torch.dtype) -> CodebookMonitor:
    """Healthy codes at a scale."""
    generator = torch.Generator().manual_seed(0)
    monitor = CodebookMonitor(every_n_calls=1, on_collapse="ignore")
    centers = 3 * torch.randn(8, 4, dtype=torch.float64, generator=generator)
    for _ in range(10):
        codes = torch.randint(8, (256,), generator=generator)
        tokens = centers[codes] + 0.3 * torch.randn(256, 4, dtype=torch.float64, generator=generator)
        monitor.update((tokens * scale).to(dtype), (centers * scale).to(dtype), codes, geometry=geometry)
        monitor.check()
    return monitor


@pytest.mark.parametrize("geometry", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((scale, torch.float32) for scale in (1e37, 1e30, 1e19, 1e-13, 1e-23, 1e-30, 1e-40)),
        *((scale, torch.float64) for scale in (1e200, 1e39, 1e-60, 1e-200)),
    ],
)
def test_numbers_are_free_of_the_scale_of_the_tokens(
    geometry: Literal["euclidean", "cosine"], scale: float, dtype: torch.dtype
) -> None:
    monitor, expected = at_scale(scale, geometry, dtype), at_scale(1.0, geometry, torch.float64).latest["codebook"]
    assert monitor.findings == []
    row = monitor.latest["codebook"]
    for name in ("separation", "token_rank", "code_rank", "commitment", "extent", "duplicates", "closest"):
        assert getattr(row, name) == pytest.approx(getattr(expected, name), rel=1e-3), name
    unit = 1.0 if geometry == "cosine" else scale
    assert row.spread == pytest.approx(unit * expected.spread, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-20, 1e-30])
def test_a_bank_that_cannot_hold_squared_distances_gets_one_notice_that_says_so(scale: float) -> None:
    layer, centers = DDCLAttention(4, 8), 3 * torch.randn(8, 4)
    monitor = CodebookMonitor(layer, every_n_calls=1, on_collapse="ignore")
    layer.bank.initialize((centers.repeat(8, 1) + 0.3 * torch.randn(64, 4)).unsqueeze(0) * scale)
    for _ in range(15):
        layer((centers.repeat(32, 1) + 0.3 * torch.randn(256, 4)).unsqueeze(0) * scale)
        monitor.check()
    (notice,) = monitor.findings
    assert (notice.level, notice.sign) == ("notice", "out_of_scale")
    assert "Scale the tokens" in notice.text


def test_squared_distances_of_an_older_state_are_taken_over() -> None:
    monitor = fed()
    state = monitor.state_dict()
    window = state["windows"]["codebook"]
    del window["distances"]
    for rows in window["sample"]:
        rows[..., -1].square_()
    restored = CodebookMonitor()
    restored.load_state_dict(state)
    assert restored.report()["codebook"].commitment == pytest.approx(monitor.report()["codebook"].commitment)
