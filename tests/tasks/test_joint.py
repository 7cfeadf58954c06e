"""One readout, judged as a classifier and as a clustering."""

import pytest
import torch

from ddcl_lightning import (
    ClassificationAndClustering,
    DDCLReadout,
    DDCLReadoutModule,
    Head,
    IdentityBackbone,
    ReadoutOutput,
)
from ddcl_lightning.callbacks import KMeansInitialization
from tests.tiny import absolute, loader, quiet_trainer


def test_both_kinds_of_metrics_are_logged() -> None:
    module = DDCLReadoutModule(
        IdentityBackbone(4), DDCLReadout(4, temperature=absolute(2.0)), ClassificationAndClustering(4), lr_task=0.1
    )
    trainer = quiet_trainer(max_epochs=5, callbacks=[KMeansInitialization()])
    trainer.fit(module, loader(), loader())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/acc"] == 1.0
    assert metrics["val/cluster_acc"] == metrics["val/cluster_nmi"] == 1.0
    assert metrics["val/cluster_usage"] == 1.0
    assert {"val/f1", "val/cross_entropy", "val/quantization"} <= metrics.keys()


def test_every_head_has_its_own_clusters() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(3, num_heads=2), ClassificationAndClustering(4))
    trainer = quiet_trainer()
    trainer.validate(module, loader(), verbose=False)
    assert {"val/cluster_head0_acc", "val/cluster_head1_acc", "val/acc"} <= trainer.callback_metrics.keys()


class WithoutPrototypes(Head):
    pooled_dim = 4

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> ReadoutOutput:
        return ReadoutOutput(tokens, tokens.mean(1))


def test_without_prototypes_it_is_a_classification() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), WithoutPrototypes(), ClassificationAndClustering(4))
    trainer = quiet_trainer()
    trainer.validate(module, loader(), verbose=False)
    assert {name for name in trainer.callback_metrics if name.startswith("val/cluster")} == set()
    assert "val/acc" in trainer.callback_metrics


def test_labels_take_part_in_the_loss() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(3), ClassificationAndClustering(4))
    batch = {"x": torch.randn(5, 4), "y": torch.tensor([0, 1, 2, 3, 0])}
    losses = {name: float(value.detach()) for name, value in module.task.losses(module(batch), batch).items()}
    assert losses["loss"] == pytest.approx(losses["cross_entropy"] + 0.1 * losses["quantization"])
