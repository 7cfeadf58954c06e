"""What is said before the first step: each problem when there is one, and none of a run that is in order."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ddcl_lightning import PrototypeBank, ResidualVectorQuantizer, find_codebooks
from ddcl_lightning.functional import assignment_statistics, critical_temperature
from ddcl_lightning.monitoring.before_training import Remark, remarks_on
from tests.monitoring.codebook_cases import VQGAN, Student, vq
from tests.tiny import absolute

TOKENS = torch.randn(1, 500, 4, generator=torch.Generator().manual_seed(0))
CRITICAL = float(critical_temperature(TOKENS[0]))


def bank(ratio: float = 0.1, heads: int = 1, **kwargs: Any) -> PrototypeBank:
    built = PrototypeBank(5, 4, num_heads=heads, temperature=absolute(ratio * CRITICAL), **kwargs)
    built.set_prototypes(TOKENS[:, :5].expand(heads, -1, -1))
    return built


def remarks(
    model: nn.Module,
    tokens: Tensor = TOKENS,
    optimizers: list[Optimizer] | None = None,
    ends: dict[str, float] | None = None,
    named: Any = (),
) -> list[Remark]:
    codebooks = find_codebooks(model, named)
    optimizers = [Adam(model.parameters())] if optimizers is None else optimizers
    return remarks_on(codebooks, optimizers, dict.fromkeys(codebooks, tokens), ends or {})


def problems(*args: Any, **kwargs: Any) -> list[str]:
    return [remark.sign for remark in remarks(*args, **kwargs) if remark.problem]


def test_a_bank_that_is_in_order_has_its_temperature_said_and_no_problem() -> None:
    (fact,) = remarks(nn.ModuleDict({"bank": bank(0.1)}))
    assert fact == Remark("temperature", "bank", "T / T_c is 0.1.", False)
    model = nn.ModuleDict({"bank": bank(0.1)})
    (fact,) = remarks(model, ends={"bank": 0.005 * CRITICAL})
    assert fact.text == "T / T_c is 0.1, and 0.005 at the end of its schedule."
    assert problems(model, optimizers=[]) == []  # nothing is known of a loop of the user's own


def test_a_temperature_that_no_token_has_set_is_not_said() -> None:
    assert remarks(nn.ModuleDict({"quantizer": ResidualVectorQuantizer(4, 5, 2)})) == []
    assert remarks(nn.ModuleDict({"bank": PrototypeBank(5, 4)})) == []


def test_codes_in_no_optimizer_are_a_problem_unless_they_are_frozen() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "bank": bank()})
    others = [Adam(model["encoder"].parameters())]
    (remark,) = [remark for remark in remarks(model, optimizers=others) if remark.problem]
    assert (remark.sign, remark.codebook) == ("unmoved", "bank")
    assert "in no optimizer: they will stay as they are. Add them to one" in remark.text
    model["bank"].requires_grad_(False)
    assert problems(model, optimizers=others) == []


@pytest.mark.parametrize(
    ("make", "named"),
    [(Student, ["prototypes"]), (VQGAN, ["codes"]), (vq("VectorQuantize", dict, codebook_size=4).build, ())],
    ids=["Linear", "Embedding", "VectorQuantize"],
)
def test_codebooks_of_others_are_looked_for_in_the_optimizers_too(make: Any, named: Any) -> None:
    model = make()
    tokens = torch.randn(1, 500, 8)
    assert problems(model, tokens, optimizers=[SGD([nn.Parameter(torch.ones(1))])], named=named) == (
        ["unmoved"] if named else []  # moving averages are stepped by none
    )
    if named:
        assert problems(model, tokens, named=named) == []


def test_more_codes_than_different_tokens_are_a_problem() -> None:
    tokens = TOKENS[:, :3].repeat(1, 100, 1)
    (remark,) = [remark for remark in remarks(bank(), tokens) if remark.problem]
    assert remark.sign == "more_codes_than_tokens"
    assert "5 codes and 3 different tokens among 300" in remark.text
    assert problems(bank(), TOKENS[:, :5].repeat(1, 100, 1)) == []
    assert problems(bank(), TOKENS[:, :3]) == []  # too few to tell
    assert problems(VQGAN(), torch.randn(1, 7, 8).repeat(1, 50, 1), named=["codes"]) == ["more_codes_than_tokens"]


def test_tokens_without_variance_are_a_problem() -> None:
    signs = problems(bank(), torch.ones(1, 500, 4))
    assert "no_variance" in signs
    assert "more_codes_than_tokens" in signs


def test_a_schedule_that_ends_above_the_critical_temperature_is_said() -> None:
    model = nn.ModuleDict({"bank": bank(2.2)})
    for ends, words in (
        ({}, "T / T_c is 2.2: where"),
        ({"bank": 1.5 * CRITICAL}, "T / T_c is 2.2, and 1.5 at the end of its schedule: where"),
    ):
        (remark,) = remarks(model, ends=ends)
        assert remark.sign == "above_critical"
        assert remark.text.startswith(words)
        assert "to one point all the time" in remark.text


def test_a_schedule_from_above_to_below_is_deterministic_annealing() -> None:
    (remark,) = remarks(nn.ModuleDict({"bank": bank(2.0)}), ends={"bank": 0.1 * CRITICAL})
    assert remark.sign == "temperature"
    assert "deterministic annealing" in remark.text
    assert not remark.problem


def test_a_rate_of_plain_steps_is_compared_with_the_largest_stable_one() -> None:
    built = bank()
    model = nn.ModuleDict({"bank": built})
    mass = assignment_statistics(TOKENS, built.prototypes.detach(), built.temperature).mass
    limit = 1 / float(mass.max())
    for factor, problem in ((0.5, False), (4.0, True)):
        said = remarks(model, optimizers=[SGD(model.parameters(), lr=factor * limit)])
        (remark,) = [each for each in said if each.sign == "rate"]
        assert remark.problem == problem
        assert f"stable up to a rate of about {limit:.3g}" in remark.text
        assert f"{factor * limit:.3g}" in remark.text
    assert problems(model, optimizers=[Adam(model.parameters(), lr=100.0)]) == []  # has another limit


def test_a_learning_rate_of_a_group_counts_for_the_codes_in_it_only() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "bank": bank()})
    groups = [{"params": model["encoder"].parameters(), "lr": 1e3}, {"params": model["bank"].parameters(), "lr": 1e-3}]
    assert problems(model, optimizers=[SGD(groups)]) == []


def test_heads_are_told_one_by_one() -> None:
    tokens = torch.cat([TOKENS, 100 * TOKENS])
    first, second = remarks(nn.ModuleDict({"bank": bank(0.5, heads=2)}), tokens)
    assert (first.codebook, second.codebook) == ("bank/head0", "bank/head1")
    assert "T / T_c is 0.5." in first.text
    assert "T / T_c is 5e-05." in second.text


def test_without_a_sample_of_tokens_only_optimizers_are_looked_at() -> None:
    model = nn.ModuleDict({"bank": bank(5.0)})
    assert remarks_on(find_codebooks(model), [Adam(model.parameters())], {}, {}) == []
    (remark,) = remarks_on(find_codebooks(model), [SGD([nn.Parameter(torch.ones(1))])], {}, {})
    assert remark.sign == "unmoved"
    assert remarks(model, TOKENS[:, :0]) == []


def test_codes_that_two_optimizers_hold_are_a_problem() -> None:
    model = nn.ModuleDict({"bank": bank()})
    (remark,) = [
        each
        for each in remarks(model, optimizers=[Adam(model.parameters()), SGD(model.parameters(), lr=1e-3)])
        if each.problem
    ]
    assert (remark.sign, remark.codebook) == ("moved_twice", "bank")
    assert "held 2 times" in remark.text


def test_codes_that_start_in_training_have_no_temperature_before_it() -> None:
    quantizer = ResidualVectorQuantizer(4, 3, 2)
    assert remarks(quantizer) == []
    quantizer.train()(TOKENS[0].float())
    assert [remark.sign for remark in remarks(quantizer)] == ["temperature", "temperature"]
