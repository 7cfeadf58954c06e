"""DDCLClustering is a scikit-learn estimator, and clusters."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_linnerud, load_wine, make_blobs
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from ddcl_lightning.integrations.scikit_learn import DDCLClustering

IRIS = load_iris().data


# The checks lower max_iter to 5.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([DDCLClustering(n_clusters=3)])
def test_scikit_learn_accepts_it(estimator: Any, check: Any) -> None:
    check(estimator)


def blobs(seed: int = 0) -> tuple[Any, Any]:
    data: tuple[Any, Any] = make_blobs(600, n_features=5, centers=6, cluster_std=0.7, random_state=seed)
    return data


@pytest.mark.parametrize("init", ["kmeans", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_finds_blobs_whatever_the_seed(seed: int, init: str) -> None:
    x, y = blobs(4)
    assert adjusted_rand_score(y, DDCLClustering(6, init=init, random_state=seed).fit_predict(x)) == 1.0


def test_anneals_to_a_lower_inertia_than_one_run_of_kmeans() -> None:
    x = load_digits().data
    ours = DDCLClustering(10, random_state=0).fit(x)
    best = min(KMeans(10, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(5))
    assert ours.inertia_ <= best
    assert ours.inertia_ == pytest.approx(((x - ours.cluster_centers_[ours.labels_]) ** 2).sum())
    assert ours.score(x) == -ours.inertia_


OUTLIER = np.vstack([blobs()[0][:300], np.full((1, 5), 1e6)])
TWENTY = np.repeat(load_linnerud().data, 10, axis=0)  # 20 distinct rows


@pytest.mark.parametrize(
    ("x", "size"),
    [
        (load_wine().data, 8),
        (load_wine().data, 20),
        (load_breast_cancer().data, 20),
        (1e-6 * load_wine().data, 8),
        (IRIS, 5),
        (load_linnerud().data, 8),
        (load_linnerud().data[:12], 11),
        (TWENTY, 12),
        (OUTLIER, 7),
        (OUTLIER.astype(np.float32), 7),
        (np.random.default_rng(0).standard_t(1.2, size=(200, 4)), 12),
    ],
    ids=["wine8", "wine20", "cancer", "tiny_units", "iris", "few", "k_near_n", "duplicates", "far", "far32", "heavy"],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_is_no_worse_than_ten_runs_of_kmeans_on_raw_data(x: Any, size: int) -> None:
    model = DDCLClustering(size, n_init=1, random_state=0).fit(x)
    labels = KMeans(size, n_init=10, random_state=0).fit(x).labels_
    exact = x.astype(np.float64)  # k-means sums in the precision of the data
    lowest = sum(((exact[labels == k] - exact[labels == k].mean(0)) ** 2).sum() for k in range(size))
    assert model.inertia_ <= 1.02 * lowest
    assert (model.predict(x) == model.labels_).all()
    shares = model.transform(x)
    assert shares.dtype == x.dtype
    assert shares.sum(1) == pytest.approx(1.0, abs=1e-5)
    assert (shares[np.arange(len(x)), model.labels_] >= shares.max(1) - 1e-5).all()
    assert model.mass_ == pytest.approx(np.bincount(model.labels_, minlength=size))
    for k in range(size):
        assert model.cluster_centers_[k] == pytest.approx(exact[model.labels_ == k].mean(0), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_result_of_kmeans_with_the_same_seed_is_never_better(seed: int) -> None:
    """By construction, also where single runs of k-means differ: with 6 clusters of raw wines seed 0 was 5 % worse."""
    x = load_wine().data
    ours = DDCLClustering(6, random_state=seed).fit(x).inertia_
    assert ours <= (1 + 1e-9) * KMeans(6, n_init=10, random_state=seed).fit(x).inertia_


def test_as_many_clusters_as_distinct_samples_leave_no_error() -> None:
    model = DDCLClustering(20, random_state=0).fit(TWENTY)
    assert model.inertia_ == 0
    assert model.temperature_ > 0
    assert model.transform(TWENTY).max(1) == pytest.approx(1.0)


def test_soft_assignments_are_those_of_spherical_clusters_where_the_spread_of_the_data_says_nothing() -> None:
    model = DDCLClustering(7, random_state=0).fit(OUTLIER)
    assert model.temperature_ == pytest.approx(2 * model.inertia_ / OUTLIER.size)
    assert model.temperature_ < 1e-9 * model.critical_temperature_
    assert model.transform(OUTLIER).max(1).mean() > 0.9
    assert model.loss_.loss == pytest.approx(model.loss_.ols + model.loss_.variance)


def test_hard_clusters_of_a_stream_are_means_of_all_samples_so_far() -> None:
    x = np.vstack([blobs(4)[0], np.full((4, 5), 1e5)])[np.r_[600:604, :600]]
    model = DDCLClustering(7, random_state=0)
    for chunk in np.split(x, [304]):
        model.partial_fit(chunk)
    labels = model.predict(x)
    assert model.mass_ == pytest.approx(np.bincount(labels, minlength=7))
    for k in range(7):
        assert model.cluster_centers_[k] == pytest.approx(x[labels == k].mean(0))


def test_prototypes_are_the_fixed_point_of_the_loss_with_assignments_held_constant() -> None:
    model = DDCLClustering(4, end=0.1, tol=1e-9, max_iter=3000, random_state=0).fit(IRIS)
    z, p = torch.tensor(IRIS), torch.tensor(model.cluster_centers_, requires_grad=True)
    q = torch.softmax(-torch.cdist(z, p.detach()).square() / model.temperature_, 1)
    loss = (q * torch.cdist(z, p).square()).sum(1).mean()
    loss.backward()
    assert p.grad is not None
    assert float(p.grad.abs().max()) < 1e-6
    assert model.loss_.loss == pytest.approx(loss.item())
    assert model.loss_.loss == pytest.approx(model.loss_.ols + model.loss_.variance)
    q = q.detach()
    assert model.transform(IRIS) == pytest.approx(q.numpy())
    assert model.mass_ == pytest.approx(q.sum(0).numpy())


def test_temperatures_are_fractions_of_the_critical_one() -> None:
    model = DDCLClustering(3, start=0.8, end=0.02, random_state=0).fit(IRIS)
    critical = 2 * np.linalg.eigvalsh(np.cov(IRIS.T, bias=True))[-1]
    assert model.critical_temperature_ == pytest.approx(critical)
    assert model.temperature_ == pytest.approx(0.02 * critical)
    moved = DDCLClustering(3, start=0.8, end=0.02, random_state=0).fit(1000 * IRIS + 5)
    assert moved.temperature_ == pytest.approx(1e6 * model.temperature_)
    assert (moved.labels_ == model.labels_).all()


def test_above_the_critical_temperature_nothing_splits() -> None:
    warm = DDCLClustering(3, start=1.3, end=1.1, tol=1e-6, random_state=0).fit(IRIS)
    assert np.ptp(warm.cluster_centers_, axis=0).max() < 1e-2
    cool = DDCLClustering(3, start=1.0, end=0.8, tol=1e-6, random_state=0).fit(IRIS)
    assert np.ptp(cool.cluster_centers_, axis=0).max() > 0.3


def test_same_seed_same_result_and_a_generator_moves_on() -> None:
    x, _ = blobs()
    first, second = (DDCLClustering(9, random_state=3).fit(x) for _ in range(2))
    assert (first.cluster_centers_ == second.cluster_centers_).all()
    generator = np.random.RandomState(0)
    model = DDCLClustering(9, random_state=generator)
    assert (model.fit(x).cluster_centers_ != clone(model).fit(x).cluster_centers_).any()


def test_restarts_keep_the_best() -> None:
    x = load_digits().data[:400]
    states = [np.random.RandomState(s) for s in (0, 0)]
    settings = {"start": 0.05, "end": 0.005}  # soft to the end: the hard phase starts from ten runs of k-means
    single = DDCLClustering(25, **settings, n_init=1, random_state=states[0]).fit(x).loss_.loss
    best = DDCLClustering(25, **settings, n_init=6, random_state=states[1]).fit(x).loss_.loss
    assert best < single


def test_pipeline_grid_search_pickle_and_pandas() -> None:
    import pandas as pd

    frame = pd.DataFrame(IRIS, columns=["a", "b", "c", "d"])
    model = DDCLClustering(3, random_state=0).set_output(transform="pandas")
    shares = model.fit_transform(frame)
    assert list(shares.columns) == ["ddclclustering0", "ddclclustering1", "ddclclustering2"]
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert (shares.to_numpy().argmax(1) == model.labels_).all()
    again = pickle.loads(pickle.dumps(model))
    assert (again.predict(frame) == model.labels_).all()
    search = GridSearchCV(
        make_pipeline(PCA(2, whiten=True), DDCLClustering(random_state=0)), {"ddclclustering__n_clusters": [2, 3]}, cv=3
    ).fit(IRIS)
    assert search.best_params_ == {"ddclclustering__n_clusters": 3}


def test_partial_fit_is_the_mean_of_all_samples_so_far() -> None:
    x, _ = blobs(4)
    model = DDCLClustering(6, end=0.001, random_state=0)
    for chunk in np.split(x, 4):
        model.partial_fit(chunk)
    labels = model.predict(x)
    assert model.mass_.sum() == pytest.approx(len(x))
    for k in range(6):
        assert model.cluster_centers_[k] == pytest.approx(x[labels == k].mean(0))
    assert len(model.labels_) == len(x) // 4


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DDCLClustering(4, random_state=0).fit(IRIS)
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", 64)
    chunked = DDCLClustering(4, random_state=0).fit(IRIS)
    assert chunked.cluster_centers_ == pytest.approx(whole.cluster_centers_)


def test_float32_stays_float32() -> None:
    model = DDCLClustering(3, random_state=0).fit(IRIS.astype(np.float32))
    assert model.cluster_centers_.dtype == np.float32
    exact = DDCLClustering(3, random_state=0).fit(IRIS)
    assert model.cluster_centers_ == pytest.approx(exact.cluster_centers_, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({"n_clusters": 0}, IRIS, "n_clusters must be an integer of at least 1; got 0"),
        ({"n_clusters": 2.5}, IRIS, "n_clusters must be an integer of at least 1; got 2.5"),
        ({"n_clusters": True}, IRIS, "n_clusters must be an integer of at least 1; got True"),
        ({"start": "1"}, IRIS, "start must be a number; got '1'"),
        ({"end": "0.1"}, IRIS, "end must be a number, or None; got '0.1'"),
        ({"tol": None}, IRIS, "tol must be a number; got None"),
        ({"n_init": 0}, IRIS, "n_init must be an integer of at least 1; got 0"),
        ({"init": "random"}, IRIS, "init must be 'kmeans' or 'mean'; got 'random'"),
        ({"n_clusters": 4}, np.repeat(IRIS[:3], 9, axis=0), "4 clusters for 3. Use fewer clusters"),
        ({"start": 0.1, "end": 0.2}, IRIS, "0 < end <= start.*start = 0.1 and end = 0.2"),
        ({"end": 0.0}, IRIS, "0 < end <= start"),
        ({"tol": -1.0}, IRIS, "tol must be >= 0; got -1.0"),
        ({"n_clusters": 8}, IRIS[:3], "n_samples=3 should be >= n_clusters=8. Use fewer"),
        ({}, np.full((20, 3), 7.1), "X must vary to be clustered; got n_samples=20 that are all equal"),
        ({}, np.full((20, 3), np.nan), "NaN"),
    ],
)
def test_ddcl_clustering_refuses_arguments_and_data_that_do_not_fit(
    arguments: dict[str, Any], data: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DDCLClustering(**arguments).fit(data)


def test_unsettled_runs_say_so() -> None:
    with pytest.warns(ConvergenceWarning, match="within max_iter = 1 iterations. Raise max_iter or tol"):
        DDCLClustering(10, n_temperatures=2, max_iter=1, tol=0.0, random_state=0).fit(load_digits().data[:300])
