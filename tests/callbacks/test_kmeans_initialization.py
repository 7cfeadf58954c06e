import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from ddp_start import main
from sklearn.cluster import KMeans
from tiny import LinearBackbone, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Masked, Project, Stream, TwoLevels, TwoOptimizers, blobs, fit, loader

from ddcl_lightning import (
    DDCLAttention,
    DDCLReadoutModule,
    QuantizerReadout,
    Reconstruction,
    SequenceDecoder,
    SoftVectorQuantizer,
)
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.functional import critical_temperature
from tests.processes import succeed_in_processes


class Start(pl.Callback):
    """The prototypes with which the first step is taken, by bank."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.prototypes = {
                name: value.detach().clone() for name, value in pl_module.named_parameters() if "prototypes" in name
            }


def start(module, data=None, max_epochs=1, annealing=(), **kwargs):
    record = Start()
    fit(module, *annealing, KMeansInitialization(**kwargs), record, data=data, max_epochs=max_epochs)
    return record.prototypes


def centers(tokens, size=4):
    rows = KMeans(size, n_init=10, random_state=0).fit(tokens.double().numpy()).cluster_centers_
    return torch.from_numpy(rows).float()


def same_rows(first, second):
    return torch.allclose(torch.cdist(first, second).min(1).values, torch.zeros(len(first)), atol=1e-4)


def test_prototypes_start_at_the_centroids_of_the_tokens():
    x, _ = blobs()
    assert same_rows(start(Project())["layer.bank.prototypes"][0], centers(x))


def test_the_real_forward_runs_encoder_transform_and_no_dropout():
    class Real(Project):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 3, batch[1]]

    module = Real(dropout=0.5)
    with torch.no_grad():
        module.encoder.weight.mul_(2.0)
    assert same_rows(start(module)["layer.bank.prototypes"][0], centers(2 * (blobs()[0] + 3)))


def test_the_hook_before_the_transfer_runs_too():
    class Early(Project):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 3, batch[1]]

    assert same_rows(start(Early())["layer.bank.prototypes"][0], centers(blobs()[0] + 3))


def test_padding_takes_no_part():
    x, _ = blobs()
    assert same_rows(start(Masked())["layer.bank.prototypes"][0], centers(torch.cat([x, x + 1])))


def test_every_head_is_clustered_in_its_own_space():
    module = Project(num_heads=2)
    with torch.no_grad():
        module.layer.input_projection.weight.copy_(torch.eye(4))
    started = start(module)["layer.bank.prototypes"]
    assert same_rows(started[0], centers(blobs()[0][:, :2]))
    assert same_rows(started[1], centers(blobs()[0][:, 2:]))


def test_several_loaders_give_tokens():
    class Both(Project):
        def training_step(self, batch, batch_idx):
            tokens = torch.cat([self.tokens(batch["a"]), self.tokens(batch["b"]) + 100])
            return self.layer(tokens).terms.loss.sum()

    x, _ = blobs()
    started = start(Both(num_prototypes=8), data={"a": loader(), "b": loader()})["layer.bank.prototypes"][0]
    assert same_rows(started, centers(torch.cat([x, x + 100]), 8))


def test_batch_normalisation_runs_as_in_training_and_is_put_back():
    class Normalized(Project):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.statistics = None

        def on_train_start(self):
            self.statistics = self.norm.running_mean.clone(), int(self.norm.num_batches_tracked)

        def tokens(self, batch):
            return self.norm(super().tokens(batch))

    module = Normalized()
    x, _ = blobs()
    data = DataLoader(TensorDataset(x, x), batch_size=96)  # one batch: its statistics are those of the data
    started = start(module, data=data)["layer.bank.prototypes"][0]
    assert same_rows(started, centers((x - x.mean(0)) / x.std(0, correction=0)))
    assert torch.equal(module.statistics[0], torch.zeros(4))
    assert module.statistics[1] == 0


def test_bounded_embeddings_are_seen_at_their_bounded_scale():
    x, _ = blobs()
    data = DataLoader(TensorDataset(x, x), batch_size=96)
    started = start(Project(embedding_scale="per_dimension"), data=data)["layer.bank.prototypes"][0]
    assert same_rows(started, centers((x - x.mean(0)) / x.std(0, correction=0)))


def test_levels_are_done_in_the_order_of_execution():
    module = TwoLevels()
    started = start(module, annealing=[TemperatureAnnealing(start=0.01, end=0.01)])
    # At a hundredth of T_c the first level's centroids are its prototypes; the second clusters these four points.
    assert same_rows(started["layer.bank.prototypes"][0], centers(blobs()[0]))
    first = started["layer.bank.prototypes"][0]
    expected = centers(first.repeat(24, 1), 2)
    assert same_rows(started["top.bank.prototypes"][0], expected)


def test_the_second_level_sees_the_first_at_its_temperature():
    class Levels(TwoLevels):
        def on_train_start(self):
            self.levels = [layer.bank.prototypes[0].detach().clone() for layer in (self.layer, self.top)]

    module, x = Levels(), blobs()[0]
    annealing = TemperatureAnnealing(start=0.3, end=0.3)
    fit(module, KMeansInitialization(), annealing, max_epochs=1)
    first, second = module.levels
    temperature = 0.3 * float(critical_temperature(x))
    weights = (-torch.cdist(x, first).square() / temperature).softmax(1)
    assert 0.2 < float(weights.max(1).values.mean()) < 0.999
    assert same_rows(second, centers(weights @ first, 2))


def test_banks_that_are_set_are_left_alone_and_the_others_are_not():
    class Levels(TwoLevels):
        def on_train_start(self):
            self.levels = [layer.bank.prototypes[0].detach().clone() for layer in (self.layer, self.top)]

    module, own = Levels(), blobs()[0][:4]
    module.layer.bank.set_prototypes(own.unsqueeze(0))
    fit(module, KMeansInitialization(), max_epochs=1)
    assert torch.equal(module.levels[0], own)
    assert bool(module.top.bank.initialized)


def test_farthest_points_are_tokens_far_apart():
    started = start(Project(num_prototypes=6), method="farthest_point")["layer.bank.prototypes"][0]
    x, _ = blobs()
    assert all(bool((x == row).all(1).any()) for row in started)
    labels = torch.cdist(started, centers(x)).argmin(1)
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_more_prototypes_than_distinct_points_is_an_error_that_names_the_bank():
    x = torch.arange(3.0).repeat(16).unsqueeze(1).expand(48, 4)
    with pytest.raises(ValueError, match=r"bank 'layer.bank' cannot be initialized: .*got 4 prototypes for 3 distinct"):
        start(Project(), data=DataLoader(TensorDataset(x, x), batch_size=16))


def test_tokens_that_are_not_finite_are_an_error():
    x = torch.full((48, 4), torch.nan)
    x[:16] = 1.0  # not in the first batch, where the bank itself would say so
    with pytest.raises(ValueError, match=r"bank 'layer.bank' cannot be initialized: tokens must be finite"):
        start(Project(), data=DataLoader(TensorDataset(x, x), batch_size=16))


def test_a_step_that_calls_no_bank_is_an_error():
    class Blind(Project):
        def training_step(self, batch, batch_idx):
            return self.tokens(batch).square().mean()

    with pytest.raises(ValueError, match="called none of its prototype banks"):
        start(Blind())


def test_a_bank_that_the_step_does_not_call_is_left_with_a_warning():
    class Spare(Project):
        def __init__(self):
            super().__init__()
            self.spare = DDCLAttention(4, 4)

    module = Spare()
    before = module.spare.bank.prototypes.detach().clone()
    with pytest.warns(UserWarning, match=r"did not call spare.bank before its backward pass"):
        started = start(module)
    assert torch.equal(started["spare.bank.prototypes"], before)
    assert not bool(module.spare.bank.initialized)


@pytest.mark.parametrize("size", [96, None])
def test_a_stream_is_read_until_the_sample_is_full(size):
    data = DataLoader(Stream(size), batch_size=16)
    record = Start()
    fit(Project(), KMeansInitialization(max_tokens=96), record, data=data, max_epochs=1, max_steps=2)
    assert same_rows(record.prototypes["layer.bank.prototypes"][0], centers(blobs()[0]))


def test_the_sample_is_bounded(monkeypatch):
    sizes = []
    real = torch.Tensor.numpy

    def spy(tokens, *args, **kwargs):
        sizes.append(len(tokens))
        return torch.from_numpy(KMeans(4, n_init=1, random_state=0).fit(real(tokens.double())).cluster_centers_)

    monkeypatch.setattr("ddcl_lightning.nn.bank.initial_prototypes", spy)
    start(Project(), max_tokens=40)
    assert sizes == [40]


# Leaves no trace ---------------------------------------------------------------------------------


class Traced(Project):
    """Remembers what it was given, and draws random numbers of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("queue", torch.zeros(3))
        self.batches, self.drawn, self.modes, self.queues = [], [], [], []
        self.recording = False

    def on_train_start(self):
        self.recording = True
        self.random_state = torch.get_rng_state()
        self.modes = [child.training for child in self.modules()]
        self.trainable = [parameter.requires_grad for parameter in self.parameters()]
        self.queue_at_start = self.queue.clone()

    def training_step(self, batch, batch_idx):
        self.queue += 1
        drawn = float(torch.rand(()))
        if self.recording:
            self.batches.append(batch[0].clone())
            self.drawn.append(drawn)
        return super().training_step(batch, batch_idx)


class Frozen(pl.Callback):
    """Sets a mode that must survive."""

    def on_train_start(self, trainer, pl_module):
        pl_module.dropout.eval()


def traced_run(callbacks, make_data, module=None):
    pl.seed_everything(3, verbose=False)
    module = module or Traced(dropout=0.1)
    fit(module, Frozen(), *callbacks, data=make_data())
    return module


LOADERS = {
    "shuffled": lambda: loader(),
    "several": lambda: {"a": loader(), "b": loader(48)},
    "own_generator": lambda: loader(generator=torch.Generator().manual_seed(5)),
    "persistent_workers": lambda: loader(num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize(
    "name",
    [
        "shuffled",
        "own_generator",
        pytest.param("persistent_workers", marks=pytest.mark.slow),
    ],
)
def test_the_pass_leaves_no_trace(name):
    plain = traced_run([], LOADERS[name])
    module = traced_run([TemperatureAnnealing(), KMeansInitialization()], LOADERS[name])
    assert torch.equal(plain.random_state, module.random_state)
    assert plain.drawn == module.drawn
    assert all(torch.equal(a, b) for a, b in zip(plain.batches, module.batches, strict=True))
    assert plain.modes == module.modes
    assert not module.modes[[*module.modules()].index(module.dropout)]
    assert torch.equal(module.queue_at_start, torch.zeros(3))
    assert module.log.__func__ is pl.LightningModule.log


def test_a_toggled_optimizer_is_put_back():
    class Toggled(TwoOptimizers):
        def on_train_start(self):
            self.trainable = [parameter.requires_grad for parameter in self.parameters()]

    module = Toggled()
    module.layer.requires_grad_(True)
    module.encoder.bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    fit(module, KMeansInitialization(), max_epochs=1)
    assert module.trainable == before


def test_optimizer_and_scheduler_are_untouched():
    class Scheduled(Project):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def on_train_start(self):
            self.states = self.optimizers().optimizer.state_dict()["state"], self.lr_schedulers().last_epoch
            self.steps = self.trainer.global_step, self.trainer.fit_loop.epoch_loop.total_batch_idx

    module = Scheduled()
    fit(module, KMeansInitialization())
    assert module.states == ({}, 0)
    assert module.steps == (0, -1)


# Once --------------------------------------------------------------------------------------------


def test_it_never_runs_again_on_resume(tmp_path, monkeypatch):
    module = Project()
    trainer = fit(module, KMeansInitialization(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = module.layer.bank.prototypes.detach().clone()

    def fail(*args, **kwargs):
        raise AssertionError("ran again")

    monkeypatch.setattr("ddcl_lightning.nn.bank.initial_prototypes", fail)
    for name in ("collect_tokens", "execution_order"):
        monkeypatch.setattr(f"ddcl_lightning.callbacks.kmeans_initialization.{name}", fail)
    history = []

    class Resumed(Project):
        def on_train_start(self):
            history.append(self.layer.bank.prototypes.detach().clone())

    fit(Resumed(), KMeansInitialization(), ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert torch.equal(history[0], saved)


def test_a_bank_set_by_hand_is_left_alone():
    module = Project()
    own = torch.arange(16.0).reshape(1, 4, 4)
    module.layer.bank.set_prototypes(own)
    assert torch.equal(start(module)["layer.bank.prototypes"], own)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "random"}, "method must be 'kmeans' or 'farthest_point'"),
        ({"num_restarts": 0}, "num_restarts must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_kmeans_initialization_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KMeansInitialization(**kwargs)


@pytest.mark.slow
def test_two_processes_start_from_the_bank_of_one(tmp_path):
    main(str(tmp_path), 1)
    succeed_in_processes(tmp_path, main, str(tmp_path), 2)
    alone, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert set(alone) == {"layer.bank.prototypes", "top.bank.prototypes"}
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        assert torch.equal(first[key], value)
    # They stay equal while they train on different batches.
    ends = [torch.load(tmp_path / f"2-{rank}-end.pt") for rank in (0, 1)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert not torch.equal(ends[0]["layer.bank.prototypes"], first["layer.bank.prototypes"])
    # And they predict every sample once, each in its place.
    table = pd.read_csv(tmp_path / "2.csv")
    assert table["index"].tolist() == list(range(41))
    assert table["label"].tolist() == blobs(size=41)[1].tolist()


def test_a_callback_may_start_codes_that_move_inside() -> None:
    """On many batches, instead of the first."""
    model = DDCLReadoutModule(
        LinearBackbone(6, 6), QuantizerReadout(SoftVectorQuantizer(6, 8)), Reconstruction(SequenceDecoder(6))
    )
    data = DataLoader([{"x": row} for row in torch.randn(64, 5, 6)], batch_size=16)
    quiet_trainer(max_epochs=1, callbacks=[KMeansInitialization(progress=False)]).fit(model, data, data)
    assert bool(model.head.quantizer.bank.initialized)
