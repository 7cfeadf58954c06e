"""Fixtures for all tests."""

import os

# Before torch is imported: the suite runs in several processes of small tensors, whose threads would get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same seeds, and leaves the arithmetic of the process as it was."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that scikit-learn falls back to
    random.seed(0)
    yield
    torch.set_flush_denormal(False)
