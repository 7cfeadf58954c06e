"""Items through a residual quantizer of known codes: their IDs, the metrics over all of them, and refusals."""

import pytest
import torch
from tiny import quiet_trainer
from torch.utils.data import DataLoader

from ddcl_lightning import DDCLReadoutModule, IdentityBackbone, MLPDecoder, SemanticIDs
from ddcl_lightning.heads import MeanPooling
from tests.tiny_ids import IDS, ITEMS, Items, item_module


def loader() -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Items(), batch_size=4)


def test_every_item_is_predicted_with_its_tuple() -> None:
    module = item_module().eval()
    predictions = quiet_trainer().predict(module, loader())
    assert torch.cat([batch["semantic_id"] for batch in predictions]).tolist() == IDS
    assert torch.cat([batch["mse"] for batch in predictions]).shape == (6,)


def test_metrics_of_validation_are_those_of_all_items() -> None:
    module = item_module()
    trainer = quiet_trainer()
    trainer.validate(module, loader(), verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/items"] == 6
    assert logged["val/collisions"] == pytest.approx(3 / 6)
    assert logged["val/distinct_ids"] == 4
    assert logged["val/largest_group"] == 3
    assert logged["val/level1_usage"] == 1.0
    assert logged["val/level2_usage"] == pytest.approx(2 / 3)
    decoded = module.task.decode(module({"x": ITEMS}).tokens).detach()[:, 0]
    variance = (ITEMS - ITEMS.mean(0)).square().sum()
    assert logged["val/relative_error"] == pytest.approx(float((ITEMS - decoded).square().sum() / variance), rel=1e-4)
    assert logged["val/mse"] == pytest.approx(float((ITEMS - decoded).square().mean()), rel=1e-4)


def test_a_head_without_codes_makes_a_plain_autoencoder_of_items() -> None:
    module = DDCLReadoutModule(IdentityBackbone(2), MeanPooling(), SemanticIDs(MLPDecoder(2, widths=(8,))))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert "val/mse" in trainer.callback_metrics
    assert "val/collisions" not in trainer.callback_metrics
    assert set(trainer.predict(module, loader())[0]) == {"index", "mse"}


def test_items_of_several_tokens_have_no_id() -> None:
    module = item_module().eval()
    batch = {"x": ITEMS.view(2, 3, 2)}
    readout = module(batch)
    assert module.task.losses(readout, batch)["loss"].isfinite()
    with pytest.raises(ValueError, match=r"codes of one token per item, \(B, 1, L\); got \(2, 3, 2\)\. Give each item"):
        module.task.predict(readout, batch)
