"""A seed is one that every generator takes, or it is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.callbacks import KMeansInitialization
from ddcl_lightning.functional.split import split_test
from ddcl_lightning.nn.initialization import initial_prototypes

TOKENS = torch.arange(32.0).view(16, 2)
USES: dict[str, Callable[[int], Any]] = {
    "reservoir": lambda seed: Reservoir(4, seed),
    "split_test": lambda seed: split_test(TOKENS, seed=seed),
    "kmeans": lambda seed: initial_prototypes(TOKENS, 2, num_restarts=2, seed=seed),
    "farthest_point": lambda seed: initial_prototypes(TOKENS, 2, method="farthest_point", seed=seed),
    "callback": lambda seed: KMeansInitialization(seed=seed),
}


@pytest.mark.parametrize("use", USES)
def test_seeds_that_not_every_generator_takes_are_refused(use: str) -> None:
    USES[use](2**32 - 1)
    for seed in (-1, 2**32, 2**64):
        with pytest.raises(ValueError, match=rf"seed must be (in \[0, 4294967295\]|an integer or None); got {seed}"):
            USES[use](seed)
