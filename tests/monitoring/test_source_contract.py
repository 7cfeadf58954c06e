"""Every kind of codebook is recognised, read as its library returns it, and left as it was."""

import contextlib
import copy
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from registry import classes
from torch import Tensor, nn

from ddcl_lightning import CodebookMonitor, CodebookRecord, CodebookSource, find_codebooks, record_codebooks
from tests.monitoring.codebook_cases import CASES, DIM, VQGAN, Anything, Student, collapse, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_that_the_library_returns(name: str) -> None:
    case = CASES[name]
    model = case.make()
    records: dict[str, CodebookRecord] = {}
    with record_codebooks(find_codebooks(model, case.named), records.__setitem__):
        expected = case.call(model)
    assert list(records) == list(expected) == list(find_codebooks(model, case.named))
    for path, codes in expected.items():
        record = records[path]
        assert record.codes is not None
        assert record.num_codes == case.num_codes
        assert torch.equal(record.codes.T.reshape(codes.shape), codes.long())
        assert (record.codebook is not None) == case.vectors
        if record.tokens is not None and record.codebook is not None:
            scores = nearness(record.tokens, record.codebook, record.geometry)
            assert torch.equal(scores.argmax(-1), record.codes)
            assert not record.tokens.requires_grad


def nearness(values: Tensor, codebook: Tensor, geometry: str) -> Tensor:
    if geometry == "cosine":
        values, codebook = (nn.functional.normalize(each.float(), dim=-1) for each in (values, codebook))
    return -torch.cdist(values.float(), codebook.float(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("name", CASES)
def test_a_collapse_shows_in_the_report_and_a_healthy_codebook_does_not(name: str) -> None:
    case = CASES[name]
    model = case.make().eval()
    with CodebookMonitor(model, case.named, every_n_calls=1) as monitor, torch.no_grad():
        for _ in range(4):
            case.call(model)
        healthy = monitor.report()
        monitor.reset()
        collapse(model)
        for _ in range(4):
            case.call(model)
        collapsed = monitor.report()
    assert healthy.keys() == collapsed.keys()
    for path, row in healthy.items():
        assert row.perplexity > 2
        assert row.duplicates in (None, 0)
        assert row.non_finite == 0
        if case.vectors:
            assert collapsed[path].duplicates == case.num_codes
            assert collapsed[path].code_rank == pytest.approx(1, abs=0.01)
        if "heads" not in name and name not in ("ResidualFSQ", "wav2vec 2.0"):
            assert collapsed[path].perplexity < 0.7 * row.perplexity


@pytest.mark.parametrize("name", CASES)
def test_a_loop_is_told_which_codebook_collapses_and_nothing_of_a_healthy_one(name: str) -> None:
    """Of every codebook a notice; an alarm where a probe can measure on its tokens."""
    case = CASES[name]
    model = case.make().eval()

    def step() -> None:
        with torch.no_grad():
            case.call(model)

    monitor = CodebookMonitor(model, case.named, every_n_calls=1, on_collapse="ignore", probe=step)
    for _ in range(6):
        step()
        # Of codes that start on tokens at random some may have none.
        assert [finding for finding in monitor.check() if finding.sign != "dead"] == []
    measured = {path for path, row in monitor.latest.items() if math.isfinite(row.explained)}
    collapse(model)
    for _ in range(14):
        step()
        monitor.check()
    findings = [finding for finding in monitor.findings if finding.step > 6]
    noticed, alarmed = (
        {finding.codebook for finding in findings if finding.level == level} for level in ("notice", "alarm")
    )
    assert noticed == set(monitor.latest)
    assert alarmed >= measured
    for path in noticed:
        assert path in monitor.verdict()
    assert "no sign" not in monitor.verdict()
    monitor.close()


@pytest.mark.parametrize("name", CASES)
def test_recording_leaves_no_trace_on_modules_copies_and_classes(name: str) -> None:
    case = CASES[name]
    model = case.make()
    before = [(dict(vars(module)).keys(), vars(type(module)).copy()) for module in model.modules()]
    pickled = b""
    with contextlib.suppress(RuntimeError):
        pickled = pickle.dumps(model)
    records: list[str] = []
    recording = record_codebooks(find_codebooks(model, case.named), lambda name, record: records.append(name))
    assert all(vars(type(module)) == kept for module, (_, kept) in zip(model.modules(), before, strict=True))
    with recording:
        assert [dict(vars(module)).keys() for module in model.modules()] == [keys for keys, _ in before]
        twin = copy.deepcopy(model)
        torch.save(model.state_dict(), io.BytesIO())
        with contextlib.suppress(RuntimeError):  # torch refuses parametrized modules
            assert pickle.dumps(model) == pickled
        case.call(twin)
        assert not records
        case.call(model)
        assert records
    number = len(records)
    case.call(model)
    assert len(records) == number
    for module, (_, kept) in zip(model.modules(), before, strict=True):
        new, old = (
            {key: value for key, value in each.items() if key[:2] != "__"} for each in (vars(type(module)), kept)
        )
        assert new == old


def test_every_kind_of_codebook_has_a_case() -> None:
    covered, missing = set(), []
    for name, case in CASES.items():
        try:
            covered |= {type(source) for source in find_codebooks(case.make(), case.named).values()}
        except pytest.skip.Exception:
            missing.append(name)
    uncovered = set(classes(CodebookSource)) - covered
    if uncovered and missing:
        pytest.skip(f"libraries of {missing} are missing")
    assert not uncovered


def test_recognition_imports_no_library(tmp_path: Path) -> None:
    """In a process that starts in another folder, beside which the installed package is imported."""
    code = (
        "import sys, torch, ddcl_lightning; before = set(sys.modules); "
        "ddcl_lightning.find_codebooks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Embedding(2, 2))); "
        "print(sorted(set(sys.modules) - before), 'vector_quantize_pytorch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == "[] False"


def test_levels_that_share_a_codebook_are_one() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    model = nn.ModuleDict({"rvq": library.ResidualVQ(dim=DIM, codebook_size=4, num_quantizers=3, shared_codebook=True)})
    calls: list[CodebookRecord] = []
    with record_codebooks(model, lambda name, record: calls.append(record)):
        output = model["rvq"](tokens())
    assert list(find_codebooks(model)) == ["rvq"]
    assert torch.equal(torch.stack([record.codes[0] for record in calls], -1), output[1].flatten(0, 1))


def test_masks_of_library_quantizers_mark_padding() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    mask = torch.rand(4, 60) < 0.5
    for model, heads in (
        (library.VectorQuantize(dim=DIM, codebook_size=4), 1),
        (library.VectorQuantize(dim=DIM, codebook_size=4, heads=2, codebook_dim=4), 2),
        (library.LFQ(dim=DIM, codebook_size=4), 1),
    ):
        calls: list[CodebookRecord] = []
        with record_codebooks(model, lambda name, record, calls=calls: calls.append(record)):
            codes = model.eval()(tokens(), mask=mask)[1]
        (record,) = calls
        assert record.codes is not None
        assert int((record.codes >= 0).sum()) == heads * int(mask.sum())
        if heads == 1:
            assert torch.equal(record.codes[0].view(4, 60), codes.masked_fill(~mask, -1))


def test_an_embedding_called_from_elsewhere_is_recorded_without_tokens() -> None:
    model, records = VQGAN(), []
    with record_codebooks(find_codebooks(model, ["codes"]), lambda name, record: records.append(record)):
        model.codes(torch.tensor([1, 3]))
        model(torch.randn(2, DIM, 3, 3))
    assert [record.tokens is None for record in records] == [True, False]
    assert records[0].codes.tolist() == [[1, 3]]


def test_named_modules_must_be_there_and_be_codebooks() -> None:
    with pytest.raises(ValueError, match=r"names of modules of Student; got 'prototype'. Did you mean 'prototypes'"):
        find_codebooks(Student(), ["prototype"])
    with pytest.raises(ValueError, match=r"got '', of type Anything. Pass \{'': function\}"):
        find_codebooks(Anything(), [""])


def test_a_kind_of_a_user_goes_before_ours() -> None:
    class Mine(CodebookSource):
        @classmethod
        def recognizes(cls, module: nn.Module) -> bool:
            return isinstance(module, Anything)

        def read(self, call):
            return CodebookRecord.of_codes(call.argument(0, "values"), call.module.prototypes, call.output)

    model = nn.Sequential(Anything())
    monitor = CodebookMonitor(model, kinds=[Mine])
    model(tokens())
    assert math.isfinite(monitor.report()["0"].separation)
    monitor.close()
