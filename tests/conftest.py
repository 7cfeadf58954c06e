"""Fixtures for all tests."""

import os

# Before torch is imported: the suite runs in several processes of small tensors, whose threads would get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# torch.compile imports it, and half of it stays behind where one of its warnings is an error.
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")
    import setuptools  # noqa: F401


@pytest.fixture(autouse=True)
def _fresh_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same seeds, and leaves the arithmetic of the process as it was."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that scikit-learn falls back to
    random.seed(0)
    yield
    torch.set_flush_denormal(False)
    os.environ.pop("PL_GLOBAL_SEED", None)  # or fixtures of the next module would see that of the last test
