"""Several validation, test and prediction loaders."""

from typing import Any

import pytest
import torch

from ddcl_lightning import Classification, Clustering
from ddcl_lightning.callbacks import FitSummary
from ddcl_lightning.metrics.evaluation_pass import flat_loaders
from ddcl_lightning.tasks import Task
from tests.tiny import clustering_module, loader, quiet_trainer

SIZES = (64, 32)


def loaders() -> list[Any]:
    return [loader(size=size, seed=seed) for seed, size in enumerate(SIZES)]


@pytest.mark.parametrize("task", [Clustering, Classification])
def test_losses_and_metrics_are_of_all_loaders_and_of_each(task: type[Task]) -> None:
    module, trainer = clustering_module(task(4)), quiet_trainer()
    both = {
        name: value for results in trainer.validate(module, loaders(), verbose=False) for name, value in results.items()
    }
    alone = [trainer.validate(module, results, verbose=False)[0] for results in loaders()]
    for number, of_one in enumerate(alone):
        for name, value in of_one.items():
            assert both[f"{name}/dataloader_idx_{number}"] == pytest.approx(value, rel=1e-5), name
    for name in ("val/loss", "val/acc"):
        expected = sum(size * results[name] for size, results in zip(SIZES, alone, strict=True)) / sum(SIZES)
        if task is Classification or name == "val/loss":  # clusters are matched to classes anew
            assert both[name] == pytest.approx(expected, rel=1e-5)
    assert set(both) == {
        f"{name}{mark}" for name in alone[0] for mark in ("", "/dataloader_idx_0", "/dataloader_idx_1")
    }


def test_one_loader_after_several_has_plain_names() -> None:
    module, trainer = clustering_module(), quiet_trainer()
    trainer.validate(module, loaders(), verbose=False)
    again = trainer.validate(module, loader(), verbose=False)[0]
    assert again == quiet_trainer().validate(module, loader(), verbose=False)[0]


@pytest.mark.parametrize("shape", [list, lambda given: dict(zip("ab", given, strict=True))], ids=["list", "dict"])
def test_a_fit_monitors_and_summarises_all_of_them(shape: Any) -> None:
    summary = FitSummary(num_restarts=1)
    trainer = quiet_trainer(max_epochs=1, callbacks=[summary])
    trainer.fit(clustering_module(), loader(), shape(loaders()))
    assert "val/loss" in trainer.callback_metrics
    # One pass over both: the accuracy of the table is that of validation.
    acc = float(trainer.callback_metrics["val/acc"])
    assert summary.rows["prototypes (last step)"]["acc"] == pytest.approx(acc)


def test_test_and_predict_take_several_loaders() -> None:
    module, trainer = clustering_module(), quiet_trainer()
    assert len(trainer.test(module, loaders(), verbose=False)) == 2
    predictions = trainer.predict(module, loaders())
    assert [sum(len(batch["index"]) for batch in batches) for batches in predictions] == list(SIZES)


def test_loaders_of_any_structure_are_flattened_in_order() -> None:
    assert flat_loaders({"a": [1, 2], "b": 3}) == [1, 2, 3]
    assert flat_loaders(torch) == [torch]
