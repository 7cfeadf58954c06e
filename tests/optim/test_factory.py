"""Optimizers by name are checked before anything runs."""

import pytest
import torch
from torch import nn

from ddcl_lightning.optim.factory import OptimizerConfig, OptimizerSpec


def groups(lr: float = 0.1) -> list[dict[str, object]]:
    return [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr, "name": "prototypes"}]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "TokenNormalized", "torch.optim.adamw.AdamW"])
def test_spec_creates_by_name(name: str) -> None:
    optimizer = OptimizerSpec("prototype_optimizer", OptimizerConfig(name)).create(groups(0.07))
    assert type(optimizer).__name__ == name.rpartition(".")[2]
    assert optimizer.param_groups[0]["lr"] == 0.07
    assert optimizer.param_groups[0]["name"] == "prototypes"


def test_spec_passes_arguments() -> None:
    given = {"betas": [0.8, 0.9], "eps": 1e-6}
    (group,) = OptimizerSpec("encoder_optimizer", OptimizerConfig("Adam", given)).create(groups()).param_groups
    assert list(group["betas"]) == [0.8, 0.9]
    assert group["eps"] == 1e-6


def test_spec_default_weight_decay() -> None:
    def decay(weight_decay: float | None = None, args: dict[str, float] | None = None) -> float:
        spec = OptimizerSpec("prototype_optimizer", OptimizerConfig("AdamW", args or {}), weight_decay=weight_decay)
        return float(spec.create(groups()).param_groups[0]["weight_decay"])

    assert decay() == 0.01  # the class's own
    assert decay(0.0) == 0.0
    assert decay(0.0, {"weight_decay": 0.3}) == 0.3
    without = OptimizerSpec("prototype_optimizer", OptimizerConfig("TokenNormalized"), weight_decay=0.0)
    without.create(groups())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Adam", {"lr": 0.1}, r"encoder_optimizer.args must not contain lr \(got 0.1\)"),
        ("Adamw", None, r"encoder_optimizer must name.*got 'Adamw'. Did you mean 'Adam'\?"),
        ("Optimizer", None, "got 'Optimizer'"),
        ("lr_scheduler", None, "got 'lr_scheduler'"),
        ("no.such.Thing", None, "got 'no.such.Thing'"),
        ("torch.nn.Linear", None, "got 'torch.nn.Linear'"),
        ("Adam", {"beta": 0.9}, r"encoder_optimizer.args has no argument 'beta'. Did you mean 'betas'\?"),
        ("SGD", {"params": []}, "has no argument 'params'"),
        ("LBFGS", None, "must not be LBFGS"),
    ],
)
def test_spec_refuses_unknown_names_and_arguments(name: str, arguments: dict[str, object] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSpec("encoder_optimizer", OptimizerConfig(name, arguments or {}))
