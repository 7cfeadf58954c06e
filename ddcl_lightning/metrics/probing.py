"""Readouts of a whole data set, judged from outside by scikit-learn: linear probe and k-means."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ddcl_lightning._utils.batch import Batch, class_labels, index
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.functional._common import masked_mean
from ddcl_lightning.metrics.clustering_metrics import ClusteringMetrics
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.initialization import initial_prototypes

if TYPE_CHECKING:
    from ddcl_lightning.tasks.readout_module import ReadoutModule

MAX_SAMPLES = 65_536
CLUSTERING_METRICS = ("acc", "nmi", "ari", "usage", "perplexity")
UNLABELLED_METRICS = ("r2", "usage", "perplexity")


@dataclass
class Readouts:
    """Readouts of a module for M samples; rows are samples, on the CPU in float32.

    Attributes:
        pooled: The head's summaries, ``(M, pooled_dim)``.
        mean: Mean valid token as the backbone gives it, ``(M, D)``.
        first: First token (CLS where the encoder has one), ``(M, D)``.
        inputs: The mean token as the head's last bank sees it, projected and scaled, ``(M, H * d)``; ``(M, 0)``
            without a bank.
        labels: ``(M,)`` int64, -1 where unknown.
        clusters: Strongest prototype per head, ``(M, H)``; ``(M, 0)`` where the head gives no assignments.
        index: Position of each sample in its data set, ``(M,)`` int64, -1 where the batch has none.
    """

    pooled: Tensor
    mean: Tensor
    first: Tensor
    inputs: Tensor
    labels: Tensor
    clusters: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def labelled(self) -> "Readouts":
        """The rows that have a label."""
        return self.rows(self.labels >= 0)

    def in_order(self) -> "Readouts":
        """One row per sample of the data set, in its order, however several processes shared it; needs ``index``."""
        if bool((self.index < 0).any()):
            return self
        return self.rows(torch.from_numpy(np.unique(self.index.numpy(), return_index=True)[1]))

    def rows(self, chosen: Tensor) -> "Readouts":
        """Some rows, by a mask ``(M,)`` or indices."""
        return Readouts(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def cat(readouts: Iterable["Readouts"]) -> "Readouts":
        """The rows of all parts, in order."""
        chunks = list(readouts)
        return Readouts(*(torch.cat([getattr(chunk, field.name) for chunk in chunks]) for field in fields(Readouts)))


@torch.no_grad()
def collect_readouts(
    module: "ReadoutModule",
    batches: Iterable[Batch],
    *,
    tokens: Mapping[str, Reservoir] | None = None,
    to_device: Callable[[Batch], Batch] | None = None,
    max_samples: int = MAX_SAMPLES,
) -> Readouts:
    """Run backbone and head in evaluation mode over batches; modes are put back afterwards.

    Args:
        module: Backbone and head.
        batches: A data loader, or any batches.
        tokens: Takes a sample of the tokens that banks of the head see, by the name of the bank.
        to_device: Moves a batch to the module.
        max_samples: Stop after the batch that reaches this number.

    Raises:
        ValueError: If there is no batch.
    """
    banks = find_banks(module.head)
    name, bank = list(banks.items())[-1] if banks else ("", None)
    records: dict[str, BankRecord] = {}
    chunks: list[Readouts] = []
    done = 0
    with evaluating(module), record_codebooks(banks, records.__setitem__):
        for batch in batches:
            if to_device is not None:
                batch = to_device(batch)
            values, mask = module.backbone(batch)
            readout = module.head(values, mask)
            size = len(values)
            clusters, position = readout.assignments, index(batch)
            chunks.append(
                Readouts(
                    readout.pooled.float().cpu(),
                    _mean_token(values, mask),
                    values[:, 0].float().cpu(),
                    _mean_input(records[name], size) if bank else torch.empty(size, 0),
                    class_labels(batch),
                    torch.empty(size, 0, dtype=torch.int64) if clusters is None else clusters.argmax(-1).cpu(),
                    torch.full((size,), -1) if position is None else position.cpu().long(),
                )
            )
            for place, sample in (tokens or {}).items():
                sample.add(records[place].rows())
            done += size
            if done >= max_samples:
                break
    if not chunks:
        raise ValueError("batches must hold at least one batch; got none. Check the data loader.")
    return Readouts.cat(chunks)


class ProbeScore(NamedTuple):
    """Accuracy and macro F1 of a linear probe, in [0, 1]."""

    acc: float
    f1: float


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, regularization: float = 1.0
) -> ProbeScore:
    """Logistic regression (scikit-learn, standardized features) on frozen readouts.

    Args:
        train_x: ``(N, P)``.
        train_y: ``(N,)`` integers, at least two classes.
        test_x: ``(M, P)``.
        test_y: ``(M,)`` integers.
        regularization: scikit-learn's inverse strength C > 0.

    Raises:
        ValueError: If a set is empty, not finite, or the training labels have a single class.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(
                f"{name}_x and {name}_y must have the same number of rows, at least 1; got {len(x)}, {len(y)}. Take "
                "both from the same samples."
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}_x must be finite; got NaN or infinity. Check the encoder.")
    if len(torch.unique(train_y)) < 2:
        raise ValueError(
            f"train_y must hold at least two classes; got {torch.unique(train_y).tolist()}. Leave the probe out, or "
            "give samples of another class."
        )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=2000))
    classifier.fit(train_x.double().numpy(), train_y.numpy())
    predictions: Any = classifier.predict(test_x.double().numpy())
    return ProbeScore(
        float(accuracy_score(test_y.numpy(), predictions)),
        float(f1_score(test_y.numpy(), predictions, average="macro")),
    )


def kmeans_scores(
    points: Tensor,
    truth: Tensor,
    num_clusters: int,
    *,
    num_restarts: int = 10,
    seed: int = 0,
    space: Tensor | None = None,
) -> dict[str, float]:
    """k-means (scikit-learn, best of several k-means++ runs) on the rows, judged like a readout's clusters.

    Args:
        points: ``(M, P)``.
        truth: ``(M,)`` labels, -1 where unknown.
        num_clusters: K.
        num_restarts: Runs of k-means.
        seed: Seed of the first run.
        space: ``(M, Q)``, where R^2 is measured; by default the points.

    Returns:
        :data:`CLUSTERING_METRICS`; without labels :data:`UNLABELLED_METRICS`; empty where fewer than K rows differ.
    """
    if len(torch.unique(points, dim=0)) < num_clusters:
        return {}
    centers = initial_prototypes(points, num_clusters, num_restarts=num_restarts, seed=seed)
    clusters = torch.cdist(points.double(), centers).argmin(1)
    return clustering_scores(clusters, truth, num_clusters, points if space is None else space)


def clustering_scores(
    clusters: Tensor, truth: Tensor, num_clusters: int, points: Tensor | None = None
) -> dict[str, float]:
    """Metrics of clusters ``(M,)`` against labels, or without any of how tight they are.

    Args:
        clusters: ``(M,)``, in ``[0, num_clusters)``.
        truth: Labels ``(M,)``, -1 where unknown.
        num_clusters: K.
        points: ``(M, Q)``, what was clustered; None leaves R^2 out.

    Returns:
        :data:`CLUSTERING_METRICS`, or :data:`UNLABELLED_METRICS` where no label is known.
    """
    labelled = bool((truth >= 0).any())
    # The rows are those of all processes already, and the first process may be the only one here.
    metric = ClusteringMetrics(num_clusters, int(truth.max()) + 1 if labelled else 1, sync_on_compute=False)
    metric.update(clusters, truth)
    values = metric.compute()
    if labelled:
        return {name: float(values[name]) for name in CLUSTERING_METRICS}
    tightness = {} if points is None else {"r2": explained_variance(points, clusters)}
    return {**tightness, **{name: float(values[name]) for name in UNLABELLED_METRICS[1:]}}


def explained_variance(points: Tensor, clusters: Tensor) -> float:
    """R^2 of a clustering: 1 less its inertia (around the means of its clusters) relative to the total, in [0, 1].

    Args:
        points: ``(M, Q)``.
        clusters: ``(M,)`` int64, at least 0.

    Returns:
        R^2; 0 where the points do not vary.
    """
    rows = points.double() - points.double().mean(0)
    members = torch.bincount(clusters).clamp(min=1).unsqueeze(1)
    sums = rows.new_zeros(len(members), rows.shape[1]).index_add_(0, clusters, rows)
    total = float(rows.square().sum())
    between = float((sums.square() / members).sum())
    return min(1.0, between / total) if total > 0 else 0.0


def _mean_token(values: Tensor, mask: Tensor | None) -> Tensor:
    return masked_mean(values.float(), mask, dim=-2).cpu()


def _mean_input(record: BankRecord, samples: int) -> Tensor:
    """Mean of each sample's tokens as a bank saw them, the heads side by side, ``(B, H * d)``."""
    rows = record.tokens.transpose(0, 1).flatten(1)
    tokens = rows.reshape(samples, -1, rows.shape[1])
    return _mean_token(tokens, None if record.mask is None else record.mask[0].reshape(samples, -1))
