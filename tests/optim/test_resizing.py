"""What to split, merge and prune, and the optimizers' state that follows."""

from typing import Any

import pytest
import torch
from tiny import absolute
from torch import Tensor

from ddcl_lightning import PrototypeBank, TokenNormalized
from ddcl_lightning.optim.resizing import Resize, SizeRules, plan_resize, resize_bank

CENTERS = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def clusters(*counts: int) -> Tensor:
    z = torch.randn(sum(counts), 2, generator=torch.Generator().manual_seed(0))
    return z + CENTERS[: len(counts)].repeat_interleave(torch.tensor(counts), 0)


def plan(tokens: Tensor, prototypes: Any, temperature: float = 0.1, idle: Any = None, **rules: Any) -> Resize:
    p = torch.as_tensor(prototypes, dtype=torch.float32)
    return plan_resize(tokens, p, temperature, SizeRules(**{"min_prototypes": 1, **rules}), idle or [0] * len(p))


def test_a_prototype_of_two_clusters_splits_onto_them() -> None:
    planned = plan(clusters(100, 100, 100), [[5.0, 0.0], [0.0, 10.0]])
    assert planned.parents.tolist() == [0, 1, 0]
    assert torch.cdist(planned.prototypes, CENTERS.double()).amin(0).max() < 0.5
    assert torch.equal(planned.prototypes[1], torch.tensor([0.0, 10.0]).double())
    (change,) = planned.changes
    assert change.startswith("split 0 (its T_c ")
    assert "two clusters by" in change


def test_one_gaussian_stays_whole_unless_the_temperature_alone_decides() -> None:
    z = clusters(200)
    assert not plan(z, [[0.0, 0.0]]).changes
    assert len(plan(z, [[0.0, 0.0]], significance=None).prototypes) == 2


def test_above_its_own_critical_temperature_nothing_splits() -> None:
    """4 lambda_max of two clusters 10 apart is 4 (25 + 1) = 104; half of it with detached assignments."""
    z = clusters(200, 200)
    for detach, critical in ((False, 104.0), (True, 52.0)):
        sizes = [
            len(
                plan_resize(
                    z, torch.tensor([[5.0, 0.0]]), share * critical, SizeRules(1), [0], detach_assignments=detach
                ).parents
            )
            for share in (0.8, 0.95, 1.2)  # the margin of 0.1 is between the first two
        ]
        assert sizes == [2, 1, 1]
    assert len(plan(z, [[5.0, 0.0]], 0.95 * 104, split_margin=0.0).parents) == 2


def test_prototypes_that_coincide_become_one() -> None:
    z = clusters(100, 100)
    planned = plan(z, [[0.0, 0.0], [10.0, 0.0], [0.02, 0.0]], 1.0)
    assert planned.parents.tolist() in ([0, 1], [1, 2])
    assert "merged" in planned.changes[0]
    assert torch.allclose(planned.prototypes[planned.parents != 1], torch.tensor([0.01, 0.0]).double(), atol=0.01)
    assert not plan(z, [[0.0, 0.0], [10.0, 0.0], [0.02, 0.0]], 1.0, merge_distance=0.0).changes
    assert len(plan(z, [[0.0, 0.0], [0.0, 0.01], [0.01, 0.0]], 1.0, min_prototypes=2, significance=0.01).parents) >= 2


def test_an_idle_prototype_goes_after_its_patience() -> None:
    z, prototypes = clusters(100, 100), [[0.0, 0.0], [10.0, 0.0], [50.0, 50.0]]
    first = plan(z, prototypes)
    assert (first.changes, first.idle) == ([], [0, 0, 1])
    second = plan(z, prototypes, idle=first.idle)
    assert second.parents.tolist() == [0, 1]
    assert second.changes == ["pruned 2 (share 0 < 0.033)"]
    assert plan(z, prototypes, idle=first.idle, min_prototypes=3).parents.tolist() == [0, 1, 2]
    assert plan(z, prototypes, idle=first.idle, prune_fraction=0.0).idle == [0, 0, 0]


def test_no_half_is_smaller_than_what_pruning_asks_for() -> None:
    z = clusters(300, 8)
    assert not plan(z, [[0.2, 0.0]], prune_fraction=0.1).changes
    assert len(plan(z, [[0.2, 0.0]], prune_fraction=0.0).parents) == 2


def test_the_clearest_splits_come_first_where_room_is_short() -> None:
    z = torch.cat([clusters(100, 100), 3 * clusters(100, 100) + 100])
    prototypes = [[5.0, 0.0], [115.0, 100.0]]
    assert len(plan(z, prototypes).parents) == 4
    assert len(plan(z, prototypes, max_prototypes=3).parents) == 3
    assert not plan(z, prototypes, max_prototypes=2).changes


OPTIMIZERS = [
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, {"momentum_buffer"}),
    (torch.optim.RMSprop, {"lr": 0.01}, {"square_avg"}),
    (torch.optim.SGD, {"lr": 0.01}, set()),
]


@pytest.mark.parametrize(("kind", "arguments", "rows"), OPTIMIZERS, ids=["adam", "momentum", "rmsprop", "sgd"])
def test_state_follows_row_by_row(kind: Any, arguments: dict[str, Any], rows: set[str]) -> None:
    """Rows that stay move on as in a bank that never changed; both halves of a split go on as their parent would."""
    torch.manual_seed(0)
    tokens = torch.randn(64, 2) * 3
    bank = PrototypeBank(3, 2, temperature=absolute(2.0))
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer = kind([{"params": [other]}, {"params": [bank.prototypes]}], **arguments)

    def step() -> None:
        optimizer.zero_grad()
        bank(tokens).terms.loss.sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    before = {name: value.clone() for name, value in optimizer.state[bank.prototypes].items() if name in rows}
    parameter, parents = bank.prototypes, torch.tensor([2, 0, 0, 1])
    new = bank.prototypes.detach()[0, parents]
    resize_bank(bank, Resize(new, parents, [0] * 4, ["split"]), [optimizer])
    assert bank.prototypes is parameter
    assert (bank.num_prototypes, bank.prototypes.shape, bank.prototypes.grad) == (4, (1, 4, 2), None)
    for name in rows:
        assert torch.equal(optimizer.state[parameter][name], before[name][:, parents])
    # A step under a gradient of zero moves by momentum alone.
    bank.prototypes.grad = torch.zeros_like(bank.prototypes)
    optimizer.step()
    moved = bank.prototypes.detach()[0] - new
    assert torch.equal(moved[1], moved[2])
    assert bool(moved.abs().sum()) == (kind is not torch.optim.RMSprop and bool(rows))
    step()


def test_token_normalized_goes_on() -> None:
    bank = PrototypeBank(2, 2, temperature=absolute(0.5))
    optimizer = TokenNormalized([bank.prototypes], lr=0.5).watch(bank)
    bank(clusters(20, 20))
    resize_bank(bank, Resize(CENTERS, torch.tensor([0, 1, 0]), [0] * 3, ["split"]), [optimizer])
    bank(clusters(20, 20, 20))
    optimizer.step()
    torch.testing.assert_close(bank.prototypes[0].detach(), CENTERS, atol=0.5, rtol=0)


def test_state_that_has_no_rows_is_refused_and_nothing_changes() -> None:
    bank = PrototypeBank(3, 2)
    optimizer = torch.optim.LBFGS([bank.prototypes])
    optimizer.state[bank.prototypes]["d"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"LBFGS keeps 'd' of shape \(6,\) .* Use Adam"):
        resize_bank(bank, Resize(CENTERS[:2], torch.tensor([0, 1]), [0, 0], ["pruned"]), [optimizer])
    assert bank.num_prototypes == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_prototypes": 0}, "min_prototypes must be at least 1"),
        ({"min_prototypes": 9, "max_prototypes": 8}, "at most max_prototypes; got 9 and 8"),
        ({"significance": 0.5}, r"significance must be in \(0, 0.5\)"),
        ({"split_margin": -0.1}, "split_margin must be finite and >= 0; got -0.1"),
        ({"merge_distance": float("inf")}, "merge_distance must be finite"),
        ({"prune_fraction": 1.0}, r"prune_fraction must be in \[0, 1\)"),
        ({"patience": 0}, "patience must be at least 1 check; got 0"),
    ],
)
def test_size_rules_refuse_values_out_of_range(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SizeRules(**rules)
