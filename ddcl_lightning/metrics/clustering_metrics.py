"""Agreement of a hard clustering with labels, and use of the codebook, all from one K x C matrix of counts.

Each metric is a function of the count matrix; :class:`ClusteringMetrics` accumulates that matrix. Its memory
does not grow with the number of samples, and the matrices of several processes add up to that of all samples.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional._common import require_integers


def count_matrix(assignments: Tensor, labels: Tensor, num_clusters: int, num_classes: int) -> Tensor:
    """Number of samples per cluster and class; samples without a label are left out.

    Args:
        assignments: Cluster of each sample, ``(N,)`` integers in [0, K).
        labels: Class of each sample, ``(N,)`` integers below C; any negative value means "no label".
        num_clusters: K.
        num_classes: C.

    Returns:
        Counts, ``(K, C)`` int64, on the device of ``assignments``.

    Raises:
        TypeError: If an argument is not an integer tensor.
        ValueError: If shapes differ or a value is out of range.
    """
    _check_indices("assignments", assignments, num_clusters, "num_clusters", lowest=0)
    _check_indices("labels", labels, num_classes, "num_classes", lowest=None)
    if assignments.shape != labels.shape:
        raise ValueError(
            f"assignments and labels must have the same length; got {len(assignments)} and {len(labels)}. "
            "Pass one label per sample, -1 where it is unknown."
        )
    labelled = labels >= 0
    cells = assignments[labelled].long() * num_classes + labels[labelled].long()
    return torch.bincount(cells, minlength=num_clusters * num_classes).reshape(num_clusters, num_classes)


def hungarian_matching(counts: Tensor) -> Tensor:
    """One-to-one matching of clusters to classes that maximizes the number of agreeing samples.

    Args:
        counts: ``(K, C)`` counts.

    Returns:
        Class of each cluster, ``(K,)`` int64; -1 for the K - C clusters left over where K > C.
    """
    matrix = _as_matrix(counts)
    clusters, classes = linear_sum_assignment(matrix, maximize=True)
    matching = torch.full((matrix.shape[0],), -1, dtype=torch.int64)
    matching[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return matching.to(counts.device)


def hungarian_accuracy(counts: Tensor) -> Tensor:
    """Clustering accuracy: share of samples whose class is the one matched to their cluster.

    Args:
        counts: ``(K, C)`` counts; K and C may differ, unmatched clusters count as errors.

    Returns:
        Scalar in [0, 1].
    """
    matrix = _as_matrix(counts)
    clusters, classes = linear_sum_assignment(matrix, maximize=True)
    return _scalar(matrix[clusters, classes].sum() / matrix.sum(), counts)


def purity(counts: Tensor) -> Tensor:
    """Share of samples in the majority class of their cluster; grows with K, 1 for K = N.

    Args:
        counts: ``(K, C)`` counts.

    Returns:
        Scalar in [0, 1].
    """
    matrix = _as_matrix(counts)
    return _scalar(matrix.max(axis=1).sum() / matrix.sum(), counts)


def normalized_mutual_info(counts: Tensor) -> Tensor:
    """Mutual information over the arithmetic mean of both entropies, the default of scikit-learn.

    Args:
        counts: ``(K, C)`` counts.

    Returns:
        Scalar in [0, 1]; 1 where there is a single cluster and a single class, as in scikit-learn.
    """
    matrix = _as_matrix(counts)
    joint = matrix / matrix.sum()
    clusters, classes = joint.sum(axis=1), joint.sum(axis=0)
    mean_entropy = 0.5 * (_entropy(clusters) + _entropy(classes))
    if mean_entropy == 0:
        return _scalar(1.0, counts)
    filled = joint > 0
    ratio = joint[filled] / np.outer(clusters, classes)[filled]
    mutual_information = max(0.0, float((joint[filled] * np.log(ratio)).sum()))
    return _scalar(mutual_information / mean_entropy, counts)


def adjusted_rand_index(counts: Tensor) -> Tensor:
    """Rand index adjusted for chance (Hubert and Arabie, 1985), as in scikit-learn.

    Args:
        counts: ``(K, C)`` counts.

    Returns:
        Scalar in [-0.5, 1]; 0 in expectation for a random clustering.
    """
    matrix = _as_matrix(counts)
    # Products of pair counts reach N^4: Python integers do not overflow and keep the differences exact.
    n = int(matrix.sum())
    together = int((matrix**2).sum())
    same_cluster = int((matrix.sum(axis=1) ** 2).sum())
    same_class = int((matrix.sum(axis=0) ** 2).sum())
    true_positive = together - n
    false_positive = same_cluster - together
    false_negative = same_class - together
    true_negative = n**2 - together - false_positive - false_negative
    if false_positive == 0 and false_negative == 0:
        return _scalar(1.0, counts)
    agreement = 2 * (true_positive * true_negative - false_negative * false_positive)
    chance = (true_positive + false_negative) * (false_negative + true_negative)
    chance += (true_positive + false_positive) * (false_positive + true_negative)
    return _scalar(agreement / chance, counts)


def usage(counts: Tensor) -> Tensor:
    """Share of the clusters that hold at least one sample.

    Args:
        counts: ``(K, C)`` counts, or samples per cluster ``(K,)``.

    Returns:
        Scalar in (0, 1].
    """
    return _scalar((_as_sizes(counts) > 0).mean(), counts)


def perplexity(counts: Tensor) -> Tensor:
    """Effective number of clusters in use: exponential of the entropy (in nats) of the cluster sizes.

    Args:
        counts: ``(K, C)`` counts, or samples per cluster ``(K,)``.

    Returns:
        Scalar in [1, K]; K where all clusters have the same size.
    """
    sizes = _as_sizes(counts)
    return _scalar(np.exp(_entropy(sizes / sizes.sum())), counts)


class ClusteringMetrics(Metric):
    """Counts of clusters against classes, from which all metrics of this module are computed at once.

    Samples with a negative label count for ``usage`` and ``perplexity`` only.

    Args:
        num_clusters: Number of prototypes K, at least 1.
        num_classes: Number of classes C, at least 1; may differ from K.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Attributes:
        counts: Labelled samples per cluster and class, ``(K, C)`` int64.
        sizes: All samples per cluster, ``(K,)`` int64.

    Raises:
        ValueError: If ``num_clusters`` or ``num_classes`` is below 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    sizes: Tensor

    @typed
    def __init__(self, num_clusters: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_clusters", num_clusters), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Count prototypes or classes.")
        self.num_clusters = num_clusters
        self.num_classes = num_classes
        zeros = torch.zeros(num_clusters, num_classes, dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")
        self.add_state("sizes", zeros[:, 0].clone(), dist_reduce_fx="sum")

    def resize(self, num_clusters: int) -> None:
        """Reset the counts, with another K, for a bank whose size has changed."""
        self.num_clusters = num_clusters
        zeros = torch.zeros(num_clusters, self.num_classes, dtype=torch.int64, device=self.counts.device)
        self.add_state("counts", zeros, dist_reduce_fx="sum")
        self.add_state("sizes", zeros[:, 0].clone(), dist_reduce_fx="sum")

    def update(self, assignments: Tensor, labels: Tensor) -> None:
        """Add the clusters and labels of a batch.

        Args:
            assignments: Cluster of each sample, ``(N,)`` integers in [0, K).
            labels: Class of each sample, ``(N,)`` integers below C; negative for "no label".
        """
        self.counts += count_matrix(assignments, labels, self.num_clusters, self.num_classes)
        self.sizes += torch.bincount(assignments.long(), minlength=self.num_clusters)

    def compute(self) -> dict[str, Tensor]:
        """Metrics of all samples since the last reset, over all processes.

        Returns:
            Scalars ``acc``, ``nmi``, ``ari``, ``purity``, ``usage``, ``perplexity``. The first four are NaN
            where no sample has a label.

        Raises:
            RuntimeError: If no sample was seen.
        """
        if not self.sizes.any():
            raise RuntimeError(
                "ClusteringMetrics must see at least one sample before compute(); got none since the last "
                "reset. Call update(assignments, labels) first."
            )
        undefined = None if self.counts.any() else _scalar(float("nan"), self.counts)
        agreement = {
            "acc": hungarian_accuracy,
            "nmi": normalized_mutual_info,
            "ari": adjusted_rand_index,
            "purity": purity,
        }
        values = {name: f(self.counts) if undefined is None else undefined for name, f in agreement.items()}
        return values | {"usage": usage(self.sizes), "perplexity": perplexity(self.sizes)}


def _check_indices(name: str, values: Tensor, size: int, size_name: str, lowest: int | None) -> None:
    """Refuse anything but a vector of integers in [lowest, size)."""
    require_integers(name, values)
    if values.dim() != 1:
        raise ValueError(f"{name} must have one dimension, (N,); got shape {tuple(values.shape)}. Use .flatten().")
    if not len(values):
        return
    low, high = (int(v) for v in values.aminmax())
    if high >= size:
        raise ValueError(f"{name} must be below {size_name}={size}; got {high}. Raise {size_name} or remap the values.")
    if lowest is not None and low < lowest:
        raise ValueError(f"{name} must be at least {lowest}; got {low}. Leave out the samples that have no cluster.")


def _as_matrix(counts: Tensor) -> npt.NDArray[np.int64]:
    if counts.dim() != 2:
        raise ValueError(f"counts must have shape (K, C); got {tuple(counts.shape)}. Build it with count_matrix().")
    return _as_numpy(counts)


def _as_sizes(counts: Tensor) -> npt.NDArray[np.int64]:
    if counts.dim() not in (1, 2):
        raise ValueError(f"counts must have shape (K, C) or (K,); got {tuple(counts.shape)}. Sum the other dimensions.")
    sizes: npt.NDArray[np.int64] = _as_numpy(counts).reshape(counts.shape[0], -1).sum(axis=1)
    return sizes


def _as_numpy(counts: Tensor) -> npt.NDArray[np.int64]:
    if counts.is_floating_point() or counts.dtype == torch.bool:
        raise TypeError(f"counts must be integers; got {counts.dtype}. Count the samples, do not normalize.")
    matrix: npt.NDArray[np.int64] = counts.detach().long().cpu().numpy()
    if not matrix.any():
        raise ValueError("counts must hold at least one sample; got zeros only. Count some samples first.")
    return matrix


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    """Entropy in nats of shares that sum to 1; exactly 0 for a single share."""
    positive = shares[shares > 0]
    return abs(float((positive * np.log(positive)).sum()))


def _scalar(value: float | np.floating[Any], counts: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    dtype = torch.float32 if counts.device.type == "mps" else torch.float64
    return torch.tensor(float(value), dtype=dtype, device=counts.device)
