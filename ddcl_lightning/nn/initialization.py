"""Starting points for a bank from a sample of tokens: k-means++ by scikit-learn, or farthest-point selection."""

import warnings
from typing import Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from tqdm.auto import tqdm

from ddcl_lightning._utils.seeding import LARGEST_SEED, check_seed

InitMethod = Literal["kmeans", "farthest_point"]

MOST_CLUSTERED = 4096  # codes; the start of k-means takes seconds at that number and minutes beyond
ITERATIONS = 20  # of k-means, where training goes on from there
JITTER = 1e-3  # distance of copies of a token, as a share of the spread of the tokens


def initial_prototypes(
    tokens: Tensor,
    num_prototypes: int,
    *,
    method: InitMethod = "kmeans",
    num_restarts: int = 10,
    seed: int = 0,
    progress: bool = False,
    description: str = "k-means",
) -> Tensor:
    """Choose K starting prototypes for one head.

    Args:
        tokens: ``(N, d)`` valid tokens, on any device.
        num_prototypes: K; there must be at least K distinct tokens.
        method: ``"kmeans"``: centroids of the best of several k-means++ runs (section 7.1 of the paper);
            ``"farthest_point"``: K tokens chosen greedily to be far apart, which starts with a large separation
            (section 8.7), at the price of starting on outliers.
        num_restarts: Runs of k-means; the one with the smallest inertia wins.
        seed: Seed of the choice, in [0, 2**32); equal sets of tokens in equal order give equal prototypes.
        progress: Show a bar over the restarts.
        description: Label of the bar.

    Returns:
        ``(K, d)`` in float64 on the CPU.

    Raises:
        ValueError: If an argument is out of its range, tokens are not finite, or fewer than K of them are distinct.
    """
    if method not in ("kmeans", "farthest_point"):
        raise ValueError(f"method must be 'kmeans' or 'farthest_point'; got {method!r}. Choose one of them.")
    if num_restarts < 1:
        raise ValueError(f"num_restarts must be at least 1; got {num_restarts}. Pass 1 or more.")
    check_seed("seed", seed)
    points = tokens.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(points).all():
        raise ValueError("tokens must be finite to start prototypes from them; got NaN or infinity. Check the encoder.")
    distinct = len(np.unique(points, axis=0))
    if distinct < num_prototypes:
        raise ValueError(
            f"num_prototypes must not exceed the number of distinct tokens; got {num_prototypes} prototypes for "
            f"{distinct} distinct among {len(points)} collected tokens. Use fewer prototypes or collect more tokens."
        )
    if method == "farthest_point":
        return torch.from_numpy(_farthest_points(points, num_prototypes, np.random.default_rng(seed)))

    best: KMeans | None = None
    for restart in tqdm(range(num_restarts), desc=description, disable=not progress, leave=False):
        run = KMeans(num_prototypes, init="k-means++", n_init=1, random_state=(seed + restart) % (LARGEST_SEED + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # distinctness was checked above
            run.fit(points)
        # Restarts that end in the same optimum tie up to rounding; the first one wins, on every machine.
        if best is None or run.inertia_ < best.inertia_ * (1 - 1e-6):
            best = run
    assert best is not None
    return torch.from_numpy(best.cluster_centers_)


def first_codes(tokens: Tensor, num_codes: int, *, cluster: bool, seed: int = 0) -> Tensor:
    """K starting codes for one head from however many tokens there are.

    Args:
        tokens: ``(N, d)``, finite, at least one.
        num_codes: K. Where fewer tokens are distinct, codes beyond them are copies of them, a little apart; above
            :data:`MOST_CLUSTERED` codes are random tokens.
        cluster: Take the centroids of one run of k-means instead of random tokens.
        seed: Seed of the choice.

    Returns:
        ``(K, d)`` in float64 on the CPU.
    """
    sample = tokens.detach().to("cpu", torch.float64).numpy()
    points = np.unique(sample, axis=0)
    generator = np.random.default_rng(seed)
    if len(points) <= num_codes:
        copies = points[np.arange(num_codes) % len(points)]
        spread = points.std() or np.abs(points).max() or 1.0
        copies[len(points) :] += JITTER * spread * generator.standard_normal(copies[len(points) :].shape)
        return torch.from_numpy(copies)
    if not cluster or num_codes > MOST_CLUSTERED:
        return torch.from_numpy(points[generator.choice(len(points), num_codes, replace=False)])
    run = KMeans(num_codes, init="k-means++", n_init=1, max_iter=ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torch.from_numpy(run.fit(sample).cluster_centers_)  # duplicates weigh what they are


def _farthest_points(
    points: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", size: int, generator: np.random.Generator
) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    chosen = [int(generator.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    for _ in range(size - 1):
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return points[chosen]
