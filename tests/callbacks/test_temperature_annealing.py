import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import QUIET, Project, Stream, TwoLevels, TwoOptimizers, blobs, fit, loader

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, PCABackbone, Temperature
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules.digits import DigitsDataModule
from tests.tiny import absolute

INITIAL = Temperature(0.1, unit="initial")  # of the tokens at the start, so that the numbers are exact ones


class Recorder(pl.Callback):
    """Temperature in force during every batch; stands last, so that it sees what the others set."""

    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append(pl_module.layer.bank.temperature.clone())

    def numbers(self):
        return [float(value[0]) for value in self.values]


def temperatures(module=None, data=None, max_epochs=5, trainer=None, **kwargs):
    recorder = Recorder()
    start = kwargs.get("start")
    own = {"temperature": start} if isinstance(start, Temperature) and isinstance(start.value, float) else {}
    fit(
        module or Project(**own),
        TemperatureAnnealing(**kwargs),
        recorder,
        data=data,
        max_epochs=max_epochs,
        **(trainer or {}),
    )
    return recorder.numbers()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 8, then 8 exp(-e / tau) with tau = 0.8 * 5 / ln 8, which reaches the floor of 1 at e = 4
        ("exponential", [8.0, 8 * 8**-0.25, 8 * 8**-0.5, 8 * 8**-0.75, 1.0]),
        ("linear", [8.0, 6.25, 4.5, 2.75, 1.0]),
        ("cosine", [8.0, 1 + 3.5 * (1 + math.sqrt(0.5)), 4.5, 1 + 3.5 * (1 - math.sqrt(0.5)), 1.0]),
        (lambda epoch: 5.0 - epoch, [5.0, 4.0, 3.0, 2.0, 1.0]),  # in the unit of start
    ],
)
def test_schedules_by_epoch(schedule, expected):
    values = temperatures(start=absolute(8.0), end=absolute(1.0), schedule=schedule)
    assert values == pytest.approx(np.repeat(expected, 6).tolist(), rel=1e-6)


def test_the_papers_exponential_with_tau_and_floor():
    values = temperatures(start=absolute(8.0), end=absolute(2.0), tau=2.0)
    assert values[::6] == pytest.approx([max(2.0, 8 * math.exp(-epoch / 2)) for epoch in range(5)], rel=1e-6)


def test_duration_ends_the_schedule_early():
    for schedule in ("exponential", "linear"):
        values = temperatures(start=absolute(8.0), end=absolute(1.0), schedule=schedule, duration=2)[::6]
        assert values[0] == 8.0
        assert values[2:] == pytest.approx([1.0] * 3)


def test_by_step_it_falls_with_every_batch_and_ends_with_the_run():
    values = temperatures(start=absolute(8.0), end=absolute(1.0), schedule="linear", interval="step", max_epochs=2)
    assert values == pytest.approx(np.linspace(8, 1, 12).tolist())


def test_steps_of_two_manual_optimizers_count_once():
    values = temperatures(
        TwoOptimizers(temperature=absolute()),
        start=absolute(8.0),
        end=absolute(1.0),
        schedule="linear",
        interval="step",
        max_epochs=2,
    )
    assert values == pytest.approx(np.linspace(8, 1, 12).tolist())


def test_accumulated_batches_share_a_step_and_do_not_shorten_the_epochs():
    kwargs = {"start": absolute(8.0), "end": absolute(1.0), "schedule": "linear", "max_epochs": 4}
    by_step = temperatures(interval="step", trainer={"accumulate_grad_batches": 3}, **kwargs)
    assert by_step == pytest.approx(np.repeat(np.linspace(8, 1, 8), 3).tolist())
    by_epoch = temperatures(trainer={"accumulate_grad_batches": 3}, **kwargs)
    assert by_epoch == pytest.approx(np.repeat(np.linspace(8, 1, 4), 6).tolist())


def test_max_steps_bounds_the_length():
    kwargs = {"start": absolute(8.0), "end": absolute(1.0), "schedule": "linear", "max_epochs": 100}
    assert temperatures(interval="step", trainer={"max_steps": 8}, **kwargs)[-1] == pytest.approx(1.0)
    assert temperatures(trainer={"max_steps": 18}, **kwargs)[::6] == pytest.approx([8.0, 4.5, 1.0])


def test_streams_without_length():
    data = DataLoader(Stream(96), batch_size=16)
    values = temperatures(data=data, start=absolute(8.0), end=absolute(1.0), schedule="linear", max_epochs=3)
    assert sorted(set(values), reverse=True) == pytest.approx([8.0, 4.5, 1.0])
    with pytest.raises(ValueError, match="length of the run is unknown"):
        temperatures(data=data, interval="step", max_epochs=3)
    assert temperatures(data=data, interval="step", duration=4, start=absolute(8.0), end=absolute(1.0))[4] == 1.0


def test_fractions_of_the_critical_temperature():
    x, _ = blobs()
    critical = 4 * np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[-1]
    assert temperatures(start=0.1, end=0.1)[0] == pytest.approx(0.1 * critical, rel=1e-5)
    detached = temperatures(Project(detach_assignments=True), start=0.1, end=0.1)[0]
    assert detached == pytest.approx(0.05 * critical, rel=1e-5)

    class InOtherUnits(Project):
        def tokens(self, batch):
            return 10 * super().tokens(batch)

    assert temperatures(InOtherUnits(), start=0.1, end=0.1)[0] == pytest.approx(10 * critical, rel=1e-5)


def test_every_head_has_its_own_critical_temperature():
    module = Project(num_heads=2, temperature=INITIAL)
    with torch.no_grad():
        module.layer.input_projection.weight.copy_(torch.eye(4))
    fit(module, TemperatureAnnealing(start=0.5, end=0.5), max_epochs=1)
    covariances = [np.cov(blobs()[0].numpy()[:, columns].T, bias=True) for columns in (slice(0, 2), slice(2, 4))]
    expected = [2 * np.linalg.eigvalsh(covariance)[-1] for covariance in covariances]
    assert module.layer.bank.temperature.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_the_callbacks_does_not_matter(first):
    module, callbacks = TwoLevels(top=INITIAL, temperature=INITIAL), [TemperatureAnnealing(), KMeansInitialization()]
    fit(module, *(callbacks if first else callbacks[::-1]), max_epochs=1)
    first_level, second = module.layer.bank.temperature, module.top.bank.temperature
    assert float(first_level) > float(second) > 0
    other = TwoLevels(top=INITIAL, temperature=INITIAL)
    fit(other, KMeansInitialization(), TemperatureAnnealing(), max_epochs=1)
    assert torch.equal(other.layer.bank.temperature, first_level)
    assert torch.equal(other.top.bank.temperature, second)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": 1.0, "end": 2.0}, "must not increase"),
        ({"start": 0.0}, r"start of the schedule: a temperature must be > 0, one number or one per head; got 0.0"),
        ({"start": math.inf}, "start must be a "),
        ({"end": math.nan}, "end must be a "),
        ({"start": absolute(2.0)}, "start and end must be temperatures of one unit; got .*absolute.* and 0.005"),
        ({"start": absolute(2.0), "end": Temperature(1.0, unit="initial")}, "temperatures of one unit"),
        ({"interval": "year"}, "interval must be"),
        ({"schedule": "step"}, "schedule must be"),
        ({"tau": 0.0}, "tau must be > 0"),
        ({"tau": 1.0, "schedule": "linear"}, "belongs to schedule='exponential'"),
        ({"duration": 0}, "duration must be > 0"),
    ],
)
def test_annealing_refuses_schedules_that_rise_or_mix_units(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TemperatureAnnealing(**kwargs)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [(lambda e: 1.0 + e, "goes from 1 to 2 at epoch 1"), (lambda e: 1.0 - e, "finite temperatures > 0; got 0.0")],
)
def test_a_callable_that_increases_or_vanishes_is_refused_before_the_first_step(schedule, message):
    module = Project()
    with pytest.raises(ValueError, match=message):
        fit(module, TemperatureAnnealing(schedule=schedule))
    assert module.losses == []


def test_a_callable_that_increases_later_is_caught_on_the_way():
    changing = iter([4.0, 3.0, 4.0, 3.0, 3.5])  # tried twice, set at the start and in both epochs
    with pytest.raises(ValueError, match=r"schedule went from 3 to 3\.5"):
        temperatures(schedule=lambda step: next(changing), interval="epoch", max_epochs=2)


def test_tokens_without_variance_are_an_error():
    class Constant(Project):
        def tokens(self, batch):
            return 0 * super().tokens(batch)

    with pytest.raises(ValueError, match=r"tokens that reach bank 'layer.bank' have no variance"):
        fit(Constant(), TemperatureAnnealing())


def test_tokens_that_are_not_finite_are_named_before_the_first_step():
    x, y = blobs(96, 4)
    x[50] = math.nan
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    with pytest.raises(ValueError, match="tokens must be finite; got NaN or infinity"):
        fit(Project(), TemperatureAnnealing(), data=data)


def test_another_run_is_measured_anew():
    annealing = TemperatureAnnealing(start=0.1, end=0.01)
    fit(Project(), annealing, max_epochs=2)
    first = annealing.state_dict()
    assert first["length"] == 2
    fit(Project(), annealing, data=loader(size=48), max_epochs=3)  # starts at the top again without an error
    second = annealing.state_dict()
    assert second["length"] == 3


def digits_run(path, annealing, max_epochs=4, ckpt_path=None):
    """Trains on the digits and returns the temperatures by step; a checkpoint after step 13, inside of epoch 1."""
    pl.seed_everything(1, verbose=False)
    module = DDCLReadoutModule(
        PCABackbone(64, 8, trainable=True), DDCLReadout(6, num_heads=2), Clustering(), lr_prototypes=0.02, rho=0.1
    )
    temperatures = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            bank = pl_module.head.attention.bank
            temperatures[trainer.global_step] = torch.stack([bank.temperature, bank.temperature_state.value])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 13 and ckpt_path is None:
                trainer.save_checkpoint(path)

    trainer = pl.Trainer(
        callbacks=[annealing, KMeansInitialization(), Watch()],
        max_epochs=max_epochs,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=256), ckpt_path=ckpt_path)
    return temperatures, module


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_run_resumed_inside_of_an_epoch_has_the_same_temperatures_bit_for_bit(interval, tmp_path):
    checkpoint = tmp_path / "step=13.ckpt"  # 8 batches an epoch: after the fifth of epoch 1
    whole, module = digits_run(checkpoint, TemperatureAnnealing(interval=interval))
    rest, resumed = digits_run(checkpoint, TemperatureAnnealing(interval=interval), ckpt_path=checkpoint)
    assert sorted(rest) == list(range(13, 32))
    assert all(torch.equal(rest[step], whole[step]) for step in rest)
    assert torch.equal(resumed.head.attention.bank.prototypes, module.head.attention.bank.prototypes)
    # A longer run must not stretch the schedule of the one that it continues.
    longer, _continued = digits_run(
        checkpoint, TemperatureAnnealing(interval=interval), max_epochs=6, ckpt_path=checkpoint
    )
    assert sorted(longer) == list(range(13, 48))
    assert all(torch.equal(longer[step], whole[step]) for step in rest)
    assert all(torch.all(longer[step][1] <= whole[31][1]) for step in range(32, 48))


def test_the_temperature_is_logged():
    trainer = fit(Project(temperature=absolute()), TemperatureAnnealing(start=absolute(3.0), end=absolute(3.0)))
    assert float(trainer.callback_metrics["ddcl/temperature/layer.bank"]) == 3.0


# Several schedules -------------------------------------------------------------------------------


class Levels(pl.Callback):
    """Temperatures of both banks of TwoLevels in force during every batch."""

    def __init__(self):
        self.history: dict[str, list[list[float]]] = {"layer": [], "top": []}
        self.fractions: dict[str, list[float]] = {"layer": [], "top": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for name, values in self.history.items():
            bank = getattr(pl_module, name).bank
            values.append(bank.temperature.tolist())
            self.fractions[name].append(float(bank.temperature_state.value[0]))


def both_levels(*callbacks, module=None, max_epochs=4, **kwargs):
    levels = Levels()
    fit(module or TwoLevels(), *callbacks, levels, max_epochs=max_epochs, **kwargs)
    return {name: values[::6] for name, values in levels.history.items()}


def test_two_callbacks_give_two_schedules():
    first = TemperatureAnnealing(start=absolute(8.0), end=absolute(2.0), schedule="linear", banks="layer.*")
    second = TemperatureAnnealing(start=absolute(0.5), end=absolute(0.25), schedule="linear", duration=2, banks="t?p.*")
    temperatures = both_levels(first, second, module=TwoLevels(top=absolute(), temperature=absolute()))
    assert np.ravel(temperatures["layer"]) == pytest.approx([8.0, 6.0, 4.0, 2.0])
    assert np.ravel(temperatures["top"]) == pytest.approx([0.5, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("kmeans", [False, True])
def test_banks_that_no_pattern_matches_keep_their_temperature(kmeans):
    annealing = TemperatureAnnealing(start=0.1, end=0.1, banks="layer.*")  # the other one's is absolute
    temperatures = both_levels(annealing, *[KMeansInitialization()] * kmeans, module=TwoLevels(top=absolute()))
    assert np.ravel(temperatures["top"]).tolist() == [1.0] * 4


def test_a_list_gives_every_head_its_own_temperature():
    annealing = TemperatureAnnealing(
        start=absolute([8.0, 1.0]), end=absolute([2.0, 1.0]), schedule="linear", banks="layer.*"
    )
    temperatures = both_levels(
        annealing, module=TwoLevels(num_heads=2, output_projection=False, temperature=absolute())
    )
    assert np.asarray(temperatures["layer"]).T.tolist() == [pytest.approx([8.0, 6.0, 4.0, 2.0]), [1.0] * 4]
    assert annealing.value(0) == [8.0, 1.0]
    assert TemperatureAnnealing(tau=1.0).value(0) == 0.1


def test_the_ends_of_heads_may_differ_one_by_one_in_fractions_too():
    one_start = temperatures(
        Project(num_heads=2, temperature=absolute()), start=absolute(8.0), end=absolute([4.0, 1.0]), max_epochs=5
    )
    assert one_start[::6] == pytest.approx([8.0, 8 * 2**-0.25, 8 * 2**-0.5, 8 * 2**-0.75, 4.0])  # its own tau
    module = Project(num_heads=2, temperature=INITIAL)
    even = Project(num_heads=2, temperature=INITIAL)
    fit(even, TemperatureAnnealing(start=1.0, end=1.0), max_epochs=1)
    fit(module, TemperatureAnnealing(start=[0.5, 0.1], end=[0.5, 0.1]), max_epochs=1)
    expected = torch.tensor([0.5, 0.1]) * even.layer.bank.temperature
    torch.testing.assert_close(module.layer.bank.temperature, expected)
    followed = Project(num_heads=2)
    fit(followed, TemperatureAnnealing(start=[0.5, 0.1], end=[0.4, 0.1]), max_epochs=5)
    assert followed.layer.bank.temperature_state.value.tolist() == pytest.approx([0.4, 0.1])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([{"banks": "*levels.0.*"}], r"banks must match the name of a bank; got '\*levels.0.\*' where there are top"),
        ([{}, {"banks": "top.*"}], r"bank 'top.bank' is matched by '\*' and by 'top.\*'. Narrow one of them"),
        ([{"start": [0.1, 0.1]}], "one per head, 1 for bank 'top.bank'"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_before_the_first_step(callbacks, message):
    module = TwoLevels()
    with pytest.raises(ValueError, match=message):
        both_levels(*(TemperatureAnnealing(**kwargs) for kwargs in callbacks), module=module)
    assert module.losses == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": [0.1, 0.2], "end": [0.1, 0.1, 0.1]}, "numbers or lists of the same length"),
        (
            {"start": [], "end": 0.1},
            "start of the schedule: a temperature must be > 0, one number or one per head; got ..\\.",
        ),
        ({"start": [0.2, 0.1], "end": 0.15}, r"must not increase .* start = 0.1 and end = 0.15"),
        (
            {"start": [0.2, -0.1], "end": 0.1},
            "start of the schedule: a temperature must be > 0, one number or one per head; got .0.2, -0.1.",
        ),
    ],
)
def test_annealing_refuses_lists_that_do_not_fit_the_heads(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TemperatureAnnealing(**kwargs)


def test_several_callbacks_keep_their_states_apart_in_a_checkpoint(tmp_path):
    def annealings():
        return [
            TemperatureAnnealing(start=0.8, end=0.1, interval="step", duration=30, banks="layer.*"),
            TemperatureAnnealing(start=0.2, end=0.1, interval="step", duration=20, banks="top.*"),
        ]

    whole = annealings()
    fit(TwoLevels(), *whole, max_epochs=4)
    at_half = TwoLevels()
    half = fit(at_half, *annealings(), max_epochs=2, enable_checkpointing=False)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, levels = annealings(), Levels()
    fit(TwoLevels(), *resumed, levels, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert [callback.state_dict()["steps"] for callback in resumed] == [24, 24]
    for name, callback in zip(("layer", "top"), whole, strict=True):
        critical = 4 * float(getattr(at_half, name).bank.temperature_state.covariance.lambda_max)
        assert levels.history[name][0][0] == pytest.approx(critical * callback.value(12), rel=1e-6)
