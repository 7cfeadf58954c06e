"""The last phase of annealing at T -> 0, in which prototypes of little use are moved to where the error is."""

import warnings

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ddcl_lightning.functional import TokenStatistics, code_counts, nearest_prototype
from ddcl_lightning.functional._common import token_chunks

PATIENCE = 20  # relocations in a row that gain nothing end the search
GAIN = 1e-4  # smallest share of the inertia that counts as one
# Until the other prototypes have settled, a good relocation may raise the inertia, but not by more than this factor.
HOPELESS = 2.0


def hard_phase(points: Tensor, starts: list[Tensor], seed: int) -> tuple[Tensor, float]:
    """Lloyd's algorithm until it settles, with relocations of prototypes as long as they lower the inertia.

    A relocation moves the prototype whose removal costs least to the neighbourhood of a sample that is drawn with a
    probability proportional to its squared error (compare Lattanzi & Sohler, "A better k-means++ algorithm via local
    search", ICML 2019). It is kept if the inertia is smaller once all prototypes have settled. This is needed where one
    direction or a few outliers hold nearly all the variance: annealing ends before the other prototypes have separated.

    Args:
        points: ``(N, d)`` in float64, at least K of them distinct.
        starts: Prototypes ``(K, d)`` each; the search goes on from the best.
        seed: Seed of the draws.

    Returns:
        Prototypes ``(K, d)``, each the mean of the points that are nearest to it, and their inertia.
    """
    generator = np.random.default_rng(seed)
    p, inertia = min((_settle(points, start) for start in starts), key=lambda settled: settled[1])
    failures = PATIENCE if len(p) == 1 else 0
    while failures < PATIENCE and inertia > 0:
        first, second, owner = _two_nearest(points, p)
        cumulative = first.cumsum(0)
        while failures < PATIENCE:
            drawn = int(torch.searchsorted(cumulative, generator.random() * float(cumulative[-1])))
            place = points[min(drawn, len(points) - 1)]
            followers = _squared(points, place) < first
            place = points[followers].mean(0) if bool(followers.any()) else place
            to_place = _squared(points, place)
            # Without prototype k its points go to their second prototype, or to the new place.
            best = torch.minimum(first, to_place)
            without = best.sum() + p.new_zeros(len(p)).index_add_(0, owner, torch.minimum(second, to_place) - best)
            cheapest = int(without.argmin())
            failures += 1
            if float(without[cheapest]) > HOPELESS * inertia:
                continue
            moved = p.clone()
            moved[cheapest] = place
            moved, lower = _settle(points, moved)
            if lower < inertia * (1 - GAIN):
                p, inertia, failures = moved, lower, 0
                break
    return hard_means(points, p).mean, inertia


def hard_means(points: Tensor, prototypes: Tensor) -> TokenStatistics:
    """Number and mean of the points nearest to each prototype; one without points stays where it is.

    Means are taken relative to a member of each cell, so that equal points have exactly themselves as their mean.
    """
    owner = nearest_prototype(points, prototypes)
    counts = code_counts(owner, len(prototypes)).to(points.dtype)
    earliest = torch.full((len(prototypes),), len(points)).scatter_reduce_(0, owner, torch.arange(len(points)), "amin")
    member = torch.where((counts > 0).unsqueeze(1), points[earliest.clamp(max=len(points) - 1)], prototypes)
    offsets = torch.zeros_like(prototypes).index_add_(0, owner, points - member[owner])
    return TokenStatistics(counts.log(), member + offsets / counts.clamp(min=1).unsqueeze(1))


def _settle(points: Tensor, prototypes: Tensor) -> tuple[Tensor, float]:
    """Prototypes once no point changes its own, and their inertia."""
    run = KMeans(len(prototypes), init=prototypes.numpy(), n_init=1, tol=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # prototypes may coincide here; relocations part them
        run.fit(points.numpy())
    centers: npt.NDArray[np.float64] = run.cluster_centers_
    return torch.from_numpy(centers), float(run.inertia_)


def _squared(points: Tensor, place: Tensor) -> Tensor:
    return (points - place).square().sum(1)


def _two_nearest(points: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances ``(N,)`` to the nearest and the second nearest prototype, and which the nearest is."""
    nearest = [
        torch.cdist(points[rows], prototypes, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
        for rows in token_chunks(len(points), len(prototypes))
    ]
    squares = torch.cat([chunk.values for chunk in nearest]).square()
    return squares[:, 0], squares[:, 1], torch.cat([chunk.indices[:, 0] for chunk in nearest])
