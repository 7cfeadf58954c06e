"""Every benchmark runs, in its tiny version, and writes plain results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))


def test_there_are_benchmarks() -> None:
    assert SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_version_writes_results(name: str, tmp_path: Path) -> None:
    script = BENCHMARKS / f"{name}.py"
    command = [sys.executable, str(script), "--quick", "--output", str(tmp_path), "--figures", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    text = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(text)["versions"]["torch"]
    assert str(Path.home()) not in text
    assert str(BENCHMARKS.parent) not in text
    assert "|---|" in run.stdout  # the table for docs/measurements.md
