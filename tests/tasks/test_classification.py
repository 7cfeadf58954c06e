import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from ddcl_lightning import Classification, DDCLReadout, ReadoutOutput
from ddcl_lightning._utils.batch import Batch

LABELS = torch.tensor([0, 2, 1, 2])


def prepared(repulsion: float = 0.0, **options: object) -> tuple[Classification, ReadoutOutput]:
    torch.manual_seed(0)
    head = DDCLReadout(5, repulsion=repulsion, embed_dim=6)
    task = Classification(3, **options)  # type: ignore[arg-type]
    task.build(head)
    return task, head(torch.randn(4, 2, 6))


def cross_entropy(task: Classification, readout: ReadoutOutput, weights: list[float]) -> Tensor:
    logits = readout.pooled @ task.classifier.weight.T + task.classifier.bias
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    w = torch.tensor(weights)[LABELS]
    return -(w * log_p[range(4), LABELS]).sum() / w.sum()


def test_classification_loss_is_cross_entropy_and_quantization_loss() -> None:
    task, readout = prepared(quantization_weight=0.25)
    losses = task.losses(readout, (None, LABELS))
    expected = cross_entropy(task, readout, [1.0, 1.0, 1.0])
    torch.testing.assert_close(losses["cross_entropy"], expected)
    torch.testing.assert_close(losses["quantization"], readout.loss_terms[0].loss.sum())
    torch.testing.assert_close(losses["loss"], expected + 0.25 * readout.loss_terms[0].loss.sum())
    assert set(losses) == {"loss", "cross_entropy", "quantization"}


def test_class_weights_and_label_smoothing() -> None:
    task, readout = prepared(class_weights=[1.0, 3.0, 0.5])
    losses = task.losses(readout, {"y": LABELS.int()})
    torch.testing.assert_close(losses["cross_entropy"], cross_entropy(task, readout, [1.0, 3.0, 0.5]))
    assert "class_weights" in task.state_dict()
    task, readout = prepared(label_smoothing=0.1)
    smooth = torch.nn.functional.cross_entropy(task.logits(readout), LABELS, label_smoothing=0.1)
    torch.testing.assert_close(task.losses(readout, {"y": LABELS})["cross_entropy"], smooth)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_regularization_counts_in_full_whatever_the_weight(weight: float) -> None:
    plain, readout = prepared(quantization_weight=weight)
    expected = plain.losses(readout, {"y": LABELS})["loss"]
    task, readout = prepared(repulsion=0.7, quantization_weight=weight)
    losses = task.losses(readout, {"y": LABELS})
    torch.testing.assert_close(losses["regularization"], readout.regularization)
    torch.testing.assert_close(losses["loss"], expected + readout.regularization)
    assert readout.regularization.abs() > 0.1


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_readout_without_prototypes_trains_on_the_cross_entropy_alone(weight: float) -> None:
    task, readout = prepared(quantization_weight=weight)
    bare = ReadoutOutput(readout.tokens, readout.pooled)
    losses = task.losses(bare, {"y": LABELS})
    assert set(losses) == {"loss", "cross_entropy"}
    assert losses["loss"] == losses["cross_entropy"]


def test_metrics_and_predictions_by_hand() -> None:
    task, readout = prepared()
    task.classifier = nn.Linear(6, 3)
    with torch.no_grad():
        task.classifier.weight.zero_()
        task.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))  # always class 2
    metrics = task.metrics()
    assert isinstance(metrics[""], MetricCollection)
    task.update_metrics(metrics, readout, {"y": LABELS})
    values = {name: float(value) for name, value in metrics[""].compute().items()}
    assert values["acc"] == pytest.approx(2 / 4)
    assert values["f1"] == pytest.approx((0 + 0 + 2 / 3) / 3)
    predicted = task.predict(readout, {})
    assert predicted["predicted_class"].tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(predicted["probability"], torch.full((4,), 1 / (1 + 2 * torch.tensor(-1.0).exp())))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(4, 2), "Classification needs labels"),
        ({"y": LABELS - 1}, r"labels must be in \[0, num_classes = 3\); got values from -1 to 1"),
        ({"y": LABELS + 1}, "got values from 1 to 3"),
        ({"y": LABELS.float()}, r"must be integers of shape \(B,\); got torch.float32"),
        ({"y": LABELS.unsqueeze(1)}, r"got torch.int64 of shape \(4, 1\)"),
    ],
)
def test_classification_refuses_labels_out_of_range(batch: Batch, message: str) -> None:
    task, readout = prepared()
    for call in (lambda: task.losses(readout, batch), lambda: task.update_metrics(task.metrics(), readout, batch)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2; got 1"),
        ({"quantization_weight": -0.1}, "quantization_weight must be >= 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"class_weights": [1.0, 2.0]}, "class_weights must have num_classes = 3 entries; got 2"),
    ],
)
def test_classification_refuses_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(**{"num_classes": 3, **options})
