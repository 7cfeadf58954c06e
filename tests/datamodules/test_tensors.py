"""Data modules of tensors: what ``tensors`` may return, and what a contributor's class must not leave out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, IdentityBackbone, TensorDataModule
from ddcl_lightning.datamodules import SplitDataModule
from tests.tiny import quiet_trainer

X, Y = torch.randn(8, 3), torch.arange(8) % 2


class Given(TensorDataModule):
    """Whatever it was given."""

    class_names = ("even", "odd")
    feature_names = ("a", "b", "c")

    def __init__(self, returned: Any) -> None:
        super().__init__(batch_size=4, seed=0)
        self.returned = returned

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.returned  # type: ignore[no-any-return]


RETURNED: dict[str, tuple[Any, type[Exception], str]] = {
    "a dict": ({"x": X, "y": Y}, TypeError, r"must return a pair of tensors.*; got a dict\. Return \(x, y\)"),
    "None": (None, TypeError, "must return a pair of tensors.*; got None"),
    "arrays": ((X.numpy(), Y.numpy()), TypeError, r"got a ndarray and a ndarray\. Convert them with torch.as_tensor"),
    "float labels": ((X, Y.float()), TypeError, r"got labels of torch.float32\. Convert them with y.long\(\)"),
    "fewer labels": ((X, Y[:-1]), ValueError, r"one label per row; got shapes \(8, 3\) and \(7,\)"),
    "fewer rows": ((X[:-1], Y), ValueError, r"one label per row; got shapes \(7, 3\) and \(8,\)"),
    "labels in a column": ((X, Y.unsqueeze(1)), ValueError, r"got shapes \(8, 3\) and \(8, 1\)"),
    "flat features": ((X[:, 0], Y), ValueError, r"got shapes \(8,\) and \(8,\)"),
    "classes from 1": (
        (X, Y + 1),
        ValueError,
        r"labels .* in \[0, 2\), or -1 for unlabelled; got 2 in row 1\. Number the classes from 0, in the order",
    ),
    "unnamed features": ((X[:, :2], Y), ValueError, r"feature_names must name the F = 2 features .*; got 3 names"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_tensors_that_do_not_fit_are_refused_at_setup(name: str) -> None:
    returned, error, message = RETURNED[name]
    with pytest.raises(error, match=message):
        Given(returned).setup()


def test_tokens_are_served_and_shown_by_an_example_of_their_own() -> None:
    class Shown(Given):
        def example(self, index: int) -> str:
            return f"row {index}"

    tokens = torch.randn(8, 5, 3), Y
    data, shown = Given(tokens), Shown(tokens)
    data.setup()
    shown.setup()
    assert next(iter(data.val_dataloader()))["x"].shape == (4, 5, 3)
    assert shown.example(3) == "row 3"
    with pytest.raises(
        TypeError, match=r"Given.example\(\) must show .*; got rows of shape \(5, 3\).*Override example"
    ):
        data.example(3)


def test_narrow_integer_labels_become_int64() -> None:
    data = Given((X, Y.int()))
    data.setup()
    assert next(iter(data.val_dataloader()))["y"].dtype == torch.int64


def test_a_data_module_without_tensors_is_abstract() -> None:
    class Nothing(TensorDataModule):
        class_names = ("a",)

    with pytest.raises(TypeError, match=r"abstract method '?tensors"):
        Nothing(batch_size=4)  # type: ignore[abstract]


def test_load_must_return_loaded() -> None:
    class Pair(SplitDataModule):
        class_names = ("a", "b")

        def load(self) -> Any:
            return X, Y

        def example(self, index: int) -> str:
            return ""

    with pytest.raises(TypeError, match=r"Pair.load\(\) must return Loaded\(fetch, y, ...\); got a tuple of 2"):
        Pair(batch_size=2).setup()


@pytest.mark.parametrize("use", ["setup", "fit"])
def test_a_data_module_that_did_not_call_its_base_says_so(use: str) -> None:
    class Forgetful(Given):
        def __init__(self) -> None:
            self.returned = X, Y

    module = DDCLReadoutModule(IdentityBackbone(3), DDCLReadout(2), Clustering(2))
    trainer, data = quiet_trainer(max_epochs=1), Forgetful()
    action = data.setup if use == "setup" else lambda: trainer.fit(module, datamodule=data)
    with pytest.raises(AttributeError, match=r"Forgetful.__init__ must call super\(\).__init__\(batch_size=...\)"):
        action()


def test_other_missing_attributes_of_a_data_module_are_named_as_usual() -> None:
    with pytest.raises(AttributeError, match="'Given' object has no attribute 'horns'"):
        _ = Given((X, Y)).horns


@pytest.mark.parametrize(("names", "got"), [(None, "None"), ("even", "a str"), (3, "an int")])
def test_names_of_classes_that_are_no_list_are_refused_at_setup(names: Any, got: str) -> None:
    data = type("Named", (Given,), {"class_names": names})((X, Y))
    with pytest.raises(
        TypeError, match=f"Named.class_names must be a tuple with the name of each class, .*; got {got}"
    ):
        data.setup()


def test_names_of_features_that_are_left_out_are_asked_for() -> None:
    class Unnamed(TensorDataModule):
        class_names = ("even", "odd")

        def tensors(self) -> tuple[Tensor, Tensor]:
            return X, Y

    data = Unnamed(batch_size=4, seed=0)
    data.setup()  # nobody has asked for them
    message = r"Unnamed.feature_names must be a tuple with the name of each feature; got None\. Set it in Unnamed"
    with pytest.raises(TypeError, match=message):
        _ = data.num_features
    with pytest.raises(TypeError, match=message):
        data.example(0)


def test_labels_without_names_are_described_by_their_numbers() -> None:
    data = type("Nameless", (Given,), {"class_names": ()})((X, Y))
    data.setup()
    assert data.describe_rows([0, 1], ["label"]) == {"label": ["0", "1"]}
