import math

import pytest
import torch
from toys import Masked, Project, TwoLevels, fit

from ddcl_lightning.callbacks import DecompositionCheck, DecompositionViolationError, KMeansInitialization
from ddcl_lightning.callbacks.decomposition_check import exact_variance, find_violations
from ddcl_lightning.functional import BankOutput, Decomposition, DecompositionErrors, decompose, decomposition_errors
from ddcl_lightning.functional import prototype_attention as right
from ddcl_lightning.functional import prototype_attention_reference as reference
from ddcl_lightning.monitoring.recording import BankRecord
from ddcl_lightning.nn import bank as bank_module
from ddcl_lightning.nn.bank import PrototypeBank
from tests.tiny import absolute


def wrong_temperature(tokens, prototypes, temperature, mask=None, **kwargs):
    return right(tokens, prototypes, 1.05 * temperature, mask, **kwargs)


def mask_leak(tokens, prototypes, temperature, mask=None, **kwargs):
    # The wild padding would be noticed by anybody; a padded copy of a token is the mistake that hides.
    tokens = torch.where(mask.unsqueeze(-1), tokens, tokens[:, :1])
    return right(tokens, prototypes, temperature, None, **kwargs)


def rows_not_one(tokens, prototypes, temperature, mask=None, **kwargs):
    output = reference(tokens, prototypes, temperature, mask)
    weights = 0.99 * output.weights  # as a dropout on the assignments would
    centroids = weights @ prototypes
    distances = torch.cdist(tokens, prototypes).square()
    ols = (tokens - centroids).square().sum(-1).mean(-1)
    variance = (weights * torch.cdist(centroids, prototypes).square()).sum(-1).mean(-1)
    return BankOutput(centroids, Decomposition((weights * distances).sum(-1).mean(-1), ols, variance), None)


def wrong_variance(tokens, prototypes, temperature, mask=None, **kwargs):
    output = right(tokens, prototypes, temperature, mask, **kwargs)
    loss, ols, variance = output.terms
    return output._replace(terms=Decomposition(loss, ols + 0.01 * loss, variance - 0.01 * loss))


def nan(tokens, prototypes, temperature, mask=None, **kwargs):
    output = right(tokens, prototypes, temperature, mask, **kwargs)
    return output._replace(terms=output.terms._replace(ols=output.terms.ols * math.nan))


def low_precision(tokens, prototypes, temperature, mask=None, **kwargs):
    output = right(tokens.bfloat16(), prototypes.bfloat16(), temperature, mask, **kwargs)
    return output._replace(centroids=output.centroids.float())


BREAKAGES = {
    "temperature": (wrong_temperature, "L_q against the trained value"),
    "mask": (mask_leak, "L_q against the trained value"),
    "rows": (rows_not_one, "L_q against the trained value"),
    "variance": (wrong_variance, "V against the trained value"),
    "nan": (nan, "L_OLS against the trained value: relative error nan"),
    "precision": (low_precision, "L_q against the trained value"),
}


def project(name=None):
    # A temperature at which assignments are soft, so that every term counts.
    return Masked(temperature=absolute(50.0)) if name == "mask" else Project(temperature=absolute(50.0))


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_layer_is_caught_during_training(name, monkeypatch):
    broken, phrase = BREAKAGES[name]
    monkeypatch.setattr(bank_module, "prototype_attention", broken)
    with pytest.raises(DecompositionViolationError, match=r"violated at step 1 in bank 'layer.bank'.*" + phrase):
        fit(project(name), KMeansInitialization(), DecompositionCheck(every_n_batches=1))


def test_a_nan_in_the_loss_is_caught_where_the_bank_does_not_look(monkeypatch):
    # On a GPU the bank does not wait for its own loss.
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)
    monkeypatch.setattr(bank_module, "prototype_attention", lambda *args, **kwargs: _all_nan(right(*args, **kwargs)))
    with pytest.raises(DecompositionViolationError, match="L_q against the trained value: relative error nan"):
        fit(project(), DecompositionCheck(every_n_batches=1))


def _all_nan(output):
    return output._replace(terms=Decomposition(*(math.nan * term for term in output.terms)))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 20.0, 1e3])
@pytest.mark.parametrize("make", [Project, Masked])
def test_a_right_layer_passes(make, temperature):
    check = DecompositionCheck(every_n_batches=1)
    trainer = fit(make(temperature=absolute(temperature)), KMeansInitialization(), check)
    assert (check.checks, check.violations) == (12, 0)
    assert float(trainer.callback_metrics["ddcl/decomposition_error/layer.bank"]) < 1e-5


def test_a_right_layer_passes_in_double_precision_at_its_tighter_tolerance(monkeypatch):
    check = DecompositionCheck(every_n_batches=1)
    fit(project(), check, precision="64-true")
    assert (check.checks, check.violations) == (12, 0)

    def single(tokens, *args, **kwargs):
        output = right(tokens.float(), *(value.float() for value in args[:2]), **kwargs)
        return BankOutput(output.centroids.double(), Decomposition(*(term.double() for term in output.terms)), None)

    monkeypatch.setattr(bank_module, "prototype_attention", single)
    with pytest.raises(DecompositionViolationError):
        fit(project(), check, precision="64-true")


def test_a_warning_goes_on_and_counts(monkeypatch):
    monkeypatch.setattr(bank_module, "prototype_attention", wrong_temperature)
    check = DecompositionCheck(every_n_batches=4, on_violation="warn")
    with pytest.warns(UserWarning, match="decomposition violated at step") as caught:
        trainer = fit(project(), check)
    assert [
        str(warning.message).partition(" at step ")[2].split()[0]
        for warning in caught
        if "violated" in str(warning.message)
    ] == [
        "1",
        "5",
        "9",
    ]
    assert trainer.global_step == 12
    assert (check.checks, check.violations) == (3, 3)


def test_a_tolerance_of_ones_own(monkeypatch):
    monkeypatch.setattr(bank_module, "prototype_attention", wrong_temperature)
    check = DecompositionCheck(every_n_batches=1, tolerance=0.5)
    fit(project(), check)
    assert check.violations == 0


def test_counts_survive_a_restart_and_not_another_run(tmp_path):
    check = DecompositionCheck(every_n_batches=2)
    fit(project(), check, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = DecompositionCheck(every_n_batches=2)
    fit(project(), resumed, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.checks == 6
    fit(project(), resumed, max_epochs=1)
    assert resumed.checks == 3


def test_every_error_has_its_limit():
    fine = DecompositionErrors(0.0, 0.0, 0.0, 0.0, 0.0, energy=1.0, sharpness=1.0)
    assert find_violations(fine, torch.float32) == []
    for name in ("identity", "loss", "ols", "variance", "rows"):
        for value in (1e-3, math.nan):
            assert find_violations(fine._replace(**{name: value}), torch.float32)
    # Rounding of the logits moves loss between L_OLS and V, and only there.
    sharp = fine._replace(ols=1e-4, variance=1e-4, sharpness=100.0)
    assert find_violations(sharp, torch.float32) == []
    assert len(find_violations(sharp._replace(loss=1e-4), torch.float32)) == 1


def test_the_tolerance_follows_the_precision_that_the_user_allows():
    coarse = DecompositionErrors(0.0, 1e-3, 0.0, 0.0, 0.0, energy=1.0, sharpness=1.0)
    before = torch.get_float32_matmul_precision()
    try:
        counts = {}
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            counts[precision] = len(find_violations(coarse, torch.float32))
        assert counts == {"highest": 1, "high": 0, "medium": 0}
        assert len(find_violations(coarse, torch.float64)) == 1
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_violation": "stop"}, "on_violation must be 'raise' or 'warn'"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\)"),
        ({"tolerance": 1.0}, r"tolerance must be in \(0, 1\)"),
    ],
)
def test_decomposition_check_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DecompositionCheck(**kwargs)


# V > 0 at every level ----------------------------------------------------------------------------


def level_two_falls_together(together=True):
    """A hierarchy of which only the upper bank has lost its spread."""
    module = TwoLevels(lr=1e-4)
    with torch.no_grad():
        prototypes = module.top.bank.prototypes
        first = prototypes[:, :1].clone()
        prototypes.copy_(first if together else first + 1e-3 * torch.randn_like(prototypes))
    return module


def test_a_bank_whose_prototypes_coincide_fails_the_check_though_the_identity_holds():
    words = r"bank 'top.bank': V > 0: its 2 prototypes coincide .* lower the temperature below the critical one"
    with pytest.raises(DecompositionViolationError, match=words) as error:
        fit(level_two_falls_together(), DecompositionCheck(every_n_batches=1))
    assert "softmax" not in str(error.value)


def test_each_bank_is_judged_on_its_own_and_counted():
    check = DecompositionCheck(every_n_batches=1, on_violation="warn")
    with pytest.warns(UserWarning, match=r"violated at step \d+ in bank 'top.bank': V > 0") as caught:
        fit(level_two_falls_together(), check)
    assert not any("layer.bank" in str(warning.message) for warning in caught)
    assert (check.checks, check.violations) == (24, 12)
    assert check.smallest_variance["top.bank"] < 1e-12 < check.smallest_variance["layer.bank"]


def test_prototypes_that_are_only_close_pass():
    check = DecompositionCheck(every_n_batches=1)
    fit(level_two_falls_together(together=False), check)
    assert (check.checks, check.violations) == (24, 0)
    assert 0 < check.smallest_variance["top.bank"] < 1e-4


def test_assignments_that_are_hard_to_the_last_bit_are_said_once_and_are_no_violation(caplog):
    check = DecompositionCheck(every_n_batches=1)
    with caplog.at_level("INFO"):
        fit(Project(temperature=absolute(1e-6), lr=1e-6), KMeansInitialization(), check)
    words = "V = 0 at step 1 in bank 'layer.bank', whose prototypes differ"
    assert sum(words in record.message for record in caplog.records) == 1
    assert check.violations == 0
    assert check.smallest_variance == {"layer.bank": 0.0}


def test_a_single_prototype_has_no_spread_and_needs_none():
    check = DecompositionCheck(every_n_batches=1)
    fit(Project(num_prototypes=1), check)
    assert (check.violations, check.smallest_variance) == (0, {"layer.bank": 0.0})


def test_the_smallest_variance_is_the_exact_one_below_the_rounding_of_the_trained_one():
    """At a low temperature float32 leaves nothing of V but rounding, which may even be negative."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 200, 8)
    prototypes = torch.randn(1, 5, 8)
    temperature = torch.tensor([0.02])
    exact = decompose(tokens, prototypes, temperature)
    terms = right(tokens, prototypes, temperature).terms
    rounded = Decomposition(terms.loss, terms.ols, terms.variance * 0 - 1e-9)
    errors = decomposition_errors(tokens, prototypes, temperature, rounded)
    record = BankRecord(tokens, None, prototypes, temperature, rounded)
    assert torch.equal(exact_variance(record, errors), exact.variance)
    assert float(exact.variance) > 0
    soft = torch.tensor([20.0])
    terms = right(tokens, prototypes, soft).terms
    record = BankRecord(tokens, None, prototypes, soft, terms)
    errors = decomposition_errors(tokens, prototypes, soft, terms)
    assert torch.equal(exact_variance(record, errors), terms.variance.double())


def test_the_smallest_variance_survives_a_resume():
    check = DecompositionCheck(every_n_batches=1)
    fit(Project(), check)
    other = DecompositionCheck()
    other.load_state_dict(check.state_dict())
    assert other.smallest_variance == check.smallest_variance
    old = {key: value for key, value in check.state_dict().items() if key != "smallest_variance"}
    other.load_state_dict(old)
    assert other.smallest_variance == {}
