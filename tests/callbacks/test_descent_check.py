import pytest
import torch
from torch import nn
from toys import Masked, Project, TwoLevels, fit

from ddcl_lightning import PrototypeBank, TokenNormalized
from ddcl_lightning.callbacks import DescentCheck, DescentViolationError, KMeansInitialization
from ddcl_lightning.functional import assignment_statistics, lyapunov, prototype_attention
from ddcl_lightning.nn.discovery import find_banks
from tests.tiny import absolute, clustering_module, loader


class Plain(Project):
    """Plain gradient steps on the prototypes alone."""

    def __init__(self, lr=0.2, optimizer=torch.optim.SGD, **layer):
        super().__init__(lr=lr, **{"temperature": absolute(20.0), **layer})
        self.encoder.requires_grad_(False)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer([self.layer.bank.prototypes], lr=self.lr)


@pytest.mark.parametrize("detach", [False, True])
def test_steps_below_the_limit_never_rise(detach):
    check = DescentCheck(every_n_batches=1, on_violation="raise", tolerance=1e-6)
    trainer = fit(Plain(detach_assignments=detach), KMeansInitialization(), check)
    assert (check.checks, check.violations) == (12, 0)
    assert float(trainer.callback_metrics["ddcl/descent/layer.bank"]) <= 1e-6


@pytest.mark.parametrize("detach", [False, True])
def test_a_rate_beyond_the_limit_is_told_with_the_limit(detach):
    message = r"raised L_q( - T H)? of bank 'layer.bank' on its own batch by .*rate is at its limit.*stable below [1-9]"
    with pytest.raises(DescentViolationError, match=message) as raised:
        fit(Plain(lr=30.0, detach_assignments=detach), KMeansInitialization(), DescentCheck(1, on_violation="raise"))
    assert ("L_q - T H" in str(raised.value)) == detach


def test_a_warning_comes_once_a_bank_and_violations_are_counted():
    check = DescentCheck(every_n_batches=1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="DescentCheck: the step before step") as caught:
            fit(Plain(lr=30.0), KMeansInitialization(), check)
        assert sum("DescentCheck" in str(warning.message) for warning in caught) == 1
        assert 1 < check.violations <= check.checks == 12


@pytest.mark.parametrize("detach", [False, True])
def test_the_value_is_that_of_the_function_which_descends(detach):
    """Logged: the change relative to L_q, for the tokens and T of the batch."""
    module = Plain(detach_assignments=detach)
    calls, values = [], []
    forward = PrototypeBank.forward

    def spy(bank, tokens, mask=None, need_weights=False):
        calls.append((tokens.detach().clone(), bank.prototypes.detach().clone()))
        return forward(bank, tokens, mask, need_weights)

    module.layer.bank.forward = spy.__get__(module.layer.bank)
    trainer = fit(module, DescentCheck(every_n_batches=1), max_epochs=1)
    tokens, before = calls[-1]
    for prototypes in (before, module.layer.bank.prototypes.detach()):
        z, p = tokens.double().unsqueeze(0), prototypes.double()
        loss = prototype_attention(z, p, 20.0).terms.loss
        entropy = assignment_statistics(z, p, 20.0).entropy
        values.append((float(lyapunov(loss, 20.0, entropy, detach_assignments=detach)), float(loss)))
    expected = (values[1][0] - values[0][0]) / values[0][1]
    assert expected < -1e-3
    assert float(trainer.callback_metrics["ddcl/descent/layer.bank"]) == pytest.approx(expected, rel=1e-4)


def test_token_normalized_steps_are_held_against_the_free_energy():
    """They hold assignments constant whatever the bank does: L_q itself rises on the way."""

    def steps(parameters, lr):
        return TokenNormalized(parameters, lr=lr).watch(module)

    module = Plain(lr=0.2, optimizer=steps, temperature=0.4)
    check = DescentCheck(every_n_batches=1, on_violation="raise", tolerance=1e-6)
    fit(module, KMeansInitialization(), check, max_epochs=4)
    assert (check.checks, check.violations) == (24, 0)
    assert module.losses[-1] > 1.2 * module.losses[0]


def weights_after(*callbacks, **layer):
    torch.manual_seed(0)
    module = Project(dropout=0.5, embedding_scale="per_dimension", **layer)
    fit(module, KMeansInitialization(), *callbacks, max_epochs=3)
    return {**module.state_dict(), "random": torch.rand(3), "losses": torch.tensor(module.losses)}


@pytest.mark.parametrize("detach", [False, True])
def test_a_run_with_it_is_bit_equal_to_one_without(detach):
    """Weights, running statistics, temperature, dropout and the random state."""
    plain = weights_after(detach_assignments=detach)
    checked = weights_after(DescentCheck(every_n_batches=1), detach_assignments=detach)
    assert plain.keys() == checked.keys()
    assert [name for name, value in plain.items() if not torch.equal(value, checked[name])] == []


def test_padding_and_several_banks_are_read():
    check = DescentCheck(every_n_batches=1, tolerance=10.0)
    trainer = fit(Masked(), KMeansInitialization(), check)
    assert check.checks == 12
    assert bool(torch.isfinite(trainer.callback_metrics["ddcl/descent/layer.bank"]))
    check = DescentCheck(every_n_batches=4)
    module = TwoLevels()
    trainer = fit(module, KMeansInitialization(), check)
    assert check.checks == 6
    assert {f"ddcl/descent/{name}" for name in find_banks(module)} <= set(trainer.callback_metrics)


def test_prototypes_that_do_not_move_are_not_judged():
    check = DescentCheck(every_n_batches=1)
    fit(Plain(lr=0.0), check)
    assert check.checks == 0


def test_accumulated_gradients_are_refused_at_the_start():
    message = "accumulate_grad_batches must be 1 for DescentCheck.*got 2"
    with pytest.raises(ValueError, match=message):
        fit(Project(), DescentCheck(), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=message):
        fit(clustering_module(accumulate_grad_batches=2), DescentCheck(), data=loader())


def test_a_resized_bank_is_not_compared_with_what_it_was():
    class Doubled(KMeansInitialization):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            if trainer.global_step == 3:
                pl_module.layer.bank.prototypes.data *= 3
                check.bank_resized("layer.bank")

    check = DescentCheck(every_n_batches=1, on_violation="raise")
    fit(Plain(), Doubled(), check)
    assert check.checks == 11


def test_counts_go_on_after_a_resume():
    check = DescentCheck(every_n_batches=1)
    with pytest.warns(UserWarning, match="DescentCheck"):
        fit(Plain(lr=30.0), KMeansInitialization(), check)
    restored = DescentCheck(every_n_batches=1)
    restored.load_state_dict(check.state_dict())
    assert restored.state_dict() == check.state_dict()
    assert restored.violations > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches must be at least 1"),
        ({"on_violation": "stop"}, "on_violation must be 'warn' or 'raise'; got 'stop'"),
        ({"tolerance": -1.0}, "tolerance must be >= 0, relative to L_q; got -1.0"),
    ],
)
def test_descent_check_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DescentCheck(**kwargs)


def test_descent_check_needs_a_bank():
    module = Project()
    module.layer = nn.Identity()
    with pytest.raises(ValueError, match="DescentCheck found no PrototypeBank in Project"):
        fit(module, DescentCheck())
