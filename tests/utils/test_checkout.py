"""A checkout beside another, installed one. That this one imports is part of test_recognition_imports_no_library."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def import_from(folder: Path) -> "subprocess.CompletedProcess[str]":
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import ddcl_lightning"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Another copy of this one, which is what is installed."""
    for name in ("ddcl_lightning", "callbacks", "datamodules", "recipes"):
        (tmp_path / name).mkdir()
    (tmp_path / "ddcl_lightning" / "_utils").mkdir()
    for name in ("__init__.py", "_utils/__init__.py", "_utils/at_start.py", "_utils/checkout.py"):
        (tmp_path / "ddcl_lightning" / name).write_bytes((ROOT / "ddcl_lightning" / name).read_bytes())
    return tmp_path


def test_a_checkout_refuses_the_callbacks_of_another_copy(checkout: Path) -> None:
    run = import_from(checkout)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ddcl_lightning was imported from ")
    assert "that of another copy" in last
    assert f"pip install -e {checkout}" in last
