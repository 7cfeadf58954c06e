"""Every study runs, in its tiny version, and writes plain results; the documentation shows what the results say."""

import gzip
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts import Finished, run_script
from tests.tiny_data import text_file
from tests.tiny_models import tiny_bert

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
STUDIES = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py") if path.stem != "render")
RISING_AND_FALLING = (0.1, 0.6, 0.8, 0.8, 0.8), (0.8, 0.5, 0.8, 0.7, -1.0, -1.0)
MARKER = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
TEXTS = {
    "sst2_glue": (2, "validation"),
    "imdb_10k_5k": (2, "test"),
    "20newsgroups_bydate_stripped": (20, "test"),
}


def test_every_study_has_results() -> None:
    assert STUDIES
    assert sorted(path.stem for path in (BENCHMARKS / "results").glob("*.json")) == STUDIES


def tiny_files(folder: Path) -> list[str]:
    """A tiny encoder and tiny texts in the place of real ones."""
    for name, (classes, test_name) in TEXTS.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wb") as file:
            file.write(text_file(folder / "texts.jsonl", classes, train=160, test_name=test_name).read_bytes())
    encoder = tiny_bert(folder / "encoder")
    return ["--encoder", str(encoder), "--texts", str(folder), "--cache", str(folder / "cache")]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_quick_version_writes_results(name: str, tmp_path: Path) -> None:
    arguments = ["--quick", *tiny_files(tmp_path), "--output", str(tmp_path)]
    run = run_script(BENCHMARKS / f"{name}.py", arguments, tmp_path)
    assert run.code == 0, run.stderr
    text = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    results = json.loads(text)
    assert results["study"] == name
    assert results["versions"]["torch"]
    assert {run["case"] for run in results["runs"]} == set(results["cases"])
    assert len(results["runs"]) == len(results["cases"])
    configs = [json.dumps(config) for config in results["cases"].values()]
    assert len(set(configs)) == len(configs)  # what tells the cases apart is in the configuration
    assert str(Path.home()) not in text
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert "|---|" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_tables_and_configurations_are_those_of_the_runs(name: str, tmp_path: Path) -> None:
    path = BENCHMARKS / "results" / f"{name}.json"
    shutil.copy(path, tmp_path)
    run = run_script(BENCHMARKS / f"{name}.py", ["--tables", "--output", str(tmp_path)], tmp_path)
    assert run.code == 0, run.stderr
    made = json.loads((tmp_path / path.name).read_text(encoding="utf-8"))
    assert made == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    script, path = BENCHMARKS / "debris.py", tmp_path / "debris.json"

    def run(case: str) -> Finished:
        return run_script(script, ["--quick", "--output", str(tmp_path), "--cases", case], tmp_path)

    assert run("*/kmeans-pca").code == 0
    first = json.loads(path.read_text(encoding="utf-8"))
    assert [row["case"] for row in first["runs"]] == ["generated/kmeans-pca"]
    first["runs"][0]["seconds"] = 77.0
    path.write_text(json.dumps(first), encoding="utf-8")
    assert run("*/kmeans-*").code == 0
    second = json.loads(path.read_text(encoding="utf-8"))
    assert [row["case"] for row in second["runs"]] == ["generated/kmeans-pca", "generated/kmeans-features"]
    assert second["runs"][0]["seconds"] == 77.0
    # A run under another configuration is not this case's.
    second["cases"]["generated/kmeans-pca"]["epochs"] = 3
    path.write_text(json.dumps(second), encoding="utf-8")
    assert run("*/kmeans-pca").code == 0
    third = json.loads(path.read_text(encoding="utf-8"))
    assert third["runs"][-1]["case"] == "generated/kmeans-pca"
    assert third["runs"][-1]["seconds"] != 77.0
    # Nor is a file under other settings this study's, and tables are made of neither.
    assert "--cases must match" in run("unknown").stderr
    path.write_text(json.dumps(second), encoding="utf-8")
    stale = run_script(script, ["--tables", "--output", str(tmp_path)], tmp_path)
    assert "generated/kmeans-pca" in stale.stderr
    path.write_text(json.dumps({**third, "settings": {"epochs": 3}}), encoding="utf-8")
    assert "settings" in run("*/kmeans-pca").stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuned/clustering/whiten-0.1", "held-out/free/cosine", "held-out/swav/sinkhorn"])
def test_looking_at_a_recorded_run_does_not_change_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a VectorQuantize too, whose codes move in the forward pass, and of one that draws its views."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases, runs, study = map(importlib.import_module, ("_collapse_cases", "_collapse_runs", "_study"))
    config = {**cases.CASES[name].config, "steps": 25}
    looked, left_alone = (runs.record_run(config, 0, study.Options(quick=True), look) for look in (True, False))
    assert len(looked["quality"]) == len(looked["probes"]) == runs.MOMENTS
    assert left_alone["probes"] == []
    assert looked["losses"] == left_alone["losses"]


def test_quality_alone_says_whether_a_run_has_collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    verdict = importlib.import_module("collapse_warning").verdict
    rising, falling = ([(step, value) for step, value in enumerate(values)] for values in RISING_AND_FALLING)
    assert verdict(rising, 0.8) == ("healthy", 1.0, None)
    assert verdict(rising, 0.95)[0] == "between"  # the reference is better
    assert verdict(falling, 0.8) == ("collapsed", 0.0, 3)  # at step 2 the quality came back
    assert verdict(rising, 1.2) == ("collapsed", pytest.approx(0.8 / 1.2), 0)  # there was none to lose
    assert verdict([(0, -2.0), (1, -3.0)], 0.0) == ("collapsed", 0.0, 0)


def test_members_are_matched_whatever_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measures = importlib.import_module("_faithfulness_measures")
    codes = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 1]])  # (N, H)
    assert measures.matched_members(codes, codes.flip(1).sub(1).abs(), 2) == pytest.approx(1.0)
    # {0, 1} and {2, 3} against {0} and {1, 2, 3}: 1/2 and 2/3.
    first, second = torch.tensor([[0], [0], [1], [1]]), torch.tensor([[1], [0], [0], [0]])
    assert measures.matched_members(first, second, 2) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert measures.purity(second, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx((1 + 2) / 4)
    assert measures.purity(codes, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx((1.0 + 0.5) / 2)


def render(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the packages of this environment: rendering needs none."""
    command = [sys.executable, "-I", "-S", str(BENCHMARKS / "render.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_documentation_is_what_the_results_say() -> None:
    run = render("--check")
    assert run.returncode == 0, run.stderr


# Of a one-off trial that the text refers to.
ONE_OFF = {"0.826", "0.603", "0.609", "0.833", "0.588", "0.617", "0.839", "0.594", "0.629"}
# Numbers of the text that no table has: differences, means and ratios of numbers that one has, and settings.
DERIVED = {
    "Readouts on real text": {"0.005", "0.012", "0.828"},
    "20 Newsgroups without labels": {"0.005"},
    "A hierarchy on 20 Newsgroups": {"0.001", "0.035", "0.046", *ONE_OFF},
    "Prototypes in the place of MLPs": {"0.014", "0.015", "0.030", "0.031"},
    "The number of prototypes": {"0.005"},
    "Prototypes inside a network": {"0.007"},
    "Codebooks": {"0.032"},
    "The estimator": {"0.005"},
}


def test_the_text_quotes_the_tables() -> None:
    """Numbers with three decimals or more: a table that changes leaves none of its old ones in the text."""
    _, *sections = re.split(r"^## ", (DOCS / "measurements.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections:
        title = section.partition("\n")[0]
        if title == "One-off trials (no script)":
            continue
        text, tables = MARKER.sub("", section), "".join(MARKER.findall(section))
        quoted, shown = (set(re.findall(r"\b0\.\d{3,}\b", words)) for words in (text, tables))
        assert quoted - shown - DERIVED.get(title, set()) == set(), title
        assert DERIVED.get(title, set()) <= quoted, title


def test_rendering_notices_and_corrects_a_changed_table(tmp_path: Path) -> None:
    page = shutil.copytree(DOCS, tmp_path / "docs") / "measurements.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"\| 0\.746 ", "| 0.747 ", text, count=1), encoding="utf-8")
    run = render("--check", "--docs", str(page.parent))
    assert run.returncode == 1
    assert "-| k-means, features | 0.747 " in run.stderr
    assert render("--docs", str(page.parent)).returncode == 0
    assert page.read_text(encoding="utf-8") == text


def test_rendering_notices_and_corrects_a_changed_number_in_the_text(tmp_path: Path) -> None:
    page = shutil.copytree(DOCS, tmp_path / "docs") / "monitoring.md"
    text = page.read_text(encoding="utf-8")
    changed = re.sub(r"(\| recall -->)\d+ of \d+(<!-- /cell -->)", r"\g<1>86 of 87\2", text, count=1)
    assert changed != text
    page.write_text(changed, encoding="utf-8")
    run = render("--check", "--docs", str(page.parent))
    assert run.returncode == 1
    assert "86 of 87" in run.stderr
    assert render("--docs", str(page.parent)).returncode == 0
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- table: kills/recipes -->", "<!-- table: kills/unknown -->", "no results have the table kills/unknown"),
        ("<!-- table: kills/recipes -->", "", "the table kills/recipes is on no page"),
        ("<!-- table: kills/recipes -->", " <!-- table: kills/recipes -->", "must be a line of its own"),
        ("| CollapseWarning, alarms | recall -->", "| nothing | recall -->", r"have the cell .* \| nothing \| recall"),
        (
            "<!-- cell: monitor_cost/steps",
            "<!-- cell: monitor_cost/unknown",
            "no results have the cell monitor_cost/unk",
        ),
        ("<!-- /cell --> times", " times", "must be inside of a line with '<!-- /cell"),
        ("takes <!-- cell:", "takes\n<!-- cell:", "must be inside of a line with '<!-- /cell"),
    ],
)
def test_rendering_refuses_bad_markers(old: str, new: str, message: str, tmp_path: Path) -> None:
    docs = shutil.copytree(DOCS, tmp_path / "docs")
    page = next(page for page in docs.glob("m*.md") if old in page.read_text(encoding="utf-8"))
    page.write_text(page.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    run = render("--check", "--docs", str(page.parent))
    assert run.returncode == 1
    assert re.search(message, run.stderr)
