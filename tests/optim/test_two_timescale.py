"""The ratio of the rates, its groups and its schedule."""

import math

import pytest
import torch
from torch import nn

from ddcl_lightning import DDCLAttention, two_timescale_groups
from ddcl_lightning.optim.two_timescale import check_ratio, live_ratio, parameter_ids


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.999])
def test_stable_ratios_pass(rho: float) -> None:
    check_ratio(rho)
    check_ratio(rho, allow_unstable=True)


def test_other_ratios_do_not() -> None:
    for rho in (-0.1, math.nan, math.inf):
        for unstable in (False, True):
            with pytest.raises(ValueError, match="must be finite and >= 0; got"):
                check_ratio(rho, allow_unstable=unstable)
    for rho in (1.0, 3.0):
        with pytest.raises(
            ValueError, match=r"must be < 1, .*speed of a collapse.*scale of the embeddings.*allow_unstable=True"
        ):
            check_ratio(rho)
        check_ratio(rho, allow_unstable=True)


def parameters(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(n)]


def test_live_ratio_takes_the_worst_pair() -> None:
    p, q, e, f = parameters(4)
    fast = torch.optim.SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.4}])
    slow = torch.optim.SGD([{"params": [e], "lr": 0.01}, {"params": [f], "lr": 0.02}])
    assert live_ratio([fast, slow], parameter_ids([p, q]), parameter_ids([e, f])) == pytest.approx(0.2)
    assert live_ratio([fast, slow], parameter_ids([q]), parameter_ids([e])) == pytest.approx(0.025)


def test_live_ratio_of_one_optimizer_and_one_group() -> None:
    p, e = parameters(2)
    together = torch.optim.SGD([p, e], lr=0.3)
    assert live_ratio([together], parameter_ids([p]), parameter_ids([e])) == 1.0


def test_live_ratio_where_a_side_is_missing_or_stands_still() -> None:
    p, e = parameters(2)
    fast, slow = torch.optim.SGD([p], lr=0.1), torch.optim.SGD([e], lr=0.01)
    ids = parameter_ids([p]), parameter_ids([e])
    assert live_ratio([fast], *ids) is None
    assert live_ratio([slow], *ids) is None
    assert live_ratio([], *ids) is None
    fast.param_groups[0]["lr"] = 0.0
    assert live_ratio([fast, slow], *ids) == math.inf
    slow.param_groups[0]["lr"] = 0.0
    assert live_ratio([fast, slow], *ids) == 0.0
    fast.param_groups[0]["lr"] = torch.tensor(0.1)  # capturable optimizers keep tensors
    slow.param_groups[0]["lr"] = torch.tensor(0.05)
    assert live_ratio([fast, slow], *ids) == pytest.approx(0.5)


def test_two_timescale_groups() -> None:
    model = nn.Sequential(nn.Linear(6, 8), DDCLAttention(8, 5, num_heads=2), DDCLAttention(8, 3))
    model[0].bias.requires_grad_(False)
    fast, slow = two_timescale_groups(model, 0.5, rho=0.1, weight_decay=0.01)
    assert [id(p) for p in fast["params"]] == [id(model[1].bank.prototypes), id(model[2].bank.prototypes)]
    assert (fast["lr"], fast["weight_decay"], fast["name"]) == (0.5, 0.0, "prototypes")
    assert (slow["lr"], slow["weight_decay"], slow["name"]) == (pytest.approx(0.05), 0.01, "encoder")
    assert len(slow["params"]) == len(list(model.parameters())) - 2 - 1  # without prototypes and the frozen bias
    optimizer = torch.optim.AdamW([fast, slow])
    ids = parameter_ids(fast["params"]), parameter_ids(slow["params"])
    assert live_ratio([optimizer], *ids) == pytest.approx(0.1)


def test_two_timescale_groups_without_an_encoder() -> None:
    model = nn.Sequential(nn.Linear(6, 8), DDCLAttention(8, 5))
    assert [group["name"] for group in two_timescale_groups(model, 0.5, rho=0.0)] == ["prototypes"]
    assert [group["name"] for group in two_timescale_groups(model[1], 0.5)] == ["prototypes"]


def test_two_timescale_groups_refuse_rates_out_of_range() -> None:
    model = DDCLAttention(8, 5)
    with pytest.raises(ValueError, match="lr_prototypes must be > 0; got 0"):
        two_timescale_groups(model, 0.0)
    with pytest.raises(ValueError, match="must be < 1"):
        two_timescale_groups(model, 0.1, rho=1.0)
    with pytest.raises(ValueError, match="found none in Linear"):
        two_timescale_groups(nn.Linear(2, 2), 0.1)
