"""Readouts of a data set and what scikit-learn says of them."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, IdentityBackbone
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.metrics.probing import (
    CLUSTERING_METRICS,
    UNLABELLED_METRICS,
    Readouts,
    clustering_scores,
    collect_readouts,
    explained_variance,
    kmeans_scores,
    linear_probe,
)
from tests.tiny import Blobs, loader


def masked_batches(batches: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(5, 6, 4, generator=generator),
            "mask": torch.arange(6) < torch.tensor([6, 3, 1, 2, 5]).unsqueeze(1),
            "y": torch.tensor([0, 1, -1, 1, 0]),
        }
        for _ in range(batches)
    ]


def test_rows_are_samples_in_order_without_padding() -> None:
    batches = masked_batches()
    head = DDCLReadout(3, num_heads=2, prototype_dim=3, pooling="both", embedding_scale="none")
    module = DDCLReadoutModule(IdentityBackbone(4), head, Clustering())
    module.backbone.eval()
    sample = Reservoir(10_000)
    readouts = collect_readouts(module, batches, tokens={"attention.bank": sample})
    assert len(readouts) == 15
    first = batches[0]
    assert torch.allclose(readouts.mean[1], first["x"][1, :3].mean(0))
    assert torch.equal(readouts.first[:5], first["x"][:, 0])
    assert torch.allclose(
        readouts.inputs[1],
        torch.nn.functional.linear(first["x"][1, :3], head.attention.input_projection.weight).mean(0),
    )
    assert readouts.pooled.shape == (15, 2 * 3 + 2 * 3)
    assert readouts.clusters.shape == (15, 2)
    assert len(readouts.labelled()) == 12
    assert sample.gather().shape == (3 * 17, 2, 3)
    assert module.head.training
    assert not module.backbone.training


def test_it_stops_at_the_limit_and_refuses_nothing_at_all() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(3), Clustering())
    assert len(collect_readouts(module, masked_batches(), max_samples=6)) == 10
    with pytest.raises(ValueError, match="at least one batch"):
        collect_readouts(module, [])


def test_cat_keeps_every_column() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(4), Clustering())
    readouts = collect_readouts(module, loader())
    both = Readouts.cat([readouts, readouts])
    assert len(both) == 128
    assert torch.equal(both.labels[64:], readouts.labels)


def test_linear_probe_is_logistic_regression_on_standardised_features() -> None:
    x, y = torch.randn(300, 6), torch.randint(3, (300,))
    x[:, 0] += y
    score = linear_probe(x[:200], y[:200], x[200:], y[200:], regularization=0.5)
    scaler = StandardScaler().fit(x[:200].double())
    model = LogisticRegression(C=0.5, max_iter=2000).fit(scaler.transform(x[:200].double()), y[:200])
    predicted = model.predict(scaler.transform(x[200:].double()))
    assert score.acc == pytest.approx(float((predicted == y[200:].numpy()).mean()))
    assert score.f1 == pytest.approx(f1_score(y[200:].numpy(), predicted, average="macro"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(0, 2), torch.ones(0), torch.ones(1, 2), torch.ones(1)), "train_x and train_y"),
        ((torch.ones(3, 2), torch.arange(3), torch.ones(1, 2), torch.ones(2)), "test_x and test_y"),
        ((torch.full((3, 2), torch.nan), torch.arange(3), torch.ones(1, 2), torch.ones(1)), "train_x must be finite"),
        ((torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), torch.ones(1)), "at least two classes; got"),
    ],
)
def test_linear_probe_refuses_rows_and_labels_that_do_not_fit(
    arguments: tuple[torch.Tensor, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe(*arguments)


def test_kmeans_scores_are_those_of_scikit_learns_clusters() -> None:
    blobs = Blobs()
    scores = kmeans_scores(blobs.x, blobs.y, 4, num_restarts=3)
    assert tuple(scores) == CLUSTERING_METRICS
    labels = KMeans(4, n_init=3, random_state=0).fit_predict(blobs.x.double())
    assert scores == pytest.approx(clustering_scores(torch.from_numpy(labels).long(), blobs.y, 4))
    unlabelled = kmeans_scores(blobs.x, torch.full_like(blobs.y, -1), 4)
    assert tuple(unlabelled) == UNLABELLED_METRICS
    inertia = KMeans(4, n_init=10, random_state=0).fit(blobs.x.double()).inertia_
    total = float((blobs.x.double() - blobs.x.double().mean(0)).square().sum())
    assert unlabelled["r2"] == pytest.approx(1 - inertia / total)
    assert explained_variance(blobs.x, torch.zeros(len(blobs.x), dtype=torch.int64)) == pytest.approx(0, abs=1e-12)
    assert explained_variance(blobs.x, torch.arange(len(blobs.x))) == pytest.approx(1)
    assert explained_variance(torch.ones(3, 2), torch.arange(3)) == 0
    assert kmeans_scores(torch.zeros(5, 2), torch.arange(5), 2) == {}
