import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toys import QUIET, Project, TwoOptimizers, fit

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule, PCABackbone, two_timescale_groups
from ddcl_lightning.callbacks import RatioGuard
from ddcl_lightning.datamodules.digits import DigitsDataModule


class Grouped(Project):
    """One optimizer, two parameter groups."""

    def __init__(self, rho=0.1):
        super().__init__()
        self.rho = rho

    def configure_optimizers(self):
        groups = two_timescale_groups(self, 1e-2, rho=0.1)
        groups[1]["lr"] = self.rho * 1e-2
        return torch.optim.Adam(groups)


def test_two_groups_of_one_optimizer_pass_and_the_ratio_is_logged():
    trainer = fit(Grouped(), RatioGuard())
    assert float(trainer.callback_metrics["rho"]) == pytest.approx(0.1)


def test_two_optimizers_pass():
    trainer = fit(TwoOptimizers(), RatioGuard())
    assert float(trainer.callback_metrics["rho"]) == pytest.approx(0.1)


@pytest.mark.parametrize("make", [Project, lambda: Grouped(rho=1.0), lambda: Grouped(rho=3.0)])
def test_rho_of_one_or_more_is_refused_before_the_first_step_where_asked(make):
    module = make()
    message = r"rho = lr_encoder / lr_prototypes is [13] at step 0, not below max_ratio = 1"
    with pytest.raises(RuntimeError, match=message):
        fit(module, RatioGuard(on_violation="raise"))
    assert module.losses == []


def test_a_plain_optimizer_is_not_stopped_and_the_sentence_claims_no_stability():
    class Plain(Project):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Plain()
    with pytest.warns(UserWarning, match="rho = lr_encoder") as caught:
        fit(module, RatioGuard())
    assert len(module.losses) == 12
    (message,) = (str(warning.message) for warning in caught if "rho" in str(warning.message))
    assert "Theorem" not in message
    assert "no rho prevents that, but a bound on the scale" in message
    assert "a loss of its own" in message


def test_a_stricter_bound():
    fit(Grouped(rho=0.4), RatioGuard(max_ratio=0.5))
    with pytest.raises(RuntimeError, match=r"is 0.5 at step 0, not below max_ratio = 0.5"):
        fit(Grouped(rho=0.5), RatioGuard(max_ratio=0.5, on_violation="raise"))


def test_rates_that_drift_on_the_way_are_caught():
    class Drifting(Grouped):
        def training_step(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] *= 0.1
            return super().training_step(batch, batch_idx)

    module = Drifting()
    with pytest.raises(RuntimeError, match="is 1 at step 1"):
        fit(module, RatioGuard(on_violation="raise"))


def test_a_warning_comes_once_a_run():
    guard = RatioGuard()
    for _ in range(2):
        with pytest.warns(UserWarning, match="rho = lr_encoder") as caught:
            fit(Project(), guard)
        assert sum("rho" in str(warning.message) for warning in caught) == 1


def test_parameters_behind_the_bank_can_be_ignored_and_frozen_ones_are():
    class Classifier(Grouped):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(4, 4)

        def configure_optimizers(self):
            rest = [parameter for name, parameter in self.named_parameters() if "layer" not in name]
            return torch.optim.SGD(
                [
                    {"params": self.layer.parameters(), "lr": 1e-2},
                    {"params": rest[:2], "lr": 1e-3},
                    {"params": rest[2:]},
                ],
                lr=1e-1,
            )

    with pytest.raises(RuntimeError, match="is 10 at step 0"):
        fit(Classifier(), RatioGuard(on_violation="raise"))
    assert float(fit(Classifier(), RatioGuard(ignore=["classifier"])).callback_metrics["rho"]) == pytest.approx(0.1)
    frozen = Classifier()
    frozen.classifier.requires_grad_(False)
    assert float(fit(frozen, RatioGuard()).callback_metrics["rho"]) == pytest.approx(0.1)


def test_the_packages_own_module_tells_its_encoder_from_its_classifier():
    module = DDCLReadoutModule(
        PCABackbone(64, 8, trainable=True), DDCLReadout(10), Classification(num_classes=10), lr_task=0.1
    )
    trainer = pl.Trainer(callbacks=[RatioGuard()], max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=DigitsDataModule())
    assert float(trainer.callback_metrics["rho"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_ratio": 0.0}, r"max_ratio must be in \(0, 1\]"),
        ({"max_ratio": 1.5}, r"max_ratio must be in \(0, 1\]"),
        ({"on_violation": "stop"}, "on_violation must be"),
    ],
)
def test_ratio_guard_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RatioGuard(**kwargs)
