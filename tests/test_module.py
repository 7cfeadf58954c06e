"""DDCLReadoutModule: two rates, one backward, one count of steps."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy

from ddcl_lightning import (
    Classification,
    Clustering,
    DDCLAttention,
    DDCLReadout,
    DDCLReadoutModule,
    IdentityBackbone,
    LRSchedule,
    OptimizerConfig,
    PCABackbone,
    SerialPrototypes,
)
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.optim.token_normalized import TokenNormalized
from tests.tiny import Blobs, LinearBackbone, absolute, clustering_module, loader, quiet_trainer


class Spy(pl.Callback):
    """Records what the tests ask about, at the end of each batch."""

    def __init__(self) -> None:
        self.global_steps: list[int] = []
        self.rates: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.global_steps.append(trainer.global_step)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.rates.append({group["name"]: group["lr"] for group in groups})


def module_of_rates(optimizers: list[torch.optim.Optimizer]) -> dict[str, float]:
    return {group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}


def test_encoder_rate_is_derived_from_rho() -> None:
    module = clustering_module(Classification(4), lr_prototypes=0.02, rho=0.25, lr_task=0.005)
    rates = module_of_rates(module.configure_optimizers())
    assert rates == {"prototypes": 0.02, "encoder": 0.005, "task": 0.005}
    rates = module_of_rates(clustering_module(Classification(4), lr_prototypes=0.02, rho=0.5).configure_optimizers())
    assert rates == {"prototypes": 0.02, "encoder": 0.01, "task": 0.02}


class PlacedBackbone(LinearBackbone):
    """An encoder with prototypes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.serial = SerialPrototypes(DDCLAttention(3, 4, residual=True))

    def forward(self, batch: Any) -> Any:
        tokens = super().forward(batch)
        return tokens._replace(values=self.serial(tokens.values, tokens.mask))


@pytest.mark.parametrize("optimizer", ["Adam", "TokenNormalized"])
def test_prototypes_inside_of_the_backbone_step_as_prototypes(optimizer: str) -> None:
    module = DDCLReadoutModule(
        PlacedBackbone(), DDCLReadout(4, temperature=absolute(2.0)), Classification(4), prototype_optimizer=optimizer
    )
    groups = module.parameter_groups()
    placed = module.backbone.serial.layer.bank.prototypes
    assert [id(p) for p in groups["prototypes"]] == [id(placed), id(module.head.attention.bank.prototypes)]
    assert id(placed) not in {id(p) for p in groups["encoder"]}
    assert sum(len(group) for group in groups.values()) == len(list(module.parameters()))
    before = placed.detach().clone()
    quiet_trainer(max_epochs=1).fit(module, loader())
    assert not torch.equal(placed.detach(), before)


def test_every_parameter_is_in_exactly_one_group() -> None:
    head = DDCLReadout(4, num_heads=2, prototype_dim=5, residual=True)
    module = DDCLReadoutModule(LinearBackbone(), head, Classification(4))
    groups = module.parameter_groups()
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in module.parameters())
    projection = head.attention.input_projection
    assert projection is not None
    assert any(parameter is projection.weight for parameter in groups["encoder"])
    assert [tuple(parameter.shape) for parameter in groups["prototypes"]] == [(2, 4, 5)]


def test_rho_zero_freezes_everything_that_moves_a_token() -> None:
    head = DDCLReadout(4, num_heads=2, prototype_dim=5)
    module = DDCLReadoutModule(LinearBackbone(), head, Classification(4), rho=0)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    quiet_trainer(max_epochs=2).fit(module, loader())
    assert not any(parameter.requires_grad for parameter in module.backbone.parameters())  # no backward through it
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"head.attention.bank.prototypes", "task.classifier.weight", "task.classifier.bias"}


def test_one_backward_and_two_optimizers_move_everything() -> None:
    module = clustering_module(Classification(4))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    quiet_trainer(max_epochs=1).fit(module, loader())
    assert len(module.configure_optimizers()) == 2
    assert all(not torch.equal(value, before[name]) for name, value in module.named_parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_counted_once(tmp_path: Path, accumulate: int) -> None:
    """trainer.global_step, max_steps, checkpoints and logger steps all count optimizer steps of the pair."""
    checkpoints = ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    spy = Spy()
    trainer = quiet_trainer(
        max_steps=6, callbacks=[spy, checkpoints], enable_checkpointing=True, logger=logger, log_every_n_steps=1
    )
    trainer.fit(clustering_module(accumulate_grad_batches=accumulate), loader(batch_size=8))
    assert trainer.global_step == 6
    # 8 batches an epoch: with 3 to a step the last window of each epoch has 2.
    expected = list(range(1, 7)) if accumulate == 1 else [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6]
    assert spy.global_steps == expected
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[rows[0].split(",").index("step")]) for row in rows[1:]]
    assert max(steps) == 5


def train_by_gradients(data: Any, max_epochs: int, **kwargs: Any) -> DDCLReadoutModule:
    """A module after plain gradient descent, whose steps tell how gradients were averaged."""
    torch.manual_seed(1)
    settings = {"prototype_optimizer": "SGD", "encoder_optimizer": "SGD", **kwargs}
    module = clustering_module(Classification(4), absolute(2.0), **settings)  # T must not depend on the batches
    quiet_trainer(max_epochs=max_epochs).fit(module, data)
    return module


def test_accumulated_batches_equal_one_large_batch() -> None:
    def train(batch_size: int, accumulate: int) -> DDCLReadoutModule:
        data = loader(batch_size=batch_size, size=80)
        return train_by_gradients(data, 3, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)

    # 80 samples: 5 windows of 16, as one batch each or as two; and windows cut short by the end of the epoch.
    whole, halves = train(16, 1), train(8, 2)
    for first, second in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_a_short_last_window_counts_as_one_batch_of_its_size() -> None:
    rows = list(range(64))
    windows = [rows[:24], rows[24:48], rows[48:]]
    whole = train_by_gradients(torch.utils.data.DataLoader(Blobs(), batch_sampler=windows), 2)
    accumulated = train_by_gradients(loader(batch_size=8), 2, accumulate_grad_batches=3)
    for first, second in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_a_short_last_window_is_averaged_over_its_own_length() -> None:
    module = clustering_module(accumulate_grad_batches=3)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(batch_size=8))  # 8 batches
    assert [module.window_size(index) for index in range(8)] == [3, 3, 3, 3, 3, 3, 2, 2]


def test_clipping_bounds_the_joint_norm() -> None:
    norms = []

    class Norms(pl.Callback):
        def on_before_optimizer_step(
            self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            gradients = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    module = clustering_module(Classification(4), gradient_clip_val=0.01)
    quiet_trainer(max_epochs=1, callbacks=[Norms()], precision="bf16-mixed").fit(module, loader())
    assert len(norms) == 8  # two optimizers, four batches
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_one_schedule_drives_both_rates(schedule: Any) -> None:
    spy = Spy()
    module = clustering_module(
        Classification(4), lr_schedule=LRSchedule(schedule, warmup_steps=3), rho=0.1, lr_prototypes=0.02
    )
    quiet_trainer(max_epochs=3, callbacks=[spy]).fit(module, loader())
    assert len(spy.rates) == 12
    for rates in spy.rates:
        assert rates["encoder"] == pytest.approx(0.1 * rates["prototypes"])
    assert [rates["prototypes"] for rates in spy.rates[:4]] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    last = spy.rates[-1]["prototypes"]
    assert last == pytest.approx(
        {"constant": 0.02, "linear": 0.02 / 9, "cosine": 0.02 * 0.5 * (1 + math.cos(8 / 9 * math.pi))}[schedule]
    )


def test_the_schedule_leaves_a_share_of_the_way_alone() -> None:
    spy = Spy()
    module = clustering_module(
        Classification(4), lr_schedule="cosine", rho=0.1, lr_prototypes=0.02, prototype_optimizer="TokenNormalized"
    )
    quiet_trainer(max_epochs=3, callbacks=[spy]).fit(module, loader())
    assert {rates["prototypes"] for rates in spy.rates} == {0.02}
    assert spy.rates[-1]["encoder"] < 0.1 * spy.rates[0]["encoder"]


class Meddler(pl.Callback):
    """Multiplies the rate of one group in the middle of training."""

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
                if group["name"] == self.name:
                    group["lr"] *= self.factor


def test_the_live_ratio_is_checked_at_every_step() -> None:
    with pytest.raises(RuntimeError, match=r"rho = lr_encoder / lr_prototypes reached 5 at step 2"):
        quiet_trainer(max_epochs=1, callbacks=[Meddler("encoder", 50)]).fit(clustering_module(), loader())
    with pytest.raises(RuntimeError, match=r"reached 2 at step 2"):
        quiet_trainer(max_epochs=1, callbacks=[Meddler("prototypes", 0.05)]).fit(clustering_module(), loader())


def test_a_rescaled_rate_is_kept_while_it_is_safe() -> None:
    spy = Spy()
    module = clustering_module(lr_schedule="linear")
    quiet_trainer(max_epochs=1, callbacks=[Meddler("encoder", 2), spy]).fit(module, loader())
    ratios = [rates["encoder"] / rates["prototypes"] for rates in spy.rates]
    assert ratios == pytest.approx([0.1, 0.1, 0.2, 0.2])


def test_unstable_ratio_needs_permission_and_warns() -> None:
    with pytest.raises(ValueError, match="allow_unstable=True"):
        clustering_module(rho=1.0)
    with pytest.warns(UserWarning, match="prototypes lag behind the encoder"):
        module = clustering_module(rho=2.0, allow_unstable=True)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader())
    assert float(trainer.callback_metrics["rho"]) == pytest.approx(2.0)


def test_prototypes_get_no_weight_decay_unless_asked() -> None:
    def decays(**kwargs: Any) -> list[float]:
        prototype_optimizer = OptimizerConfig("AdamW", kwargs)
        module = clustering_module(prototype_optimizer=prototype_optimizer, encoder_optimizer="AdamW")
        return [g["weight_decay"] for optimizer in module.configure_optimizers() for g in optimizer.param_groups]

    assert decays() == [0.0, 0.01]
    assert decays(weight_decay=0.3) == [0.3, 0.01]


def test_token_normalized_prototypes_train_inside_the_module() -> None:
    data = Blobs(size=64)
    module = DDCLReadoutModule(
        IdentityBackbone(4),
        DDCLReadout(4, temperature=absolute(0.5)),
        Clustering(4),
        lr_prototypes=0.5,
        prototype_optimizer="TokenNormalized",
        gradient_clip_val=1.0,
    )
    assert isinstance(module.configure_optimizers()[0], TokenNormalized)
    trainer = quiet_trainer(max_epochs=20, callbacks=[KMeansInitialization(method="farthest_point", progress=False)])
    trainer.fit(module, loader(), loader())
    assert float(trainer.callback_metrics["val/acc"]) == 1.0
    centers = torch.stack([data.x[data.y == label].mean(0) for label in range(4)])
    distances = torch.cdist(centers, module.head.attention.bank.prototypes.detach()[0])  # type: ignore[union-attr]
    assert float(distances.min(1).values.max()) < 0.3


def test_unsupervised_trainable_encoders_are_bounded_and_others_are_not() -> None:
    def mode(module: DDCLReadoutModule) -> str:
        assert isinstance(module.head, DDCLReadout)
        return module.head.attention.scale.mode

    assert mode(clustering_module()) == "whiten"
    assert mode(clustering_module(rho=0)) == "none"
    assert mode(clustering_module(Classification(4))) == "none"
    assert mode(DDCLReadoutModule(PCABackbone(4, 2), DDCLReadout(4), Clustering())) == "none"
    assert mode(DDCLReadoutModule(PCABackbone(4, 2, trainable=True), DDCLReadout(4), Clustering())) == "whiten"
    explicit = DDCLReadout(4, embedding_scale="none")
    assert mode(DDCLReadoutModule(LinearBackbone(), explicit, Clustering())) == "none"


def test_bounded_scale_keeps_the_embeddings_from_shrinking() -> None:
    """The reason for the option: the same run with and without it."""

    def spread(scale: Any) -> float:
        torch.manual_seed(0)
        head = DDCLReadout(4, temperature=absolute(0.5), embedding_scale=scale)
        module = DDCLReadoutModule(LinearBackbone(), head, Clustering(4), lr_prototypes=0.05, rho=0.5)
        quiet_trainer(max_epochs=30).fit(module, loader())
        module.eval()
        with torch.no_grad():
            tokens, mask = module.backbone({"x": Blobs().x})
            return float(head.attention.scale(tokens, mask).std())

    assert spread("none") < 0.5
    assert 0.8 < spread("auto") < 1.2


def test_non_finite_loss_stops_the_run_with_the_figures() -> None:
    class Poisoned(Blobs):
        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            item = super().__getitem__(row)
            return {**item, "x": item["x"] * (math.nan if row == 40 else 1.0)}

    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(4), Clustering(4))
    with pytest.raises(ValueError, match="tokens must be finite"):
        quiet_trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(Poisoned(), batch_size=16))

    class Diverging(Clustering):
        def losses(self, readout: Any, batch: Any) -> Any:
            return {"loss": super().losses(readout, batch)["loss"] * math.inf}

    with pytest.raises(FloatingPointError, match=r"not finite at step 0: \{'loss': inf\}"):
        quiet_trainer(max_epochs=1).fit(clustering_module(Diverging(4)), loader())


def test_the_module_refuses_precisions_and_settings_that_cannot_work() -> None:
    module = clustering_module()
    module.trainer = _Fake("16-mixed", None)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="precision='bf16-mixed'"):
        module.setup("fit")
    module.trainer = _Fake("32-true", FSDPStrategy())  # type: ignore[assignment]
    with pytest.raises(ValueError, match="strategy='ddp'"):
        module.setup("fit")


class _Fake:
    """A trainer as far as setup looks at it: half precision and FSDP cannot start without a GPU."""

    def __init__(self, precision: str, strategy: Any) -> None:
        self.precision, self.strategy, self.barebones = precision, strategy, False


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_the_module_trains_in_every_precision(precision: Any) -> None:
    module = clustering_module(Classification(4), absolute(2.0))
    trainer = quiet_trainer(max_epochs=30, precision=precision, check_val_every_n_epoch=30)
    trainer.fit(module, loader(), loader())
    assert float(trainer.callback_metrics["val/acc"]) > 0.9


def test_pca_is_fitted_on_training_data_before_the_sanity_check() -> None:
    data = DigitsDataModule(batch_size=600)
    backbone = PCABackbone(64, 8)
    module = DDCLReadoutModule(backbone, DDCLReadout(10), Clustering(10))
    quiet_trainer(max_epochs=1, callbacks=[KMeansInitialization(num_restarts=1, progress=False)]).fit(
        module, datamodule=data
    )
    assert bool(backbone.fitted)
    assert 0.6 < float(backbone.explained_variance_ratio) < 0.8


def test_predictions_carry_index_and_assignments() -> None:
    module = clustering_module()
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader())
    batches = trainer.predict(module, loader())
    assert batches is not None
    first: Any = batches[0]
    assert first["assignments"].shape == (16, 1, 4)
    torch.testing.assert_close(first["assignments"].sum(-1), torch.ones(16, 1))
    assert first["index"].tolist() == list(range(16))


class Digits(DigitsDataModule):
    """The digits, 113 rows a batch: 16 batches an epoch, the last one short."""

    def __init__(self) -> None:
        super().__init__(batch_size=113, seed=3)


def resumable_run(folder: Path, resume: Path | None, **module_kwargs: Any) -> tuple[DDCLReadoutModule, pl.Trainer]:
    torch.manual_seed(5)
    backbone = PCABackbone(64, 8, trainable=True)
    module = DDCLReadoutModule(backbone, DDCLReadout(10), Clustering(10), **module_kwargs)
    checkpoint = ModelCheckpoint(dirpath=folder, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    callbacks = [
        TemperatureAnnealing(interval="step"),
        KMeansInitialization(num_restarts=1, progress=False),
        checkpoint,
    ]
    trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, datamodule=Digits(), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr_schedule": "cosine"},
        {"prototype_optimizer": "TokenNormalized", "lr_prototypes": 0.1, "accumulate_grad_batches": 2},
    ],
    ids=["adam", "token_normalized"],
)
def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """Weights, temperature, optimizer state and metrics are those of the uninterrupted run, bit for bit."""
    whole, whole_trainer = resumable_run(tmp_path / "whole", None, **kwargs)
    middle = tmp_path / "whole" / "step=21.ckpt"  # 16 (or 8) steps an epoch
    resumed, resumed_trainer = resumable_run(tmp_path / "resumed", middle, **kwargs)
    assert resumed_trainer.global_step == whole_trainer.global_step
    for (name, first), second in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    for whole_optimizer, other in zip(whole_trainer.optimizers, resumed_trainer.optimizers, strict=True):
        torch.testing.assert_close(whole_optimizer.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)
        assert whole_optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    metrics = whole_trainer.callback_metrics
    assert {name for name in metrics if name.startswith("val/")} >= {"val/acc", "val/loss"}
    for name, value in metrics.items():
        assert torch.equal(value, resumed_trainer.callback_metrics[name]), name


def test_load_from_checkpoint_with_modules(tmp_path: Path) -> None:
    """Outside of the CLI hyperparameters are plain numbers, so a safe (weights_only) load works."""
    module = clustering_module(lr_prototypes=0.03)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DDCLReadoutModule.load_from_checkpoint(
        tmp_path / "last.ckpt",
        weights_only=True,
        backbone=LinearBackbone(),
        head=DDCLReadout(4),
        task=Clustering(4),
    )
    assert loaded.lr_prototypes == 0.03
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())


def test_backward_runs_outside_of_autocast() -> None:
    calls = []

    class Watch(Clustering):
        def losses(self, readout: Any, batch: Any) -> Any:
            losses = super().losses(readout, batch)
            calls.append(("forward", torch.is_autocast_enabled("cpu")))
            readout.tokens.register_hook(lambda _: calls.append(("backward", torch.is_autocast_enabled("cpu"))))
            return {**losses, "loss": losses["loss"] + readout.tokens.sum()}

    quiet_trainer(max_epochs=1, precision="bf16-mixed", limit_train_batches=1).fit(
        clustering_module(Watch(4)), loader()
    )
    assert calls == [("forward", True), ("backward", False)]


def test_metrics_without_labels_are_not_logged() -> None:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(clustering_module(Clustering()), loader(), loader())
    assert {"val/usage", "val/perplexity"} <= set(trainer.callback_metrics)
    assert "val/acc" not in trainer.callback_metrics


def test_classes_that_the_task_does_not_know_are_named_at_the_start() -> None:
    module = DDCLReadoutModule(PCABackbone(64, 4), DDCLReadout(4), Classification(3))
    with pytest.raises(ValueError, match=r"num_classes of the task must be at least that of the data, 10: .* got 3"):
        quiet_trainer(max_epochs=1).fit(module, datamodule=DigitsDataModule())
