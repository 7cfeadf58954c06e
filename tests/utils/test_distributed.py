"""Two processes over gloo do what one does on the joint batch: layers, samples and steps."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddcl_lightning import EmbeddingScale, PrototypeBank, TokenNormalized
from ddcl_lightning._utils.distributed import (
    broadcast_object,
    gather_objects,
    is_first_process,
    max_over_processes,
    sum_over_processes,
    take_the_last,
    world_size,
)
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.nn.scaling import ScaleMode
from tests.processes import results_of_processes

modes = pytest.mark.parametrize("mode", ["per_dimension", "total", "whiten"])


def tokens_and_mask() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, 3, generator=g, dtype=torch.float64), torch.rand(8, 5, generator=g) < 0.7


def scaled_step(mode: ScaleMode, rank: int, processes: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of an encoder below the scale, averaged as DDP does, and the running statistics."""
    torch.manual_seed(0)
    encoder, scale = torch.nn.Linear(3, 2).double(), EmbeddingScale(2, mode).double()
    x, mask = tokens_and_mask()
    count = float(mask.sum()) / processes  # the joint loss is the mean of the processes'
    x, mask = x[rank::processes], mask[rank::processes]
    (((scale(encoder(x), mask) - 0.3).abs() * mask.unsqueeze(-1)).sum() / count).backward()
    gradients = [sum_over_processes(p.grad) / processes for p in encoder.parameters() if p.grad is not None]
    return gradients, dict(scale.state_dict())


def token_normalized_step(rank: int, processes: int, relocation_threshold: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    bank = PrototypeBank(4, 3, temperature=0.02).double()
    with torch.no_grad():
        bank.prototypes[0, 3] = 60.0  # its mass underflows on both processes
    optimizer = TokenNormalized([bank.prototypes], lr=0.4, relocation_threshold=relocation_threshold).watch(bank)
    x, mask = tokens_and_mask()
    share = slice(None) if processes == 1 else slice(0, 2) if rank == 0 else slice(2, None)  # of unequal sizes
    bank(x[share], mask[share])
    optimizer.step()
    return bank.prototypes.detach()


def poisoned_steps(rank: int, processes: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Two batches that add up and one that is not finite on the first process, where nobody looks."""
    torch.manual_seed(0)
    bank = PrototypeBank(4, 3, temperature=0.1).double()
    bank._require_finite = lambda *args: None  # type: ignore[method-assign]
    optimizer = TokenNormalized([bank.prototypes], lr=0.4, relocation_threshold=0.5).watch(bank)
    x, mask = tokens_and_mask()
    share = slice(None) if processes == 1 else slice(0, 2) if rank == 0 else slice(2, None)
    bad = x[share].clone()
    bad[0, 0] = torch.nan if rank == 0 else 50.0
    mask[:, 0] = True
    for batch in (x[share], bad, x[share] + 1):
        loss = bank(batch, mask[share]).terms.loss.sum()
        if batch is not bad:  # skipped by everybody, for its loss is not finite somewhere
            loss.backward()
    with torch.no_grad():
        bank(bad, mask[share])
    optimizer.step()
    return bank.prototypes.detach(), dict(bank.state_dict())


def shared_sample(rank: int, processes: int) -> tuple[Tensor, Tensor]:
    rows, full, few = torch.arange(60.0).unsqueeze(1), Reservoir(40), Reservoir(40)
    full.add(rows[rank::processes])
    if rank == processes - 1:  # the other process has nothing to give
        few.add(rows[:3])
    return full.gather(), few.gather()


def primitives(rank: int) -> dict[str, Any]:
    value = torch.tensor([1.0 + rank, 5.0 - rank], requires_grad=True)
    rows = torch.tensor([[1.0], [2.0], [3.0]]) + 10 * rank
    taken, has_row = take_the_last(rows, torch.tensor([rank, 5 if rank == 0 else -1, -1]))
    (sum_over_processes(value) * torch.tensor([1.0, 10.0 * (rank + 1)])).sum().backward()
    return {
        "world_size": world_size(),
        "first": is_first_process(),
        "sum": sum_over_processes(value).detach(),
        "gradient": value.grad,
        "max": max_over_processes(value).detach(),
        "gathered": gather_objects({"rank": rank}),
        "broadcast": broadcast_object(f"from {rank}"),
        "value": value.detach(),
        "taken": taken.flatten().tolist(),
        "found": has_row.tolist(),
    }


def everything(rank: int, processes: int) -> dict[str, Any]:
    return {
        "per_dimension": scaled_step("per_dimension", rank, processes),
        "total": scaled_step("total", rank, processes),
        "whiten": scaled_step("whiten", rank, processes),
        "step": token_normalized_step(rank, processes),
        "relocated": token_normalized_step(rank, processes, relocation_threshold=0.9),
        "poisoned": poisoned_steps(rank, processes),
        "sample": shared_sample(rank, processes),
        "primitives": primitives(rank),
    }


def everything_of_two(rank: int) -> dict[str, Any]:
    return everything(rank, 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; they are started once, because that is what takes the time."""
    return results_of_processes(tmp_path_factory.mktemp("gloo"), everything_of_two)


@pytest.mark.slow
@modes
def test_embedding_scale_equals_the_joint_batch(mode: ScaleMode, two: list[dict[str, Any]]) -> None:
    gradients, state = scaled_step(mode, 0, 1)
    for result in two:
        torch.testing.assert_close(result[mode][0], gradients)
        torch.testing.assert_close(result[mode][1], state)


@pytest.mark.slow
def test_token_normalized_equals_the_joint_batch(two: list[dict[str, Any]]) -> None:
    plain, relocated = token_normalized_step(0, 1), token_normalized_step(0, 1, relocation_threshold=0.9)
    assert bool(plain.isfinite().all())
    assert (plain != relocated).any(-1).sum() == 1
    for result in two:
        torch.testing.assert_close(result["step"], plain)
        torch.testing.assert_close(result["relocated"], relocated)


@pytest.mark.slow
def test_a_batch_that_is_not_finite_on_one_process_is_left_out_on_all(two: list[dict[str, Any]]) -> None:
    prototypes, state = poisoned_steps(0, 1)
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert int(state["temperature_state.covariance.num_batches"]) == 2
    for result in two:
        torch.testing.assert_close(result["poisoned"], (prototypes, state))


@pytest.mark.slow
def test_reservoirs_share_one_sample(two: list[dict[str, Any]]) -> None:
    (full, few), (full_too, few_too) = (result["sample"] for result in two)
    assert torch.equal(full, full_too)
    assert len(torch.unique(full)) == 40
    assert torch.equal(few, few_too)
    assert sorted(few.flatten().tolist()) == [0.0, 1.0, 2.0]


@pytest.mark.slow
def test_collective_operations_of_two_processes_agree(two: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(result["primitives"] for result in two):
        assert result["world_size"] == 2
        assert result["first"] == (rank == 0)
        assert result["sum"].tolist() == [3.0, 9.0]
        assert result["max"].tolist() == [2.0, 5.0]
        assert result["gradient"].tolist() == [2.0, 30.0]  # of the sum of both processes' losses
        assert result["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert result["broadcast"] == "from 0"
        assert result["value"].tolist() == [1.0 + rank, 5.0 - rank]  # the inputs stay as they were
        assert result["taken"] == [11.0, 2.0, 0.0]
        assert result["found"] == [True, True, False]


def test_one_process_is_the_identity() -> None:
    result = primitives(0)
    assert result["world_size"] == 1
    assert result["first"]
    assert result["sum"].tolist() == result["max"].tolist() == [1.0, 5.0]
    assert result["gradient"].tolist() == [1.0, 10.0]
    assert result["gathered"] == [{"rank": 0}]
    assert result["broadcast"] == "from 0"
    assert result["taken"] == [1.0, 2.0, 0.0]
    assert result["found"] == [True, True, False]


BRANCHES = {
    "is_first_process",
    "is_global_zero",
    "is_rank_zero",
    "get_rank",
    "global_rank",
    "local_rank",
    "rank_zero_only",
}


@pytest.mark.parametrize("folder", ["ddcl_lightning", "callbacks", "datamodules"])
def test_no_code_branches_on_the_process_outside_of_the_helpers(folder: str) -> None:
    """A branch that not every process takes can hang: :mod:`ddcl_lightning._utils.distributed` has the safe forms."""
    root = Path(__file__).parents[2]
    offending = []
    for path in sorted((root / folder).rglob("*.py")):
        if path.relative_to(root).as_posix() == "ddcl_lightning/_utils/distributed.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tests = [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While)) else []
            tests += node.decorator_list if isinstance(node, ast.FunctionDef) else []
            for name in (branch for test in tests for branch in ast.walk(test)):
                word = name.id if isinstance(name, ast.Name) else name.attr if isinstance(name, ast.Attribute) else ""
                if word in BRANCHES:
                    offending.append(f"{path.relative_to(root)}:{name.lineno}")
    assert not offending
