"""Whatever form a task's metrics compute, it is logged under the documented names or refused with a sentence."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MultioutputWrapper, Running

from ddcl_lightning import Clustering
from ddcl_lightning.metrics.stages import StageMetrics, check_new
from ddcl_lightning.tasks.base import update_stage
from tests.tiny import clustering_module, loader, quiet_trainer

X = torch.tensor([1.0, 2.0, 6.0])


class Computes(Metric):
    """A metric whose value is given."""

    full_state_update = False

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.value = value

    def update(self, values: Tensor) -> None:
        self.total += values.sum()

    def compute(self) -> Any:
        return self.value


def values(metrics: Mapping[str, Any], *batches: Any, taken: tuple[str, ...] = ()) -> dict[str, float]:
    stage = StageMetrics("val", metrics)
    stage.reserve(taken)
    for batch in batches or ((X,),):
        for metric in stage.by_name().values():
            metric.update(*batch)
    computed = stage.compute(lambda has_data: has_data)
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in computed.values())
    assert "last" in metrics or stage.compute(lambda has_data: has_data) == {}  # it starts anew; a window cannot tell
    return {name: float(value) for name, value in computed.items()}


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        (torch.tensor(2.5), {"m": 2.5}),
        (torch.tensor([2.5]), {"m": 2.5}),
        (torch.tensor([[2.5]]), {"m": 2.5}),
        (torch.tensor(3), {"m": 3}),
        (torch.tensor(True), {"m": 1}),
        (torch.tensor(1.5, dtype=torch.float64, requires_grad=True), {"m": 1.5}),
        (torch.tensor(1.5, dtype=torch.bfloat16), {"m": 1.5}),
        (7, {"m": 7}),
        (0.5, {"m": 0.5}),
        (torch.ones(2).numpy()[0], {"m": 1}),
        (torch.ones(2).numpy(), {"m_0": 1, "m_1": 1}),
        (torch.tensor([1.0, float("nan"), 3.0]), {"m_0": 1, "m_2": 3}),
        (torch.tensor(float("nan")), {}),
        (torch.empty(0), {}),
        (None, {}),
        ({}, {}),
        ([], {}),
        ({"a": torch.tensor(1), "b": 2.0, "c": None}, {"ma": 1, "mb": 2}),
        ({0: torch.tensor([1, 2])}, {"m0_0": 1, "m0_1": 2}),
        ({"a": {"b": 1.0, "c": {"d": 2.0}}}, {"ma_b": 1, "ma_c_d": 2}),
    ],
)
def test_a_value_of_any_form_is_logged_as_scalars(value: Any, logged: dict[str, float]) -> None:
    assert values({"m": Computes(value)}) == logged


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 2), r"metric 'm' of stage 'val' must compute real numbers.*a tensor \(2, 2\) of torch.float32"),
        (torch.tensor(1j), "a tensor .* of torch.complex64. Reduce it, or show it from a callback"),
        ("high", "got 'high'"),
        ((torch.ones(2), torch.ones(2)), r"got \(tensor"),
        ([1.0], r"got \[1.0\]"),
        ({"a": "high"}, "metric 'ma' .*got 'high'"),
    ],
)
def test_what_is_no_scalar_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        values({"m": Computes(value)})


def test_metrics_of_torchmetrics_and_its_wrappers() -> None:
    pair = (X, X + torch.tensor([0.0, 1.0, 2.0]))
    assert values({"mae": MeanAbsoluteError()}, pair) == {"mae": 1.0}
    assert values({"mae": MeanAbsoluteError(compute_on_cpu=True)}, pair) == {"mae": 1.0}
    assert values({"cat": CatMetric(compute_on_cpu=True)}) == {"cat_0": 1.0, "cat_1": 2.0, "cat_2": 6.0}
    both = MetricCollection({"mae": MeanAbsoluteError(), "mse": MeanSquaredError()})
    assert values({"": both.clone()}, pair) == pytest.approx({"mae": 1.0, "mse": 5 / 3})
    assert values({"all_": both.clone(prefix="p_")}, pair) == pytest.approx({"all_p_mae": 1.0, "all_p_mse": 5 / 3})
    nested = MetricCollection({"near": both.clone(), "far": both.clone()})
    assert values({"": nested}, pair) == pytest.approx(
        {"near_mae": 1.0, "near_mse": 5 / 3, "far_mae": 1.0, "far_mse": 5 / 3}
    )
    assert values(both.clone(), pair) == pytest.approx({"mae": 1.0, "mse": 5 / 3})  # a collection is a mapping too
    assert values({"mae_": MinMaxMetric(MeanAbsoluteError())}, pair) == {"mae_raw": 1.0, "mae_min": 1.0, "mae_max": 1.0}
    assert values({"mae_": BootStrapper(MeanAbsoluteError(), num_bootstraps=4)}, pair).keys() == {
        "mae_mean",
        "mae_std",
    }
    outputs = MultioutputWrapper(MeanAbsoluteError(), 2)
    assert values({"mae": outputs}, (torch.zeros(3, 2), torch.ones(3, 2))) == {"mae_0": 1.0, "mae_1": 1.0}
    assert values({"last": Running(MeanMetric(), window=2)}, (X,), (X + 1,)) == {"last": 3.5}
    truth = torch.tensor([0, 1, 1])
    assert values({"acc": MulticlassAccuracy(2, average=None)}, (truth, truth)) == {"acc_0": 1.0, "acc_1": 1.0}
    classes = ClasswiseWrapper(MulticlassAccuracy(2, average=None), labels=["cat", "dog"], prefix="acc_")
    assert values({"": classes}, (truth, truth)) == {"acc_cat": 1.0, "acc_dog": 1.0}


def test_a_metric_made_of_another_is_computed_before_either_is_reset() -> None:
    total = SumMetric()
    stage = StageMetrics("val", {"sum": total, "double": 2 * total})
    total.update(X)
    assert {name: float(v) for name, v in stage.compute(lambda has_data: has_data).items()} == {
        "sum": 9.0,
        "double": 18.0,
    }


class FailsOnNoData(Computes):
    def compute(self) -> Any:
        raise ValueError("No samples to concatenate")


def test_a_metric_without_data_is_left_out_on_all_processes_or_on_none() -> None:
    stage = StageMetrics(
        "val", {"a": FailsOnNoData(1.0), "b": MetricCollection([FailsOnNoData(1.0)]), "c": SumMetric()}
    )
    stage["metric_c"].update(X)
    assert stage.compute(lambda has_data: has_data) == {"c": torch.tensor(9.0)}
    with pytest.raises(ValueError, match="No samples"), pytest.warns(UserWarning, match="before the ``update``"):
        stage.compute(lambda has_data: True)  # another process has data


class KeepsAll(Metric):
    """A metric that keeps what it gets, and cannot compute anything of nothing."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        self.kept.append(values)

    def compute(self) -> Any:
        return torch.cat(self.kept).max()


def test_a_metric_updated_with_nothing_is_left_out() -> None:
    asked: list[bool] = []
    stage = StageMetrics("val", {"cat": CatMetric(), "max": KeepsAll(), "sum": SumMetric()})
    for metric in stage.by_name().values():
        metric.update(torch.zeros(0))
    computed = stage.compute(lambda has_data: asked.append(has_data) or has_data)  # type: ignore[func-returns-value]
    assert asked == [False, False, True]
    assert computed == {"sum": torch.tensor(0.0)}
    assert values({"cat": CatMetric(), "max": KeepsAll()}, (torch.zeros(0),), (X,)) == {
        "cat_0": 1.0,
        "cat_1": 2.0,
        "cat_2": 6.0,
        "max": 6.0,
    }


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MeanMetric(), TypeError, r"must be a dict of names.*; got MeanMetric. Return \{'name': metric\}"),
        (lambda: [MeanMetric()], TypeError, "got list"),
        (lambda: None, TypeError, "got NoneType"),
        (lambda: {"m": MetricTracker(MeanAbsoluteError())}, TypeError, "got MetricTracker under 'm'.*logger's to keep"),
        (lambda: {"m": {"a": MeanMetric()}}, TypeError, "got dict under 'm'. Put several into a MetricCollection"),
        (lambda: {"m": MeanMetric}, TypeError, "got ABCMeta under 'm'"),
        (lambda: {3: MeanMetric()}, TypeError, "got the name 3. Name it by a string"),
        (lambda: {"acc@0.5": MeanMetric()}, ValueError, "must not hold a dot; got 'acc@0.5'"),
    ],
)
def test_what_is_no_metric_is_refused_when_the_module_is_made(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StageMetrics("val", make())


def test_names_that_collide_are_refused() -> None:
    two = {"": MetricCollection({"acc": SumMetric()}), "acc": SumMetric()}
    with pytest.raises(ValueError, match=r"must differ in name; got 'val/acc' from metric 'acc'.*Rename"):
        values(two)
    with pytest.raises(ValueError, match=r"got 'val/loss'.*another metric or loss"):
        values({"loss": SumMetric()}, taken=("loss", "ols"))
    with pytest.raises(ValueError, match="needs a name to be logged under"):
        values({"": SumMetric()})


def test_metrics_that_stages_share_are_refused() -> None:
    shared = SumMetric()
    stages = [StageMetrics("val", {"": MetricCollection([shared])}), StageMetrics("test", {"sum": shared})]
    with pytest.raises(ValueError, match=r"must be new at every call.*metric 'sum' in stages 'val' and 'test'"):
        check_new(stages)
    check_new([stages[0], StageMetrics("test", {"sum": shared.clone()})])


class Distance(Clustering):
    """A task with natural metrics for training and evaluation."""

    def metrics(self) -> Any:
        return {"mae": MeanAbsoluteError(), "rare": FailsOnNoData(1.0)}

    def train_metrics(self) -> Any:
        return {"mae": MeanAbsoluteError()}

    def update_metrics(self, metrics: Any, readout: Any, batch: Any) -> None:
        metrics["mae"].update(readout.pooled, torch.zeros_like(readout.pooled))

    update_train_metrics = update_metrics


def test_a_task_with_scalar_metrics_is_trained_validated_and_tested() -> None:
    module = clustering_module(Distance(4))
    trainer = quiet_trainer(max_epochs=2)
    with pytest.warns(UserWarning, match="has not updated 'rare'"):
        trainer.fit(module, loader(), loader())
    assert {"train/mae", "val/mae", "val/loss"} <= trainer.callback_metrics.keys()
    assert "val/rare" not in trainer.callback_metrics
    assert float(trainer.callback_metrics["val/mae"]) > 0
    with pytest.warns(UserWarning, match="has not updated 'rare'"):
        (tested,) = trainer.test(module, loader(), verbose=False)
    assert tested["test/mae"] == pytest.approx(float(trainer.callback_metrics["test/mae"]))


class Misspelt(Distance):
    """A task that updates a metric which it does not have."""

    def update_metrics(self, metrics: Any, readout: Any, batch: Any) -> None:
        metrics["maee"].update(torch.zeros(2), torch.ones(2))


def test_a_name_that_a_task_has_not_given_is_told_with_those_that_it_has() -> None:
    task = Misspelt(4)
    metrics = StageMetrics("val", task.metrics())
    message = r"Misspelt.update_metrics\(\) must read metrics by the names .*; got 'maee'\. Did you mean 'mae'\?"
    with pytest.raises(ValueError, match=message):
        update_stage(task, metrics, Any, Any)  # type: ignore[arg-type]
    assert metrics.by_name().get("maee") is None


def test_a_metric_that_nothing_updates_is_told_once() -> None:
    idle, busy = StageMetrics("val", {"idle": SumMetric(), "busy": SumMetric()}), MeanMetric()
    idle.by_name()["busy"].update(X)
    with pytest.warns(
        UserWarning, match=r"update_metrics\(\) must update every .*stage 'val' .* updated 'idle'\. Call"
    ):
        idle.note_idle(lambda has_data: has_data)
    idle.note_idle(lambda has_data: has_data)  # warnings are errors
    other = StageMetrics("test", {"busy": busy})
    other.note_idle(lambda has_data: True)  # another process has updated it
    nothing = StageMetrics("val", {"cat": CatMetric()})
    nothing.by_name()["cat"].update(torch.empty(0))
    nothing.note_idle(lambda has_data: has_data)  # an update with nothing is one
