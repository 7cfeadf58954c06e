import math
import re
import warnings
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import QUIET, Project, blobs, fit, loader

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, PCABackbone, PrototypeBank, Signal
from ddcl_lightning.callbacks import CollapseError, CollapseWarning, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.callbacks.collapse_warning import TAKEN
from ddcl_lightning.datamodules.digits import DigitsDataModule
from ddcl_lightning.monitoring.history import ENOUGH_TOKENS, HeadHistory, PrototypeUse, trend
from ddcl_lightning.monitoring.signals import HeadSignals
from tests.tiny import absolute


def signs(watch):
    """Sign and step of every report."""
    return [(message.split()[0], int(message.split(" at step ")[1].split(":")[0])) for message in watch.reported]


@contextmanager
def reports(pattern):
    """Every warning inside comes from the callback, and one of them matches."""
    with pytest.warns(UserWarning, match="^CollapseWarning: ") as caught:
        yield
    texts = [str(warning.message) for warning in caught]
    assert any(re.search(pattern, text) for text in texts), texts


def digits(watch, *callbacks, lr=1e-2, rho=0.0, epochs=30, size=10, scale="auto"):
    pl.seed_everything(0, verbose=False)
    module = DDCLReadoutModule(
        PCABackbone(64, 16, trainable=rho > 0),
        DDCLReadout(size, embedding_scale=scale),
        Clustering(num_classes=10),
        lr_prototypes=lr,
        rho=rho,
    )
    trainer = pl.Trainer(callbacks=[watch, *callbacks], max_epochs=epochs, limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=256))
    return trainer


# Healthy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"rho": 0.1}, {"size": 64}], ids=["frozen", "trained", "64 prototypes"])
def test_a_healthy_run_warns_of_nothing(kwargs):
    watch = CollapseWarning(every_n_batches=5)
    digits(watch, KMeansInitialization(), TemperatureAnnealing(), **kwargs)  # warnings are errors here
    assert watch.reported == []
    (now,) = watch.signals["head.attention.bank"]
    assert now.temperature_ratio < 0.1
    assert now.relative_separation > 0.3


def test_a_random_start_that_travels_to_the_data_is_not_falling():
    watch = CollapseWarning(every_n_batches=1, on_collapse="warn")
    module = Project(lr=0.1)
    with torch.no_grad():
        module.encoder.weight.mul_(0.02)  # tokens much closer together than the prototypes
        module.encoder.requires_grad_(False)
    with reports("dead"):
        fit(module, TemperatureAnnealing(), watch, max_epochs=10)
    assert {sign for sign, _ in signs(watch)} == {"dead"}


# One scenario for each sign ----------------------------------------------------------------------


def test_above_the_critical_temperature():
    watch = CollapseWarning(every_n_batches=1)
    with reports(r"above_critical in layer.bank at step 3: T = .* is 2\.\d+ times the critical"):
        fit(Project(), KMeansInitialization(), TemperatureAnnealing(start=2.2, end=2.2), watch)
    assert signs(watch)[0] == ("above_critical", 3)


def test_the_temperature_warns_before_delta_falls():
    watch = CollapseWarning(every_n_batches=1, patience=1)
    module = Project(lr=0.2)
    module.encoder.requires_grad_(False)
    with reports("falling"):
        fit(module, KMeansInitialization(), TemperatureAnnealing(start=1.5, end=1.5), watch, max_epochs=30)
    order = [sign for sign, _ in signs(watch)]
    assert order.index("above_critical") < order.index("falling") < order.index("merged")
    assert "the spread of the embeddings does not" in next(text for text in watch.reported if "falling" in text)


def test_an_encoder_that_shrinks_its_embeddings():
    watch = CollapseWarning(every_n_batches=5)
    with reports(r"falling in .*Delta fell from 1\.\d+ to 0\.\d+; the embeddings shrink"):
        digits(watch, KMeansInitialization(), TemperatureAnnealing(), rho=0.5, epochs=25, scale="none")
    assert "Bound their scale (embedding_scale=" in watch.reported[0]


def test_two_prototypes_on_one_point_are_reported_as_merged():
    module = Project(lr=0.0)
    start = blobs()[0][:4].clone()
    start[2] = start[1] + 1e-3
    module.layer.bank.set_prototypes(start.unsqueeze(0))
    watch = CollapseWarning(every_n_batches=1)
    with reports("merged in layer.bank at step 3: prototypes 1 and 2 are 0.00"):
        fit(module, watch, max_epochs=1)
    assert "merged" in dict(signs(watch))


def test_a_far_away_prototype_is_dead():
    module = Project(lr=0.0)
    start = blobs()[0][:4].clone()
    start[3] = 1e3
    module.layer.bank.set_prototypes(start.unsqueeze(0))
    watch = CollapseWarning(every_n_batches=1)
    with reports(r"dead in layer.bank at step 13: 1 of 4 prototypes \(3\) .* last 208 tokens"):
        fit(module, watch, max_epochs=3)
    assert signs(watch) == [("dead", 13)]  # 200 tokens, 50 for each of 4 prototypes, make 13 batches


def test_uniform_assignments_are_reported():
    watch = CollapseWarning(every_n_batches=1)
    with reports(r"uniform in layer.bank at step 3: H = 1.386 is 1.000 of ln K"):
        fit(Project(temperature=absolute(1e5)), KMeansInitialization(), watch, max_epochs=1)


def test_tokens_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)  # as on a GPU

    class Broken(Project):
        def tokens(self, batch):
            return super().tokens(batch) / 0

    with reports("not_finite in layer.bank at step 1"):
        fit(Broken(), CollapseWarning(every_n_batches=100), max_epochs=1)


def test_a_rate_that_throws_the_prototypes_out_is_reported_early():
    watch = CollapseWarning()
    with reports("9 of 10 prototypes"):
        digits(watch, KMeansInitialization(), TemperatureAnnealing(), lr=3.0)
    assert signs(watch) == [("dead", 21)]  # epoch 2 of 30, with the default interval


# Reactions ---------------------------------------------------------------------------------------


def test_stop_ends_training():
    with reports("uniform"):
        trainer = fit(
            Project(temperature=absolute(1e5)), CollapseWarning(every_n_batches=1, on_collapse="stop"), max_epochs=5
        )
    assert trainer.global_step == 3


def test_on_collapse_raise_ends_the_run_with_an_error():
    with pytest.raises(CollapseError, match=r"above_critical in layer.bank at step 3: .*; uniform in layer.bank"):
        fit(Project(temperature=absolute(1e5)), CollapseWarning(every_n_batches=1, on_collapse="raise"))


def test_a_sign_is_reported_once_and_again_after_it_went_away():
    class Swinging(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hot = 4 <= trainer.global_step < 9 or trainer.global_step >= 14
            pl_module.layer.bank.set_temperature(absolute(1e5 if hot else 1.0))

    watch = CollapseWarning(every_n_batches=1, patience=2)
    with reports("uniform"):
        fit(Project(temperature=absolute()), KMeansInitialization(), watch, Swinging(), max_epochs=4)
    assert [step for sign, step in signs(watch) if sign == "uniform"] == [6, 16]


def test_every_signal_is_logged():
    trainer = fit(Project(), KMeansInitialization(), TemperatureAnnealing(), CollapseWarning(every_n_batches=1))
    logged = {name.split("/")[1] for name in trainer.callback_metrics if name.startswith("ddcl/")}
    assert logged == {
        "delta_min",
        "delta_mean",
        "delta_relative",
        "delta_trend",
        "embedding_scale",
        "effective_dimension",
        "temperature",
        "temperature_ratio",
        "entropy",
        "entropy_ratio",
        "used_in_batch",
        "dead_prototypes",
    }


def test_one_prototype_is_watched_without_a_sign():
    watch = CollapseWarning(every_n_batches=1)
    fit(Project(num_prototypes=1), watch)
    assert watch.reported == []


def test_heads_are_judged_one_by_one():
    module = Project(num_heads=2, lr=0.0)
    with torch.no_grad():
        module.layer.input_projection.weight.copy_(torch.eye(4))
    start = torch.stack([blobs()[0][:4, :2], blobs()[0][:4, 2:]])
    start[1, 0] = 1e4
    module.layer.bank.set_prototypes(start)
    watch = CollapseWarning(every_n_batches=1)
    with reports("dead in layer.bank/head1"):
        fit(module, watch, max_epochs=3)
    assert signs(watch) == [("dead", 13)]


def test_a_resumed_run_warns_as_the_whole_one(tmp_path):
    def run(watch, **kwargs):
        module = Project(lr=0.0)
        start = blobs()[0][:4].clone()
        start[3] = 1e3
        module.layer.bank.set_prototypes(start.unsqueeze(0))
        return fit(module, watch, data=loader(shuffle=False), **kwargs)

    first, rest = CollapseWarning(every_n_batches=1), CollapseWarning(every_n_batches=1)
    run(first, max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    assert first.reported == []
    with reports("last 208 tokens"):
        run(rest, max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert signs(rest) == [("dead", 13)]


def test_a_resumed_run_reads_the_signals_of_the_whole_one_bit_for_bit(tmp_path):
    def run(watch, **kwargs):
        data = loader(size=4800, batch_size=480, shuffle=False)
        return fit(Project(), KMeansInitialization(), watch, TemperatureAnnealing(duration=2), data=data, **kwargs)

    whole, first, rest = (CollapseWarning(every_n_batches=1) for _ in range(3))
    run(whole, max_epochs=2)
    run(first, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    run(rest, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert rest.signals["layer.bank"][0].scalars() == whole.signals["layer.bank"][0].scalars()
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["CollapseWarning"]
    window = saved["heads"]["layer.bank\n0"]["tokens"]
    assert sum(map(len, window)) == 5 * 480  # enough for a covariance, and no more
    assert sum(tokens.untyped_storage().nbytes() for tokens in window) == 5 * 480 * 4 * 4


def test_another_run_starts_without_memory():
    watch = CollapseWarning(every_n_batches=1)
    wide = DataLoader(TensorDataset(100 * blobs()[0], blobs()[1]), batch_size=16)
    fit(Project(), KMeansInitialization(), watch, TemperatureAnnealing(), data=wide)
    fit(Project(), KMeansInitialization(), watch, TemperatureAnnealing())
    assert watch.reported == []  # no fall from the separation of the first run


@pytest.mark.parametrize("from_data", [True, False])
def test_a_fall_counts_from_the_start_only_where_the_start_was_data(from_data):
    watch, history = CollapseWarning(), HeadHistory(PrototypeUse.empty(2))
    falls = []
    # It travels for 15 readings, rests for 10, and falls.
    for delta in [5.0 - 0.3 * reading for reading in range(15)] + [0.8] * 10 + [0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2]:
        now = HeadSignals(delta, delta, (0, 1), 1.0, 2.0, 0.1, 1.0, 0.1, 2, torch.ones(2) / 2, torch.tensor([50, 50]))
        falls.append("falling" in watch._judge(history, now, from_data, {}))
    assert falls.index(True) == (11 if from_data else 31)


class Falling(Signal):
    """The negative number of its readings, and a sign once the mean of three has passed -3."""

    name = "falling_number"

    def __init__(self) -> None:
        self.readings = 0

    def read(self, record):
        self.readings -= 1
        return torch.full((len(record.codebook),), float(self.readings))

    def sign(self, value, earlier):
        return "see a doctor." if sum([value, *earlier[-2:]]) / 3 < -3 else None


def test_a_signal_of_the_users_is_logged_and_reported_once():
    watch = CollapseWarning(every_n_batches=1, patience=2, additional=[Falling()])
    with pytest.warns(UserWarning, match=r"falling_number in layer.bank at step 6: see a doctor"):
        trainer = fit(Project(), KMeansInitialization(), TemperatureAnnealing(), watch)
    assert [message.split()[0] for message in watch.reported] == ["falling_number"]
    assert float(trainer.callback_metrics["ddcl/falling_number/layer.bank"]) < -6


class Constant(Signal):
    """A signal that is given what it has to return."""

    def __init__(self, name="constant", value=None, text=None):
        if name is not None:
            self.name = name
        self.value, self.text = value, text

    def read(self, record):
        return torch.ones(len(record.codebook)) if self.value is None else self.value

    def sign(self, value, earlier):
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
def test_signals_that_could_not_be_told_apart_are_refused(signals, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CollapseWarning(additional=signals)


def test_every_name_of_the_callback_is_taken():
    trainer = fit(Project(), CollapseWarning(every_n_batches=1))
    assert {name.split("/")[1] for name in trainer.callback_metrics if name.startswith("ddcl/")} <= set(TAKEN)


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
def test_a_signal_that_reads_no_number_per_head_is_refused_by_its_name(value, got):
    expected = (
        f"read of the signal 'constant' must return floats of shape (1,), one per head; got {got}. Return a tensor"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        fit(Project(), CollapseWarning(every_n_batches=1, additional=[Constant(value=value)]))


@pytest.mark.parametrize("text", [True, 3, ["see a doctor"]])
def test_a_sign_that_is_no_sentence_is_refused_by_the_signals_name(text):
    expected = f"sign of the signal 'constant' must return a sentence, or None .* got {re.escape(repr(text))}. Return a"
    with pytest.raises(ValueError, match=expected):
        fit(Project(), CollapseWarning(every_n_batches=1, additional=[Constant(text=text)]))


def test_flat_embeddings_are_noticed_before_delta_falls():
    """With unit variance per dimension the encoder makes all dimensions copies of one, and Delta falls late."""
    watch = CollapseWarning()
    head = DDCLReadout(10, embedding_scale="per_dimension")
    model = DDCLReadoutModule(PCABackbone(64, 16, trainable=True), head, Clustering(10), rho=0.5)
    trainer = pl.Trainer(callbacks=[KMeansInitialization(), TemperatureAnnealing(), watch], max_epochs=100, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=DigitsDataModule())
    first = watch.reported[0]
    assert first.startswith("flat in head.attention.bank at step ")
    assert "embedding_scale='whiten'" in first
    assert int(first.split("step ")[1].split(":")[0]) < 400


# Memory ------------------------------------------------------------------------------------------


def test_rare_prototypes_are_not_dead():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.196, 0.004])  # the last one 60 times rarer than even use
    use = PrototypeUse.empty(4)
    reports = 0
    for _ in range(2000):
        draws = torch.multinomial(probabilities, 64, replacement=True, generator=generator)
        use.add(torch.bincount(draws, minlength=4))
        reports += use.dead() == [3]
    assert reports <= 20  # of 2000: before its first token, or after one that came too early


def test_a_prototype_that_was_in_use_is_dead_soon():
    use = PrototypeUse.empty(4)
    for _ in range(100):
        use.add(torch.tensor([16, 16, 16, 16]))
    for reading in range(1, 10):
        use.add(torch.tensor([64, 0, 0, 0]))
        assert use.dead() == ([1, 2, 3] if 64 * reading >= 200 else [])


def test_recent_tokens_are_bounded_and_new_ones_push_out_old():
    history = HeadHistory(PrototypeUse.empty(2))
    for value in range(10):
        history.add_tokens(torch.full((1000, 3), float(value)))
    assert sum(map(len, history.tokens)) == 3000
    assert float(history.tokens[0][0, 0]) == 7.0
    history.add_tokens(torch.arange(10_000.0).unsqueeze(1).expand(-1, 3))
    assert len(history.tokens) == 1 or sum(map(len, history.tokens)) < 2 * ENOUGH_TOKENS
    assert float(history.tokens[-1][-1, 0]) > 9000  # an even part, not the first ones


def test_trend_is_the_slope_of_the_least_squares_line():
    assert trend([]) == trend([1.0]) == 0.0
    assert trend([3.0, 2.5, 2.0]) == pytest.approx(-0.5)
    assert trend([math.log(2)] * 5) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_collapse": "ignore"}, "on_collapse must be"),
        ({"min_separation": -1.0}, "min_separation must be >= 0"),
        ({"max_drop": 0.0}, "max_drop must be in"),
        ({"max_entropy": 1.1}, "max_entropy must be in"),
        ({"min_dimension": 0.0}, "min_dimension must be in"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"every_n_batches": 0}, "every_n_batches must be at least 1"),
    ],
)
def test_collapse_warning_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CollapseWarning(**kwargs)
