"""What holds for every task: losses that train, metrics of their own for each stage, columns of predictions."""

from typing import Any

import pytest
import torch
from registry import DIM, classes, make
from tiny import LinearBackbone, quiet_trainer
from torch.utils.data import DataLoader

from ddcl_lightning import DDCLReadout, DDCLReadoutModule, Task

TASKS = {kind.__name__: kind for kind in classes(Task)}
each_task = pytest.mark.parametrize("name", TASKS)


def module(name: str) -> DDCLReadoutModule:
    torch.manual_seed(0)
    # Of blobs with DIM features, four classes.
    return DDCLReadoutModule(LinearBackbone(DIM, 5), DDCLReadout(4), make(TASKS[name]), rho=0.1, lr_task=0.01)


def data() -> Any:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(4, DIM, generator=generator)
    rows = [
        {"x": centers[number % 4] + torch.randn(DIM, generator=generator), "y": torch.tensor(number % 4)}
        for number in range(48)
    ]
    return DataLoader(rows, batch_size=16)  # type: ignore[arg-type]


@each_task
def test_the_loss_is_a_scalar_that_trains(name: str) -> None:
    model = module(name)
    batch = next(iter(data()))
    losses = model.task.losses(model(batch), batch)
    assert all(loss.shape == () and bool(loss.isfinite()) for loss in losses.values())
    losses["loss"].backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@each_task
def test_every_stage_gets_metrics_of_its_own(name: str) -> None:
    model = module(name).eval()
    for create in (model.task.metrics, model.task.train_metrics):
        first, second = create(), create()
        assert first.keys() == second.keys()
        assert all(first[key] is not second[key] for key in first)
    batch = next(iter(data()))
    metrics, readout = model.task.metrics(), model(batch)
    model.task.update_metrics(metrics, readout, batch)
    once = {key: metric.compute() for key, metric in metrics.items()}
    assert str({key: metric.compute() for key, metric in metrics.items()}) == str(once)


@each_task
def test_predictions_are_one_number_per_sample(name: str) -> None:
    model = module(name).eval()
    batch = next(iter(data()))
    columns = model.task.predict(model(batch), batch)
    assert all(column.shape == (16,) for column in columns.values())


@each_task
def test_it_trains_validates_tests_and_predicts_in_the_module(name: str) -> None:
    model, loader = module(name), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(model, loader, loader)
    logged = {key for key in trainer.callback_metrics if key.startswith("val/")}
    assert len(logged) >= 2
    assert any(not torch.equal(value, before[key]) for key, value in model.task.state_dict(prefix="task.").items()) or (
        not list(model.task.parameters())
    )
    tested = trainer.test(model, loader, verbose=False)[0]
    assert {key.removeprefix("test/") for key in tested} >= {key.removeprefix("val/") for key in logged}
    assert len(trainer.predict(model, loader)) == 3
