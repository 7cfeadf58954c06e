"""Every benchmark runs, in its tiny version, and writes plain results."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import run_script
from tests.tiny_data import text_file
from tests.tiny_models import tiny_bert

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))


def test_there_are_benchmarks() -> None:
    assert SCRIPTS


TEXTS = {
    "sst2": ("sst2_glue.jsonl.gz", 2, "validation"),
    "imdb": ("imdb_10k_5k.jsonl.gz", 2, "test"),
    "newsgroups": ("20newsgroups_bydate_stripped.jsonl.gz", 20, "test"),
}


def text_options(folder: Path, task: str) -> list[str]:
    """A tiny encoder and a tiny file in the place of real ones."""
    name, classes, test_name = TEXTS[task]
    with gzip.open(folder / name, "wb") as file:
        file.write(text_file(folder / "texts.jsonl", classes, train=160, test_name=test_name).read_bytes())
    encoder = tiny_bert(folder / "encoder")
    return ["--task", task, "--encoder", str(encoder), "--data", str(folder), "--cache", str(folder / "cache")]


ENCODED = ("feature_cache", "feedforward")


def cache_options(folder: Path) -> list[str]:
    """The same for the cache and the replaced MLPs."""
    options = text_options(folder, "sst2")
    return ["--encoder", options[options.index("--encoder") + 1], "--data", str(folder)]


CASES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    **{name: (name, lambda folder: []) for name in SCRIPTS if name not in ("text_readouts", *ENCODED)},
    **{name: (name, cache_options) for name in ENCODED},
    **{f"text_{task}": ("text_readouts", lambda folder, task=task: text_options(folder, task)) for task in TEXTS},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_quick_version_writes_results(name: str, tmp_path: Path) -> None:
    script, options = CASES[name]
    arguments = ["--quick", *options(tmp_path), "--output", str(tmp_path), "--figures", str(tmp_path)]
    run = run_script(BENCHMARKS / f"{script}.py", arguments, tmp_path)
    assert run.code == 0, run.stderr
    text = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(text)["versions"]["torch"]
    assert str(Path.home()) not in text
    assert str(BENCHMARKS.parent) not in text
    assert "|---|" in run.stdout  # the table for docs/measurements.md
