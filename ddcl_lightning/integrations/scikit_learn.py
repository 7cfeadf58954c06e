"""DDCL clustering for scikit-learn: prototypes annealed from the data, without a network and without Lightning."""

import warnings
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ddcl_lightning.functional import (
    Decomposition,
    TokenStatistics,
    critical_temperature,
    decompose,
    nearest_prototype,
    soft_assign,
    token_means,
)
from ddcl_lightning.functional.hard_phase import hard_means, hard_phase
from ddcl_lightning.nn.initialization import initial_prototypes

Array = npt.NDArray[Any]
SOFT_END = 0.005  # fraction of the critical temperature at which annealing hands over to the hard phase
HANDED_OVER = 10.0  # multiple of tol that is good enough for it
KMEANS_RUNS = 10  # of the k-means that a hard phase is never worse than
NUDGE = 0.03  # parts prototypes that coincide, in units of the thermal length sqrt(T)


class DDCLClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Clustering by deterministic annealing of DDCL prototypes.

    Prototypes start soft, at a fraction of the critical temperature ``T_c = 2 lambda_max(Cov)`` above which all of them
    sit at the mean of the data (Rose, Proc. IEEE 86, 1998), and follow the temperature down. At each one they iterate
    ``p_k <- sum_n w_kn z_n``, where ``w`` are the soft assignments (eq. 2) normalized over *samples* in log space:
    the fixed point of the quantization loss with assignments held constant, and the step of
    :class:`~ddcl_lightning.TokenNormalized` at rate 1.

    By default the last step is T -> 0: prototypes become the means of the samples nearest to them, those of little use
    are moved to where the error is, and the restart with the smallest inertia wins. What ``KMeans(n_init=10)`` finds
    with the same ``random_state`` is one of the starts of this phase, so with ``init="kmeans"`` the inertia is never
    larger than its, but for rounding, at many times the cost; tables are in ``docs/measurements.md`` ("The estimator").
    With a number for ``end`` the prototypes stay soft: they are the fixed point at that temperature, whose inertia may
    be far higher where one direction of the data, or a few outliers, hold nearly all the variance.

    Distances are Euclidean and unweighted, as for k-means: put a scaler, or ``PCA(whiten=True)``, before it.

    Args:
        n_clusters: K, at least 1 and at most the number of samples.
        init: ``"kmeans"`` (one run of k-means++) or ``"mean"`` (all at the mean, parted by tiny nudges).
        start: First temperature as a fraction of the critical one, > 0. At 1 and above every start is forgotten; far
            below, the result is as arbitrary as the start.
        end: Last temperature as a fraction of the critical one, in (0, ``start``]; the lower, the harder. None anneals
            to 0.005 and then goes on to T -> 0.
        n_temperatures: Temperatures of the annealing, evenly spaced in their logarithm, at least 1.
        n_init: Restarts, at least 1; the smallest loss at the last temperature wins, the smallest inertia at T -> 0.
        max_iter: Largest number of iterations at each temperature, at least 1.
        tol: An iteration that moves the prototypes less than this share of the data's total standard deviation ends
            a temperature, >= 0; ten times that where T -> 0 follows, which does the rest.
        random_state: Seed, generator or None, of the start and of the tiny nudges that part prototypes.

    Attributes:
        cluster_centers_: Prototypes ``(n_clusters, n_features)``.
        labels_: Nearest prototype of each sample of the last fit, ``(n_samples,)``.
        temperature_: Temperature of the soft assignments, in units of squared distance: the last one of the annealing.
            After a hard phase that of spherical normal clusters, ``2 inertia_ / (n_samples n_features)``, where it is
            lower: the spread of the data may say nothing about that of its clusters.
        critical_temperature_: ``T_c`` of the data.
        loss_: ``(loss, ols, variance)`` of the last fit at ``temperature_``, means over samples;
            ``loss = ols + variance`` (eq. 3).
        inertia_: Sum of squared distances to the nearest prototype.
        mass_: Number of samples of each prototype, ``(n_clusters,)``, soft where ``end`` is given; ``partial_fit`` adds
            to it.
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
        end: float | None = None,
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
        self._fit(*self._read(X, reset=True))
        return self

    def partial_fit(self, X: Any, y: Any = None) -> "DDCLClustering":
        """Learn from one batch of a stream: the first call is ``fit``, later ones move prototypes to a running mean.

        The temperature stays that of the first batch, which should therefore be a fair sample. Every prototype is the
        mean of all samples so far, weighted by the assignments they had when they came: soft where ``end`` is given.
        ``labels_``, ``loss_`` and ``inertia_`` are those of the last batch.

        Args:
            X: ``(n_samples, n_features)``.
            y: Ignored.
        """
        self._check_arguments()
        if not hasattr(self, "cluster_centers_"):
            return self.fit(X)
        z, dtype = self._read(X, reset=False)
        prototypes = self._prototypes()
        so_far = TokenStatistics(torch.tensor(self.mass_, dtype=z.dtype).log(), prototypes)
        latest = hard_means(z, prototypes) if self.end is None else token_means(z, prototypes, self.temperature_)
        total = so_far.merge(latest)
        self._store(z, total.mean, total.log_mass.exp(), dtype)
        self.n_iter_ += 1
        return self

    def predict(self, X: Any) -> Array:
        """Nearest prototype of each sample, ``(n_samples,)`` integers."""
        check_is_fitted(self)
        z, _ = self._read(X, reset=False)
        labels: Array = nearest_prototype(z, self._prototypes()).numpy()
        return labels

    def transform(self, X: Any) -> Array:
        """Soft assignments at ``temperature_``, ``(n_samples, n_clusters)``: rows sum to 1, larger is nearer.

        ``KMeans.transform`` returns distances instead.
        """
        check_is_fitted(self)
        z, dtype = self._read(X, reset=False)
        shares: Array = soft_assign(z, self._prototypes(), self.temperature_).numpy().astype(dtype)
        return shares

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the inertia of ``X``, as for ``KMeans``: larger is better."""
        check_is_fitted(self)
        z, _ = self._read(X, reset=False)
        return -_inertia(z, self._prototypes())

    # Inside -------------------------------------------------------------------------------------

    def _fit(self, z: Tensor, dtype: npt.DTypeLike) -> None:
        if len(z) < self.n_clusters:
            raise ValueError(f"n_samples={len(z)} should be >= n_clusters={self.n_clusters}. Use fewer clusters.")
        center = z.mean(0)
        centred = z - center
        critical = float(critical_temperature(centred, detach_assignments=True))
        if not critical > torch.finfo(z.dtype).eps ** 2 * float(z.square().sum(1).max()):
            raise ValueError(f"X must vary to be clustered; got n_samples={len(z)} that are all equal. Check the data.")
        end = min(SOFT_END, self.start) if self.end is None else self.end
        schedule = critical * np.geomspace(self.start, end, self.n_temperatures)
        tol = HANDED_OVER * self.tol if self.end is None else self.tol
        # The generator must advance between fits where the user gave one, and not where they gave a seed.
        seeds = check_random_state(self.random_state).randint(np.iinfo(np.int32).max, size=self.n_init)
        best: _Run | None = None
        for number, seed in enumerate(seeds):
            start = self._start(centred, int(seed))
            run = _Run(centred, schedule, start, self.max_iter, tol, int(seed))
            if self.end is None:
                starts = [start]
                if number == 0 and self.init == "kmeans":  # what this promises to be no worse than
                    own = self.random_state if isinstance(self.random_state, (int, np.integer)) else seed
                    starts.append(_of_kmeans(z, self.n_clusters, int(own)) - center)
                run.harden(centred, starts, int(seed))
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
        prototypes, mass = best.prototypes + center, best.mass
        if self.end is None:
            log_mass, prototypes = hard_means(z, prototypes)[:2]  # without the rounding of the shift by the mean
            mass = log_mass.exp().round()
            spherical = 2 * best.loss * len(z) / z.numel()
            self.temperature_ = min(self.temperature_, max(spherical, critical * torch.finfo(z.dtype).eps))
        self._store(z, prototypes, mass, dtype)

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

    def _store(self, z: Tensor, prototypes: Tensor, mass: Tensor, dtype: npt.DTypeLike) -> None:
        self.cluster_centers_: Array = prototypes.numpy().astype(dtype)
        self.mass_: Array = mass.numpy()
        prototypes = self._prototypes()
        self.labels_: Array = nearest_prototype(z, prototypes).numpy()
        self.loss_ = Decomposition(*(float(term) for term in decompose(z, prototypes, self.temperature_)))  # type: ignore[arg-type]
        self.inertia_ = _inertia(z, prototypes)
        self._n_features_out = self.n_clusters

    def _prototypes(self) -> Tensor:
        return torch.tensor(self.cluster_centers_, dtype=torch.float64)

    def _read(self, X: Any, *, reset: bool) -> tuple[Tensor, npt.DTypeLike]:
        """Samples in float64 and their own dtype, which results have: far outliers take the digits of float32."""
        checked = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], order="C")
        # A copy: a read-only memory map cannot be shared with torch.
        return torch.tensor(checked, dtype=torch.float64), checked.dtype

    def _check_arguments(self) -> None:
        for name in ("n_clusters", "n_temperatures", "n_init", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}. Pass 1 or more.")
        if self.init not in ("kmeans", "mean"):
            raise ValueError(f"init must be 'kmeans' or 'mean'; got {self.init!r}. Choose one of them.")
        for name in ("start", "end", "tol"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (name == "end" and value is None):
                raise ValueError(
                    f"{name} must be a number{', or None' * (name == 'end')}; got {value!r}. Pass a number."
                )
        if not 0 < (self.start if self.end is None else self.end) <= self.start < np.inf:
            raise ValueError(
                "start and end must be finite with 0 < end <= start, fractions of the critical temperature; got start "
                f"= {self.start!r} and end = {self.end!r}. Swap them, or leave both out."
            )
        if not self.tol >= 0:
            raise ValueError(f"tol must be >= 0; got {self.tol!r}. Pass 0 or more.")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class _Run:
    """One annealing of centred data ``(N, d)``.

    Attributes:
        prototypes: ``(K, d)``.
        mass: Soft number of samples of each, ``(K,)``.
        loss: ``L_q`` at the last temperature; after :meth:`harden` at T -> 0, the inertia of a sample.
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
                log_mass, latest = token_means(z, p, float(temperature))[:2]
                moved = float((latest - p).square().sum(1).max()) ** 0.5
                p, self.iterations = latest, self.iterations + 1
                self.converged = moved <= tol * spread
                if self.converged:
                    break
        self.prototypes, self.mass = p, log_mass.exp()
        self.loss = float(decompose(z, p, float(schedule[-1])).loss)

    def harden(self, z: Tensor, starts: list[Tensor], seed: int) -> None:
        """Go on to T -> 0, from where annealing ended or, if that is better already, from one of the starts."""
        self.prototypes, inertia = hard_phase(z, [self.prototypes, *starts], seed)
        self.loss = inertia / len(z)


def _of_kmeans(z: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Centers of ``KMeans``; on the data as they are, for what it draws hangs on rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(n_clusters, n_init=KMEANS_RUNS, random_state=seed).fit(z.numpy())
    return torch.from_numpy(model.cluster_centers_).to(z.dtype)


def _inertia(z: Tensor, prototypes: Tensor) -> float:
    nearest = prototypes[nearest_prototype(z, prototypes)]
    return float((z - nearest).square().sum(dtype=torch.float64))
