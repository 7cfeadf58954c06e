"""What a CollapseWarning finds, and what it does about it."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from toys import QUIET, Project, blobs, fit, loader, read_layer

from ddcl_lightning import (
    BankRecord,
    Clustering,
    CollapseRules,
    ConvBackbone,
    ConvDecoder,
    DDCLReadout,
    DDCLReadoutModule,
    Finding,
    PCABackbone,
    PrototypeBank,
    Reconstruction,
    Signal,
    VectorQuantizer,
)
from ddcl_lightning.callbacks import CollapseError, CollapseWarning, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules.digits import DigitsDataModule
from ddcl_lightning.heads import SoftVQ
from ddcl_lightning.monitoring.additional import TAKEN
from tests.tiny import absolute


class Change(pl.Callback):
    """Does something to the module before a step, and before all that follow."""

    def __init__(self, step: int, change: Any) -> None:
        self.step, self.change = step, change

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.step:
            with torch.no_grad():
                self.change(pl_module)


class Unsupervised(Project):
    """It trains by hand, and nobody sees a loss: that of the codebook is all there is."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        if loss.requires_grad:  # the probe's has none
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


@contextmanager
def warned(pattern: str) -> Iterator[list[str]]:
    """Context manager with the warnings of the callback; one of them matches."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [text for warning in caught if (text := str(warning.message)).startswith("CollapseWarning: ")]
    assert any(re.search(pattern, text) for text in texts), texts


def probed(*args: Any, **kwargs: Any) -> CollapseWarning:
    """A CollapseWarning with the probe of the toys."""
    return CollapseWarning(*args, **{"probe": read_layer, **kwargs})


def make_one(module: Any) -> None:
    """A collapse of the encoder: all tokens become one."""
    module.encoder.weight.zero_()


def of_level(watch: CollapseWarning, level: str) -> list[Finding]:
    return [finding for finding in watch.findings if finding.level == level]


def signs(watch: CollapseWarning, level: str = "notice") -> list[str]:
    return [finding.sign for finding in of_level(watch, level)]


def the(watch: CollapseWarning, sign: str) -> Finding:
    """The first notice of a sign."""
    return next(finding for finding in of_level(watch, "notice") if finding.sign == sign)


def whole() -> "DataLoader[Any]":
    """One batch per epoch."""
    return loader(batch_size=96)


def digits(
    watch: CollapseWarning,
    *callbacks: pl.Callback,
    rho: float = 0.0,
    epochs: int = 30,
    size: int = 10,
    scale: str = "auto",
    data: Any = None,
    **kwargs: Any,
) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    module = DDCLReadoutModule(
        PCABackbone(64, 16, trainable=rho > 0),
        DDCLReadout(size, embedding_scale=scale),
        Clustering(num_classes=10),
        rho=rho,
        **kwargs,
    )
    callbacks = (KMeansInitialization(progress=False), *(callbacks or [TemperatureAnnealing()]), watch)
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, limit_val_batches=0, **QUIET)
    trainer.fit(module, DigitsDataModule(batch_size=256) if data is None else data)
    return trainer


# Healthy: a warning would be an error ------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"rho": 0.1}, {"size": 64}], ids=["frozen", "trained", "64 prototypes"])
def test_a_healthy_run_has_no_finding(kwargs: dict[str, Any]) -> None:
    watch = probed(every_n_batches=5)
    digits(watch, **kwargs)
    assert watch.findings == []
    now = watch.report["head.attention.bank"]
    assert now.bank is not None
    assert now.bank.temperature_ratio < 0.1
    assert now.separation > 0.3
    assert now.explained > 0.4
    assert "no sign of a collapse" in watch.verdict()


@pytest.mark.parametrize("action", ["warn", "stop", "raise"])
def test_deterministic_annealing_from_above_the_critical_temperature_has_no_finding(action: Any) -> None:
    watch = probed(every_n_batches=2, on_collapse=action)
    trainer = digits(watch, TemperatureAnnealing(2.0, 0.005), epochs=20)
    assert trainer.current_epoch == 20
    assert watch.findings == []


def test_a_stream_in_the_order_of_the_classes_is_no_alarm_and_has_no_dead_codes() -> None:
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    rows = [data.train_dataloader().dataset[number] for number in range(1200)]
    x = torch.stack([row["x"].flatten() for row in rows])
    y = torch.stack([torch.as_tensor(row["y"]) for row in rows])
    order = y.argsort(stable=True)
    watch = probed(every_n_batches=2)
    digits(watch, data=DataLoader(TensorDataset(x[order], y[order]), batch_size=64), epochs=15)
    assert of_level(watch, "alarm") == []
    assert "dead" not in signs(watch)
    assert watch.report["head.attention.bank"].dead == ()


def test_a_small_cluster_is_not_dead_though_a_batch_without_it_is_large() -> None:
    x, _ = blobs(4000)
    x[: 4000 - 8] = x[torch.arange(4000 - 8) // 4 * 4 + torch.arange(4000 - 8) % 3]  # the fourth has 8 tokens
    x[-8:] = blobs(32)[0][3::4]
    module, watch = Project(lr=0.0), probed(every_n_batches=1)
    module.layer.bank.set_prototypes(torch.stack([blobs()[0][k::4].mean(0) for k in range(4)]).unsqueeze(0))
    data = DataLoader(TensorDataset(x, x), batch_size=500, shuffle=True)  # 50 tokens of each of 4 codes are 200
    fit(module, watch, TemperatureAnnealing(), data=data, max_epochs=10)
    counts = watch.report["layer.bank"]
    assert counts.usage == 1.0
    assert watch.findings == []


@pytest.mark.filterwarnings("ignore:CollapseWarning. few_codes")  # as is true, when it has had its time
def test_a_random_start_that_travels_to_the_data_is_not_falling() -> None:
    watch = probed(every_n_batches=1, rules=CollapseRules(max_dead=1.0, max_extent=1e9))
    module = Project(lr=0.1)
    with torch.no_grad():
        module.encoder.weight.mul_(0.02)  # tokens much closer together than the prototypes
        module.encoder.requires_grad_(False)
    fit(module, TemperatureAnnealing(), watch, max_epochs=10)
    assert "falling" not in signs(watch)
    assert all(alarm.step > 20 for alarm in of_level(watch, "alarm"))


@pytest.mark.slow
def test_a_standardized_autoencoder_with_many_codes_is_no_alarm() -> None:
    """Its separation and the rank of its tokens change most of all at the start."""
    pl.seed_everything(0, verbose=False)
    weight = 0.1414
    head = SoftVQ(
        64, commitment_weight=0.25 * weight, entropy_weight=0.04 * weight, embedding_scale="per_dimension", code_dim=8
    )
    module = DDCLReadoutModule(
        ConvBackbone(1, 16, (32,)),
        head,
        Reconstruction(ConvDecoder(1, (32,)), quantization_weight=0.0),
        prototype_optimizer={"name": "TokenNormalized", "args": {"relocation_threshold": 0.5}},
        lr_prototypes=0.05,
        rho=0.04,
        lr_task=2e-3,
    )
    start = KMeansInitialization(num_restarts=1, max_tokens=8192, progress=False)
    watch = probed(every_n_batches=5)
    callbacks = [TemperatureAnnealing(0.05, 0.0005, interval="step"), start, watch]
    trainer = pl.Trainer(max_epochs=6, callbacks=callbacks, limit_val_batches=0, **QUIET)
    trainer.fit(module, DigitsDataModule(batch_size=64, val_fraction=0.2, as_images=True))
    assert len(watch.readings["head.quantizer.bank"]) > 20
    assert of_level(watch, "alarm") == []


def test_one_prototype_is_watched_without_a_finding() -> None:
    watch = probed(every_n_batches=1)
    fit(Unsupervised(num_prototypes=1), watch)
    assert watch.findings == []


# What is read, and when ---------------------------------------------------------------------------


def test_shuffled_data_are_judged_over_fifty_to_a_hundred_tokens_of_each_code() -> None:
    """However long a pass is: 4 codes and batches of 32 of 4,000 samples, one in ten of which is read."""
    x, _ = blobs(4000)
    module, watch = Project(lr=0.0), probed(every_n_batches=10, rules=CollapseRules(max_dead=1.0))
    far = Change(130, lambda module: module.layer.bank.prototypes[:, 1:].add_(1e4))
    with warned("few_codes"):
        fit(module, KMeansInitialization(), watch, far, data=DataLoader(TensorDataset(x, x), 32, True), max_epochs=2)
    row = watch.report["layer.bank"]
    assert row.enough == 200
    assert 200 <= row.num_tokens <= 432
    assert row.usage == 0.25


def test_data_in_an_order_are_judged_over_a_pass_of_what_is_read_of_it() -> None:
    x = blobs(4000)[0].sort(0).values
    watch = probed(every_n_batches=10, probe=False)
    fit(Project(lr=0.0), watch, data=DataLoader(TensorDataset(x, x), 32), max_epochs=1)
    assert watch.report["layer.bank"].enough == 4000 / 10


def test_no_period_of_the_data_hides_from_the_batches_that_are_read() -> None:
    watch = CollapseWarning(every_n_batches=10)
    read = []
    for watch._batches in range(1000):
        read += [watch._batches] * watch.is_due()
    assert len(read) == 100
    assert read[0] == 0
    for period in (2, 7, 10, 20):
        assert {number % period for number in read} == set(range(period))


def test_the_verdict_at_the_end_is_on_what_was_trained_and_harm_of_then_is_an_alarm() -> None:
    """Codes that all leave in the last step but one, when the probe was read before."""
    watch = probed(every_n_batches=1, rules=CollapseRules(patience=1))
    module = Project(lr=0.0)
    leave = Change(40, lambda module: module.layer.bank.prototypes.copy_(torch.randn(1, 4, 4).sign() * 1e3))
    with warned("Harm: the codes explain -?\\d+% of the probe's first variance"):
        fit(Unsupervised(lr=0.0), KMeansInitialization(), watch, leave, data=whole(), max_epochs=42)
    now = watch.report["layer.bank"]
    assert now.explained < 0.9
    assert f"codes explain {now.explained:.0%} of how samples differed at the start (at best" in watch.verdict()
    assert "ALARM" in watch.verdict()
    del module


def test_the_verdict_of_a_run_that_goes_on_says_when_the_probe_was_read() -> None:
    watch = probed(every_n_batches=1)

    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                self.verdict = watch.verdict()

    asks = Asks()
    fit(Unsupervised(), watch, asks, KMeansInitialization(), max_epochs=3)
    assert "differed at the start (at step 0, at best" in asks.verdict
    assert "differed at the start (at best" in watch.verdict()


def test_the_part_of_the_task_is_judged_where_a_step_returns_it() -> None:
    class Parts(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss * 1000, "task_loss": loss.detach()}

    kept: dict[str, list[float]] = {}
    for kind in (Project, Parts):
        watch = probed(every_n_batches=1)
        fit(kind(lr=0.0), watch, KMeansInitialization(), max_epochs=1)
        kept[kind.__name__] = [watch.monitor._judge.loss.first, watch.monitor._judge.loss.latest]
    assert kept["Parts"] == pytest.approx(kept["Project"])


def test_signals_of_banks_are_refused_in_a_sentence_where_there_is_no_bank() -> None:
    class Foreign(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.codes = VectorQuantizer(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.codes(batch[0].unsqueeze(0)).terms.loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    with warned("additional signals read banks, and Foreign holds none, only codes; falling_number will have no value"):
        fit(Foreign(), CollapseWarning(additional=[Falling()]), max_epochs=1)


# One scenario for each sign ----------------------------------------------------------------------


def watched(module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 3, **kwargs: Any) -> CollapseWarning:
    watch = probed(every_n_batches=1, **kwargs)
    fit(module, watch, *callbacks, max_epochs=epochs)
    return watch


def started_from(rows: Tensor, **kwargs: Any) -> Unsupervised:
    module = Unsupervised(lr=0.0, **kwargs)
    module.layer.bank.set_prototypes(rows.unsqueeze(0))
    return module


def test_a_temperature_above_the_critical_one_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watch = watched(Unsupervised(), KMeansInitialization(), TemperatureAnnealing(start=2.2, end=2.2), epochs=1)
    assert re.search(r"layer.bank: T / T_c is 2\.2, and 2\.2 at the end .* to one point all the time", caplog.text)
    text = the(watch, "above_critical").text
    assert re.search(r"T = .* is 2\.\d+ times the critical temperature .* Lower", text)


def test_prototypes_that_are_drawn_together_are_named_after_their_temperature() -> None:
    module = Unsupervised(lr=0.2)
    module.encoder.requires_grad_(False)
    with warned("above_critical|uniform"):
        watch = watched(module, KMeansInitialization(), TemperatureAnnealing(start=1.5, end=1.5), epochs=30)
    order = signs(watch)
    assert order.index("above_critical") < order.index("falling") < order.index("merged")
    assert re.search(r"T / T_c rose from .* Lower the temperature", the(watch, "falling").text)


def test_an_encoder_that_shrinks_its_tokens_is_named_and_an_alarm_once_codes_tell_less() -> None:
    watch = probed(every_n_batches=5)
    with pytest.warns(UserWarning, match=r"^CollapseWarning: \w+ in head.attention.bank at step .* Harm: the codes"):
        digits(watch, rho=0.5, epochs=40, scale="none")
    notice, (alarm, *_) = the(watch, "falling"), of_level(watch, "alarm")
    assert re.search(r"Delta fell to 0\.\d+ of its highest value .*: the tokens shrink .*embedding_scale=", notice.text)
    assert alarm.step > notice.step
    assert watch.report["head.attention.bank"].explained < 0.5
    assert f"ALARM: {alarm.sign} at step {alarm.step}" in watch.verdict()


def test_flat_tokens_are_noticed_before_delta_falls() -> None:
    """With unit variance per dimension the encoder makes all dimensions copies of one, and Delta falls late."""
    watch = probed(probe=False)
    digits(watch, rho=0.5, epochs=45, scale="per_dimension")
    assert signs(watch)[0] == "flat"
    pattern = r"rank of the tokens fell from 1\d.* to .* of 16.*embedding_scale='whiten'"
    assert re.search(pattern, watch.findings[0].text)
    assert "falling" not in signs(watch)


def test_two_prototypes_on_one_point_are_named() -> None:
    start = blobs()[0][:4].clone()
    start[2] = start[1] + 1e-3
    watch = watched(started_from(start))
    assert re.search(r"2 of 4 codes are within .* \(the closest are 1 and 2, 0\.00", the(watch, "merged").text)


def test_a_far_away_prototype_is_dead_once_enough_tokens_were_seen() -> None:
    start = blobs()[0][:4].clone()
    start[3] = 1e3
    watch = watched(started_from(start), epochs=4)
    assert re.search(r"1 of 4 codes \(3\) .*KMeansInitialization.*relocation_threshold", the(watch, "dead").text)
    assert the(watch, "dead").step > 200 / 16  # 50 tokens for each of 4 prototypes
    assert re.search(r"code 3 is \d+ times the tokens' spread away", the(watch, "diverging").text)


def test_tokens_on_few_codes_are_named() -> None:
    start = torch.cat([blobs()[0].mean(0, keepdim=True), 100 + torch.arange(31.0)[:, None] * torch.ones(4)])
    with warned("few_codes in layer.bank at step .* Harm: the codes tell 0 of ln K"):
        watch = watched(started_from(start, num_prototypes=32), epochs=20)
    assert "the perplexity is 1.0 of 32" in the(watch, "few_codes").text


def test_codes_that_do_not_follow_the_tokens_are_named() -> None:
    with warned("few_codes in layer.bank"):  # one code is nearest to all of them
        watch = watched(started_from(blobs()[0][:4] + 200))
    assert re.search(r"is \d[\d.e+]+ of their variance.*optimizer steps the codes", the(watch, "drifting").text)


def test_codes_that_lose_their_directions_are_named() -> None:
    def line(module: Any) -> None:
        module.layer.bank.prototypes.copy_(blobs()[0][:4][:, :1] * torch.tensor([1.0, 0.0, 0.0, 0.0]))

    with warned("falling in layer.bank .* Harm: the codes explain"):  # by the probe at the end
        watch = watched(started_from(blobs()[0][:4]), Change(6, line))
    assert re.search(r"rank of the codes fell from .* to 1 of 4", the(watch, "flat_codes").text)


def test_uniform_assignments_are_named() -> None:
    with warned(r"uniform in layer.bank at step 3: .*Harm: the assignments tell \S+ of ln K = 1\.4 nats"):
        watch = watched(Unsupervised(temperature=absolute(1e5)), KMeansInitialization())
    assert re.search(r"H = 1\.386 is 1\.000 of ln K.*Lower the temperature", the(watch, "uniform").text)


def test_tokens_that_are_not_finite_are_an_alarm_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)  # as on a GPU

    class Broken(Project):
        def tokens(self, batch: Any) -> Tensor:
            return super().tokens(batch) / 0

    with warned("CollapseWarning: non_finite in layer.bank at step 1: 16 tokens"):
        watch = watched(Broken(), epochs=1, probe=False)
    assert set(signs(watch, "alarm")) == {"non_finite"}  # of the tokens, and of the loss


def test_a_rate_of_plain_steps_that_diverges_is_named_before_training_and_an_alarm_in_it() -> None:
    watch = probed(every_n_batches=1)
    with (
        warned(r"head.attention.bank: .*stable up to a rate of .* the rate is 100") as caught,
        pytest.raises(ValueError, match="overflow"),
    ):
        digits(watch, prototype_optimizer="SGD", lr_prototypes=100.0, epochs=5)
    assert watch.findings[0].sign == "rate"
    assert "diverging" in signs(watch)
    (alarm, *_) = of_level(watch, "alarm")
    assert f"CollapseWarning: {alarm}" in caught


# Reactions ---------------------------------------------------------------------------------------


def collapsed(action: str, epochs: int = 60) -> tuple[CollapseWarning, pl.Trainer]:
    """A run that is healthy for 15 readings; then all tokens are one."""
    watch = probed(every_n_batches=1, on_collapse=action)  # type: ignore[arg-type]
    trainer = fit(started_from(blobs()[0][:4]), watch, Change(15, make_one), data=whole(), max_epochs=epochs)
    return watch, trainer


def test_an_alarm_warns_once_for_each_kind_of_harm_and_lets_the_run_go_on() -> None:
    with warned(r"CollapseWarning: \w+ in layer.bank at step \d+: .* Harm: ") as caught:
        watch, trainer = collapsed("warn")
    assert caught == [f"CollapseWarning: {alarm}" for alarm in of_level(watch, "alarm")]
    assert [text.rpartition("Harm: ")[2].split()[2] for text in caught] in (["tell", "explain"], ["explain", "tell"])
    assert trainer.global_step == 60
    assert all(finding.step > 15 for finding in watch.findings)


def test_an_alarm_stops_a_run_that_is_to_stop() -> None:
    with warned("Harm: "):
        watch, trainer = collapsed("stop")
    assert trainer.global_step == of_level(watch, "alarm")[0].step < 60


def test_an_alarm_ends_a_run_with_an_error_that_is_to_raise_one() -> None:
    with pytest.raises(CollapseError, match=r"\w+ in layer.bank at step \d+: .* Harm: the codes "):
        collapsed("raise")


@pytest.mark.parametrize("action", ["stop", "raise"])
def test_a_notice_never_ends_a_run(action: Any) -> None:
    start = blobs()[0][:4].clone()
    start[2], start[3] = start[1] + 1e-3, 1e3
    module, watch = started_from(start), probed(every_n_batches=1, on_collapse=action)
    trainer = fit(module, watch, max_epochs=8)
    assert {"merged", "dead", "diverging"} <= set(signs(watch))
    assert of_level(watch, "alarm") == []
    assert trainer.global_step == 48
    assert "noticed, no harm measured: " in watch.verdict()


def test_without_a_probe_nothing_is_called_beside_the_training() -> None:
    module, watch = Project(), probed(every_n_batches=1, probe=False)
    fit(module, watch, max_epochs=2)
    assert len(module.losses) == 12
    assert "explained" not in watch.readings["layer.bank"][-1]
    assert math.isnan(watch.report["layer.bank"].explained)


def test_every_signal_is_logged_and_kept() -> None:
    watch = probed(every_n_batches=1)
    trainer = fit(Project(), KMeansInitialization(), TemperatureAnnealing(), watch, data=whole(), max_epochs=5)
    names = {name.split("/")[1] for name in trainer.callback_metrics if name.startswith("ddcl/")}
    expected = {
        *("delta_min", "delta_mean", "delta_relative", "embedding_scale", "effective_dimension"),
        *("temperature", "temperature_ratio", "entropy", "entropy_ratio", "used_in_batch", "num_codes", "usage"),
        *("perplexity", "dead", "near_duplicates", "separation", "token_rank", "code_rank", "spread"),
        *("commitment", "extent", "explained", "lyapunov"),
    }
    assert names == expected
    assert names <= set(TAKEN)
    (readings,) = watch.readings.values()
    assert [reading["step"] for reading in readings] == [1, 2, 3, 4, 5]
    assert set(readings[-1]) == (expected | {"step"}) - {"temperature"}


def test_heads_are_judged_one_by_one() -> None:
    module = Unsupervised(num_heads=2, lr=0.0)
    with torch.no_grad():
        module.layer.input_projection.weight.copy_(torch.eye(4))
    start = torch.stack([blobs()[0][:4, :2], blobs()[0][:4, 2:]])
    start[1, 0] = 1e4
    module.layer.bank.set_prototypes(start)
    watch = watched(module, epochs=4)
    assert the(watch, "dead").codebook == "layer.bank/head1"
    assert "layer.bank/head0: " in watch.verdict()
    assert {finding.codebook for finding in watch.findings if finding.sign != "merged"} == {"layer.bank/head1"}


# Signals of a user's own -------------------------------------------------------------------------


class Falling(Signal):
    """The negative number of its readings, and a sign once the mean of three has passed -3."""

    name = "falling_number"

    def __init__(self) -> None:
        self.readings = 0

    def read(self, record: BankRecord) -> Tensor:
        self.readings -= 1
        return torch.full((len(record.codebook),), float(self.readings))

    def sign(self, value: float, earlier: Any) -> str | None:
        return "see a doctor." if sum([value, *earlier[-2:]]) / 3 < -3 else None


def test_a_signal_of_the_users_is_logged_and_noticed_once() -> None:
    watch = probed(every_n_batches=1, rules=CollapseRules(patience=2), additional=[Falling()])
    trainer = fit(Project(), KMeansInitialization(), TemperatureAnnealing(), watch)
    assert watch.findings == [Finding("notice", "falling_number", "layer.bank", 6, "see a doctor.")]
    assert float(trainer.callback_metrics["ddcl/falling_number/layer.bank"]) < -6
    assert watch.readings["layer.bank"][3]["falling_number"] == -4
    assert "falling_number at step 6" in watch.verdict()


class Constant(Signal):
    """A signal that is given what it has to return."""

    def __init__(self, name: Any = "constant", value: Any = None, text: Any = None) -> None:
        if name is not None:
            self.name = name
        self.value, self.text = value, text

    def read(self, record: BankRecord) -> Any:
        return torch.ones(len(record.codebook)) if self.value is None else self.value

    def sign(self, value: float, earlier: Any) -> Any:
        return self.text


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ([Constant(None)], "additional must hold signals with a name; got None of Constant. Set its name, a string."),
        ([Constant("")], "additional must hold signals with a name; got '' of Constant"),
        ([Constant(3)], "additional must hold signals with a name; got 3 of Constant"),
        ([Constant("a"), Constant("b"), Constant("a")], "signals of different names; got 'a' twice. Rename one."),
        *[([Constant(name)], f"of names that are free; got {name!r} of Constant. Rename it") for name in TAKEN],
    ],
)
def test_signals_that_could_not_be_told_apart_are_refused(signals: list[Signal], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        probed(additional=signals)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (0.5, "0.5"),
        ([0.5], "[0.5]"),
        (torch.ones(()), "torch.float32 of shape ()"),
        (torch.ones(2), "torch.float32 of shape (2,)"),
        (torch.ones(1, dtype=torch.long), "torch.int64 of shape (1,)"),
    ],
    ids=str,
)
def test_a_signal_that_reads_no_number_per_head_is_refused_by_its_name(value: Any, got: str) -> None:
    expected = (
        f"read of the signal 'constant' must return floats of shape (1,), one per head; got {got}. Return a tensor"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        fit(Project(), probed(every_n_batches=1, additional=[Constant(value=value)]))


@pytest.mark.parametrize("text", [True, 3, ["see a doctor"]])
def test_a_sign_that_is_no_sentence_is_refused_by_the_signals_name(text: Any) -> None:
    expected = f"sign of the signal 'constant' must return a sentence, or None .* got {re.escape(repr(text))}. Return a"
    with pytest.raises(ValueError, match=expected):
        fit(Project(), probed(every_n_batches=1, additional=[Constant(text=text)]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_collapse": "ignore"}, "on_collapse must be 'warn', 'stop' or 'raise'; got 'ignore'"),
        ({"every_n_batches": 0}, "every_n_batches must be at least 1; got 0"),
    ],
)
def test_collapse_warning_refuses_arguments_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probed(**kwargs)


def test_the_state_of_an_earlier_version_starts_anew() -> None:
    watch = CollapseWarning()
    with pytest.warns(UserWarning, match="from before version 0.2; its histories start anew"):
        watch.load_state_dict({"batches": 3, "heads": {}, "reported": []})
    assert (watch.findings, watch._batches) == ([], 3)
