import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED_DATA = Path(os.environ.get("DDCL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def shared_file() -> Callable[[str], Path]:
    """Path of a real data file by its name; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_file():
            pytest.skip(f"{name} is absent; set DDCL_SHARED_DATA to its folder")
        return path

    return find


@pytest.fixture
def orbital_catalogue(shared_file: Callable[[str], Path]) -> Path:
    """Catalogue of 16,475 objects of April 2017."""
    return shared_file("orbital_catalog_2017-04_16k.csv.gz")
