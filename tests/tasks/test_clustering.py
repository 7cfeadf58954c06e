import math

import pytest
import torch

from ddcl_lightning import Clustering, DDCLReadout, ReadoutOutput
from ddcl_lightning.heads import Head


def prepared(heads: int = 1, repulsion: float = 0.0, num_classes: int | None = 2) -> tuple[Clustering, ReadoutOutput]:
    torch.manual_seed(0)
    head = DDCLReadout(3, num_heads=heads, repulsion=repulsion, embed_dim=6).eval()
    task = Clustering(num_classes)
    task.build(head)
    return task, head(torch.randn(4, 2, 6))


def test_loss_by_hand() -> None:
    task, readout = prepared(heads=2)
    losses = task.losses(readout, None)
    terms = readout.loss_terms[0]
    torch.testing.assert_close(losses["loss"], terms.loss[0] + terms.loss[1])
    torch.testing.assert_close(losses["ols"] + losses["variance"], losses["loss"])
    assert task.unsupervised


def test_regularization_is_added_once() -> None:
    task, readout = prepared(repulsion=0.7)
    losses = task.losses(readout, None)
    torch.testing.assert_close(losses["loss"], losses["ols"] + losses["variance"] + readout.regularization)


def assigned(*clusters: list[int]) -> ReadoutOutput:
    """Readout whose samples (one per list) lean to the given cluster of each head."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(clusters), 3).float()
    return ReadoutOutput(torch.zeros(1), torch.zeros(1), assignments=0.2 + 0.5 * one_hot)


def test_metrics_of_one_head() -> None:
    task, _ = prepared()
    metrics = task.metrics()
    task.update_metrics(metrics, assigned([0], [0], [2], [2]), {"y": torch.tensor([1, 1, 0, 1])})
    values = metrics[""].compute()
    assert float(values["acc"]) == 0.75
    assert float(values["usage"]) == pytest.approx(2 / 3)


def test_metrics_of_every_head() -> None:
    task, _ = prepared(heads=2)
    metrics = task.metrics()
    task.update_metrics(metrics, assigned([0, 1], [0, 1], [2, 1], [2, 1]), {"y": torch.tensor([1, 1, 0, 0])})
    assert list(metrics) == ["head0_", "head1_"]
    assert float(metrics["head0_"].compute()["acc"]) == 1.0
    assert float(metrics["head1_"].compute()["acc"]) == 0.5
    assert float(metrics["head1_"].compute()["perplexity"]) == 1.0


@pytest.mark.parametrize(("num_classes", "batch"), [(None, {"y": torch.tensor([5, 6, 7])}), (2, {"x": None})])
def test_without_labels_only_use_is_counted(num_classes: int | None, batch: dict[str, object]) -> None:
    task, _ = prepared(num_classes=num_classes)
    metrics = task.metrics()
    task.update_metrics(metrics, assigned([0], [1], [2]), batch)
    values = metrics[""].compute()
    assert float(values["perplexity"]) == pytest.approx(3)
    assert math.isnan(float(values["acc"]))


def test_each_stage_gets_its_own_metrics() -> None:
    task, _ = prepared()
    assert task.metrics()[""] is not task.metrics()[""]


class NoBank(Head):
    def forward(self, tokens, mask=None):
        return ReadoutOutput(tokens, tokens.mean(1))


def test_clustering_refuses_heads_without_prototypes_and_readouts_without_assignments() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, or None"):
        Clustering(0)
    with pytest.raises(ValueError, match="needs a head with prototypes; got NoBank"):
        Clustering().build(NoBank())
    task, readout = prepared()
    untrained = ReadoutOutput(readout.tokens, readout.pooled, readout.loss_terms)
    with pytest.raises(RuntimeError, match="run the head in evaluation mode"):
        task.update_metrics(task.metrics(), untrained, {})


def test_assignments_with_prototypes_before_heads_are_refused() -> None:
    task, _ = prepared()
    turned = ReadoutOutput(torch.zeros(1), torch.zeros(1), assignments=torch.ones(2, 3, 1))
    message = r"Clustering needs assignments \(B, H = 1, K\), heads before prototypes; got a tensor \(2, 3, 1\).*\.mT"
    with pytest.raises(ValueError, match=message):
        task.update_metrics(task.metrics(), turned, {"y": torch.tensor([0, 1])})
