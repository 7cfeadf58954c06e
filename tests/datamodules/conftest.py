import os
from pathlib import Path

import pytest

SHARED_DATA = Path(os.environ.get("DDCL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def orbital_catalogue() -> Path:
    """Catalogue of 16,475 objects of April 2017; the test is skipped where it is absent."""
    path = SHARED_DATA / "orbital_catalog_2017-04_16k.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is absent; set DDCL_SHARED_DATA to its folder")
    return path
