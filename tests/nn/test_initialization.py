"""Starting prototypes: right, repeatable, and refused where they cannot be."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from ddcl_lightning.functional import separation
from ddcl_lightning.nn.initialization import InitMethod, initial_prototypes

methods = pytest.mark.parametrize("method", ["kmeans", "farthest_point"])


def blobs() -> tuple[Tensor, Tensor]:
    """300 tokens (300, 2) around 4 centres, and the centres."""
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    return centres.repeat(75, 1) + torch.randn(300, 2, generator=g), centres


def test_kmeans_finds_the_centres() -> None:
    tokens, centres = blobs()
    prototypes = initial_prototypes(tokens, 4, num_restarts=2)
    assert prototypes.dtype == torch.float64
    assert torch.cdist(prototypes.float(), centres).min(0).values.max() < 0.5
    means = torch.stack([tokens[k::4].mean(0) for k in range(4)]).double()
    assert torch.cdist(prototypes, means).min(0).values.max() < 1e-5


def test_best_of_the_restarts_wins() -> None:
    tokens = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    runs = [KMeans(20, n_init=1, random_state=5 + i).fit(tokens.double().numpy()).inertia_ for i in range(4)]
    best = initial_prototypes(tokens, 20, num_restarts=4, seed=5)
    inertia = torch.cdist(tokens.double(), best).min(1).values.square().sum()
    assert float(inertia) == pytest.approx(min(runs), rel=1e-6)
    assert max(runs) > 1.001 * min(runs)  # the restarts do differ here


@methods
def test_equal_seeds_give_equal_prototypes(method: InitMethod) -> None:
    tokens, _ = blobs()
    torch.manual_seed(1)
    first = initial_prototypes(tokens, 7, method=method, num_restarts=2, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, initial_prototypes(tokens, 7, method=method, num_restarts=2, seed=3))
    assert not torch.equal(first, initial_prototypes(tokens, 7, method=method, num_restarts=2, seed=4))


def test_farthest_points_are_tokens_far_apart() -> None:
    tokens, _ = blobs()
    chosen = initial_prototypes(tokens, 4, method="farthest_point")
    assert all(bool((tokens.double() == row).all(1).any()) for row in chosen)
    # Greedy selection: no token is farther from the chosen ones than they are from each other.
    radius = torch.cdist(tokens.double(), chosen).min(1).values.max()
    assert separation(chosen).minimum >= radius
    assert separation(chosen).minimum > 5


@methods
def test_needs_enough_distinct_tokens(method: InitMethod) -> None:
    tokens = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]).repeat(10, 1)
    with pytest.raises(ValueError, match=r"got 4 prototypes for 3 distinct among 30 collected tokens"):
        initial_prototypes(tokens, 4, method=method)
    prototypes = initial_prototypes(tokens, 3, method=method, num_restarts=1)
    assert torch.equal(torch.from_numpy(np.unique(prototypes.numpy(), axis=0)).float(), tokens[:3])


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_tokens_that_are_not_finite(method: InitMethod, bad: float) -> None:
    tokens, _ = blobs()
    tokens[5, 1] = bad
    with pytest.raises(ValueError, match="tokens must be finite"):
        initial_prototypes(tokens, 4, method=method)


def test_refuses_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="got 'random'"):
        initial_prototypes(blobs()[0], 4, method="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_restarts must be at least 1; got 0"):
        initial_prototypes(blobs()[0], 4, num_restarts=0)


def test_takes_any_precision_and_gradients() -> None:
    tokens = blobs()[0].bfloat16().requires_grad_()
    assert initial_prototypes(tokens, 4, num_restarts=1).shape == (4, 2)


def test_the_first_of_restarts_that_tie_wins() -> None:
    """Restarts that reach one optimum differ by rounding only, which must not decide the order of the prototypes."""
    tokens, _ = blobs()
    first = initial_prototypes(tokens, 4, num_restarts=1)
    spread = (tokens.double().unsqueeze(1) - first).square().sum(-1).min(1).values.sum()
    assert float(spread) < 1000  # the first restart is at the optimum
    assert torch.equal(initial_prototypes(tokens, 4, num_restarts=10), first)
