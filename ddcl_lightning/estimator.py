"""DDCL clustering for scikit-learn: prototypes annealed from the data, without a network and without Lightning."""

import warnings
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ddcl_lightning.functional import (
    Decomposition,
    TokenMeans,
    critical_temperature,
    decompose,
    merge_token_means,
    nearest_prototype,
    soft_assign,
    token_means,
)
from ddcl_lightning.kmeans import initial_prototypes

Array = npt.NDArray[Any]
NUDGE = 0.03  # parts prototypes that coincide, in units of the thermal length sqrt(T)


class DDCLClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Clustering by deterministic annealing of DDCL prototypes.

    Prototypes start soft, at a fraction of the critical temperature ``T_c = 2 lambda_max(Cov)`` above which all of them
    sit at the mean of the data (Rose, Proc. IEEE 86, 1998), and follow the temperature down. At each one they iterate
    ``p_k <- sum_n w_kn z_n``, where ``w`` are the soft assignments (eq. 2) normalised over *samples* in log space:
    the fixed point of the quantisation loss with assignments held constant, and the step of
    :class:`~ddcl_lightning.TokenNormalized` at rate 1.

    Compared to ``KMeans``: one annealing ends in a lower inertia than one run of k-means on most data, and depends less
    on the seed; three of them are level with ten restarts of k-means (lower for many clusters in many dimensions,
    higher for many small ones in few), at several times their time. Agreement with labels is the same within noise.

    Distances are Euclidean and unweighted, as for k-means: put a scaler, or ``PCA(whiten=True)``, before it.

    Args:
        n_clusters: K, at least 1 and at most the number of samples.
        init: ``"kmeans"`` (one run of k-means++) or ``"mean"`` (all at the mean, parted by tiny nudges).
        start: First temperature as a fraction of the critical one, > 0. At 1 and above every start is forgotten; far
            below, the result is as arbitrary as the start.
        end: Last temperature as a fraction of the critical one, in (0, ``start``]. The lower, the harder.
        n_temperatures: Temperatures from ``start`` to ``end``, evenly spaced in their logarithm, at least 1.
        n_init: Restarts, at least 1; the smallest loss at the last temperature wins.
        max_iter: Largest number of iterations at each temperature, at least 1.
        tol: An iteration that moves the prototypes less than this share of the data's total standard deviation ends
            a temperature, >= 0.
        random_state: Seed, generator or None, of the start and of the tiny nudges that part prototypes.

    Attributes:
        cluster_centers_: Prototypes ``(n_clusters, n_features)``.
        labels_: Nearest prototype of each sample of the last fit, ``(n_samples,)``.
        temperature_: Last temperature, in units of squared distance.
        critical_temperature_: ``T_c`` of the data.
        loss_: ``(loss, ols, variance)`` of the last fit at ``temperature_``, means over samples;
            ``loss = ols + variance`` (eq. 3).
        inertia_: Sum of squared distances to the nearest prototype.
        mass_: Soft number of samples of each prototype, ``(n_clusters,)``; ``partial_fit`` adds to it.
        n_iter_: Iterations over all temperatures of the best start.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the data had any.

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> from ddcl_lightning import DDCLClustering
        >>> model = DDCLClustering(n_clusters=3, random_state=0).fit(load_iris().data)
        >>> model.transform(load_iris().data[:2]).round(2).shape
        (2, 3)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str = "kmeans",
        start: float = 0.5,
        end: float = 0.005,
        n_temperatures: int = 30,
        n_init: int = 3,
        max_iter: int = 300,
        tol: float = 1e-3,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.start = start
        self.end = end
        self.n_temperatures = n_temperatures
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "DDCLClustering":
        """Anneal the prototypes on ``X``.

        Args:
            X: ``(n_samples, n_features)``.
            y: Ignored.

        Raises:
            ValueError: If an argument is out of its range, there are fewer samples than clusters, or all are equal.
        """
        self._check_arguments()
        self._fit(self._tensor(X, reset=True))
        return self

    def partial_fit(self, X: Any, y: Any = None) -> "DDCLClustering":
        """Learn from one batch of a stream: the first call is ``fit``, later ones move prototypes to a running mean.

        The temperature stays that of the first batch, which should therefore be a fair sample. Every prototype is the
        mean of all samples so far, weighted by the assignments they had when they came. ``labels_``, ``loss_``
        and ``inertia_`` are those of the last batch.

        Args:
            X: ``(n_samples, n_features)``.
            y: Ignored.
        """
        self._check_arguments()
        if not hasattr(self, "cluster_centers_"):
            return self.fit(X)
        z = self._tensor(X, reset=False)
        prototypes = torch.tensor(self.cluster_centers_, dtype=z.dtype)
        so_far = TokenMeans(torch.tensor(self.mass_, dtype=z.dtype).log(), prototypes)
        log_mass, mean = merge_token_means(so_far, token_means(z, prototypes, self.temperature_))
        self._store(z, mean, log_mass.exp())
        self.n_iter_ += 1
        return self

    def predict(self, X: Any) -> Array:
        """Nearest prototype of each sample, ``(n_samples,)`` integers."""
        check_is_fitted(self)
        z = self._tensor(X, reset=False)
        found: Array = nearest_prototype(z, torch.tensor(self.cluster_centers_, dtype=z.dtype)).numpy()
        return found

    def transform(self, X: Any) -> Array:
        """Soft assignments at ``temperature_``, ``(n_samples, n_clusters)``: rows sum to 1, larger is nearer.

        ``KMeans.transform`` returns distances instead.
        """
        check_is_fitted(self)
        z = self._tensor(X, reset=False)
        found: Array = soft_assign(z, torch.tensor(self.cluster_centers_, dtype=z.dtype), self.temperature_).numpy()
        return found

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the inertia of ``X``, as for ``KMeans``: larger is better."""
        check_is_fitted(self)
        z = self._tensor(X, reset=False)
        return -_inertia(z, torch.tensor(self.cluster_centers_, dtype=z.dtype))

    # Inside -------------------------------------------------------------------------------------

    def _fit(self, z: Tensor) -> None:
        if len(z) < self.n_clusters:
            raise ValueError(f"n_samples={len(z)} should be >= n_clusters={self.n_clusters}. Use fewer clusters.")
        center = z.mean(0)
        centred = z - center
        critical = float(critical_temperature(centred, detach_assignments=True))
        if not critical > torch.finfo(z.dtype).eps ** 2 * float(z.square().sum(1).max()):
            raise ValueError(f"X must vary to be clustered; got n_samples={len(z)} that are all equal. Check the data.")
        schedule = critical * np.geomspace(self.start, self.end, self.n_temperatures)
        # The generator must advance between fits where the user gave one, and not where they gave a seed.
        seeds = check_random_state(self.random_state).randint(np.iinfo(np.int32).max, size=self.n_init)
        best: _Run | None = None
        for seed in seeds:
            run = _Run(centred, schedule, self._start(centred, int(seed)), self.max_iter, self.tol, int(seed))
            # Restarts that end in the same optimum tie up to rounding; the first one wins, on every machine.
            if best is None or run.loss < best.loss * (1 - 1e-6):
                best = run
        assert best is not None
        if not best.converged:
            warnings.warn(
                f"DDCLClustering did not settle at its last temperature within max_iter = {self.max_iter} iterations. "
                "Raise max_iter or tol.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.temperature_, self.critical_temperature_, self.n_iter_ = float(schedule[-1]), critical, best.iterations
        self._store(z, best.prototypes + center, best.mass)

    def _start(self, centred: Tensor, seed: int) -> Tensor:
        if self.init == "mean":
            return centred.new_zeros(self.n_clusters, centred.shape[1])
        try:
            return initial_prototypes(centred, self.n_clusters, num_restarts=1, seed=seed).to(centred.dtype)
        except ValueError as error:  # in the words of another interface
            raise ValueError(
                f"n_clusters must not exceed the number of distinct samples; got {self.n_clusters} clusters for "
                f"{len(torch.unique(centred, dim=0))}. Use fewer clusters."
            ) from error

    def _store(self, z: Tensor, prototypes: Tensor, mass: Tensor) -> None:
        self.cluster_centers_: Array = prototypes.numpy()
        self.mass_: Array = mass.numpy()
        self.labels_: Array = nearest_prototype(z, prototypes).numpy()
        self.loss_ = Decomposition(*(float(term) for term in decompose(z, prototypes, self.temperature_)))  # type: ignore[arg-type]
        self.inertia_ = _inertia(z, prototypes)
        self._n_features_out = self.n_clusters

    def _tensor(self, X: Any, *, reset: bool) -> Tensor:
        checked = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], order="C")
        return torch.tensor(checked)  # a copy: a read-only memory map cannot be shared with torch

    def _check_arguments(self) -> None:
        for name in ("n_clusters", "n_temperatures", "n_init", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")
        if self.init not in ("kmeans", "mean"):
            raise ValueError(f"init must be 'kmeans' or 'mean'; got {self.init!r}.")
        for name in ("start", "end", "tol"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number; got {getattr(self, name)!r}.")
        if not 0 < self.end <= self.start < np.inf:
            raise ValueError(
                "start and end must be finite with 0 < end <= start, fractions of the critical temperature; got "
                f"start = {self.start!r} and end = {self.end!r}."
            )
        if not self.tol >= 0:
            raise ValueError(f"tol must be >= 0; got {self.tol!r}.")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class _Run:
    """One annealing of centred data ``(N, d)``.

    Attributes:
        prototypes: ``(K, d)``.
        mass: Soft number of samples of each, ``(K,)``.
        loss: ``L_q`` at the last temperature.
        iterations: Over all temperatures.
        converged: Whether the last temperature was left by ``tol``.
    """

    def __init__(self, z: Tensor, schedule: Array, p: Tensor, max_iter: int, tol: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        spread = float(z.square().sum(1).mean()) ** 0.5
        log_mass = torch.empty(0)
        self.iterations = 0
        for temperature in schedule:
            # Prototypes that coincide are a fixed point at every temperature, though an unstable one.
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p = p + NUDGE * float(temperature) ** 0.5 / z.shape[1] ** 0.5 * noise
            for _ in range(max_iter):
                log_mass, latest = token_means(z, p, float(temperature))
                moved = float((latest - p).square().sum(1).max()) ** 0.5
                p, self.iterations = latest, self.iterations + 1
                self.converged = moved <= tol * spread
                if self.converged:
                    break
        self.prototypes, self.mass = p, log_mass.exp()
        self.loss = float(decompose(z, p, float(schedule[-1])).loss)


def _inertia(z: Tensor, prototypes: Tensor) -> float:
    nearest = prototypes[nearest_prototype(z, prototypes)]
    return float((z - nearest).square().sum(dtype=torch.float64))
