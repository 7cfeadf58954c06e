"""The constraints that ``.ci/lowest`` installs."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("pip._vendor")
LOWEST = runpy.run_path(str(ROOT / ".ci" / "lowest_versions.py"))["lowest_versions"]

PROJECT = """
[project]
name = "mine"
dependencies = ["b[x]>=1.5", "a>=2,<3"]
[project.optional-dependencies]
one = ["c>=3", "b>=1.10"]
all = ["mine[one]"{}]
"""


def test_every_dependency_is_pinned_to_its_highest_floor(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(PROJECT.format(""))
    assert LOWEST(path) == ["a==2", "b==1.10", "c==3"]


def test_a_dependency_without_a_floor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(PROJECT.format(', "d<4"'))
    with pytest.raises(ValueError, match="'d<4'"):
        LOWEST(path)


def test_every_dependency_of_this_project_has_a_floor() -> None:
    pins = LOWEST(ROOT / "pyproject.toml")
    assert "torch==2.6" in pins
