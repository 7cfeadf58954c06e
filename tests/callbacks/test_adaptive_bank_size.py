"""A bank that starts with two prototypes finds its clusters; resumed, loaded and in two processes too."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from toys import Project, TwoLevels, TwoOptimizers, blobs, fit, loader

from ddcl_lightning import (
    Clustering,
    ClusteringMetrics,
    CollapseRules,
    DDCLReadout,
    DDCLReadoutModule,
    Head,
    PCABackbone,
    SequenceDecoder,
    SizeRules,
    find_banks,
)
from ddcl_lightning.callbacks import (
    AdaptiveBankSize,
    AssignmentWriter,
    CollapseWarning,
    DecompositionCheck,
    KMeansInitialization,
    PrototypeFigures,
    TemperatureAnnealing,
)
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.decoders import MLPDecoder
from ddcl_lightning.heads import ResidualVQ, SoftVQ
from ddcl_lightning.tasks import Classification, Reconstruction, SemanticIDs
from tests.processes import succeed_in_processes
from tests.tiny import absolute, quiet_trainer
from tests.tiny import loader as tiny_loader

SIX = {"size": 240, "clusters": 6}


def six(**kwargs: Any) -> Any:
    """Six clusters far apart."""
    x, y = blobs(**SIX)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), **{"batch_size": 40, **kwargs})


def grown(module: pl.LightningModule, max_epochs: int = 12, data: Any = None, **kwargs: Any) -> AdaptiveBankSize:
    adaptive = AdaptiveBankSize(**kwargs)
    callbacks = [TemperatureAnnealing(), KMeansInitialization(progress=False), adaptive]
    fit(module, *callbacks, data=six() if data is None else data, max_epochs=max_epochs)
    return adaptive


@pytest.mark.parametrize("kind", [Project, TwoOptimizers])
@pytest.mark.parametrize("when", [{}, {"interval": "step", "frequency": 4}], ids=["epochs", "steps"])
def test_two_prototypes_become_six(kind: Any, when: dict[str, Any]) -> None:
    module = kind(num_prototypes=2)
    adaptive = grown(module, **when)
    sizes = [size for _, size in adaptive.history["layer.bank"]]
    assert (sizes[0], sizes[-1]) == (2, 6)
    assert sizes == sorted(sizes)
    x, y = blobs(**SIX)
    codes = module.layer.bank.encode(module.encoder(x))[:, 0]
    assert len({(int(a), int(b)) for a, b in zip(codes, y, strict=True)}) == 6


def test_without_the_test_the_last_temperature_sets_the_size() -> None:
    """Clusters of deviation 0.3 have T_c = 4 * 0.09 = 0.36 of their own, give or take: above it they stay whole."""
    sizes = {}
    for temperature in (1.0, 0.1):
        module = Project(num_prototypes=2, temperature=absolute(temperature))
        adaptive = AdaptiveBankSize(SizeRules(max_prototypes=20, significance=None))
        fit(module, KMeansInitialization(progress=False), adaptive, data=six(), max_epochs=12)
        sizes[temperature] = module.layer.bank.num_prototypes
    assert sizes[1.0] == 6
    assert sizes[0.1] == 20


def test_the_size_stays_in_its_bounds_and_after_its_time() -> None:
    module = Project(num_prototypes=2)
    grown(module, rules=SizeRules(max_prototypes=4))
    assert module.layer.bank.num_prototypes == 4
    module = Project(num_prototypes=2)
    assert [size for _, size in grown(module, duration=1).history["layer.bank"]][2:] == []
    module = Project(num_prototypes=2)
    assert len(grown(module, frequency=13).history["layer.bank"]) == 1


def test_superfluous_prototypes_merge_and_idle_ones_go() -> None:
    module = Project(num_prototypes=9, lr=0.0, temperature=absolute(0.1))
    centers = torch.stack([blobs(**SIX)[0][blobs(**SIX)[1] == label].mean(0) for label in range(6)])
    extra = torch.stack([centers[0] + 1e-3, torch.full((4,), 99.0), torch.full((4,), -99.0)])
    module.layer.bank.set_prototypes(torch.cat([centers, extra]).unsqueeze(0))
    adaptive = AdaptiveBankSize()
    fit(module, adaptive, data=six(), max_epochs=5)
    assert [size for _, size in adaptive.history["layer.bank"]] == [9, 8, 6]


def test_idle_checks_are_counted_on_after_a_restart(tmp_path: Path) -> None:
    """Idle at the only check of the first run, so pruned at the first one of the second."""
    sizes = []
    for resumed in (False, True):
        module = Project(num_prototypes=7, lr=0.0, temperature=absolute(0.1))
        centers = torch.stack([blobs(**SIX)[0][blobs(**SIX)[1] == label].mean(0) for label in range(6)])
        module.layer.bank.set_prototypes(torch.cat([centers, torch.full((1, 4), 99.0)]).unsqueeze(0))
        callbacks = [AdaptiveBankSize(duration=9), ModelCheckpoint(tmp_path / str(resumed), "last")]
        path = tmp_path / "False" / "last.ckpt" if resumed else None
        kwargs: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(module, *callbacks, data=six(), max_epochs=1 + resumed, ckpt_path=path, **kwargs)
        sizes.append(module.layer.bank.num_prototypes)
    assert sizes == [7, 6]


def test_every_bank_has_its_own_size_and_a_pattern_chooses() -> None:
    module = TwoLevels(num_prototypes=2)
    adaptive = grown(module, banks="layer*")
    assert set(adaptive.history) == {"layer.bank"}
    assert module.layer.bank.num_prototypes == 6
    assert module.top.bank.num_prototypes == 2
    both = TwoLevels(num_prototypes=2)
    assert set(grown(both).history) == {"layer.bank", "top.bank"}
    assert both.top.bank.num_prototypes > 2


def test_the_size_is_logged_and_a_line_says_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    module = Project(num_prototypes=2)
    with caplog.at_level("INFO"):
        adaptive = AdaptiveBankSize()
        trainer = fit(module, TemperatureAnnealing(), KMeansInitialization(progress=False), adaptive, data=six())
    size = adaptive.history["layer.bank"][-1][1]
    assert float(trainer.callback_metrics["ddcl/num_prototypes/layer.bank"]) == size > 2
    lines = [line for line in caplog.messages if line.startswith("AdaptiveBankSize: layer.bank from 2 to ")]
    assert len(lines) == 1
    assert "split 0 (its T_c " in lines[0] or "split 1 (its T_c " in lines[0]


def readout(num_prototypes: int = 2, **kwargs: Any) -> DDCLReadoutModule:
    torch.manual_seed(0)
    head = DDCLReadout(num_prototypes, embedding_scale="none")
    return DDCLReadoutModule(PCABackbone(64, 8, trainable=True), head, Clustering(10), rho=0.01, **kwargs)


def digits() -> DigitsDataModule:
    return DigitsDataModule(limit=400, batch_size=100, seed=0)


def watchers() -> list[pl.Callback]:
    return [
        TemperatureAnnealing(start=0.05),
        KMeansInitialization(progress=False),
        DecompositionCheck(every_n_batches=3),
        CollapseWarning(every_n_batches=3),  # its probe takes longer than a step
        AdaptiveBankSize(seed=0),
    ]


def figures() -> PrototypeFigures:
    """Of which drawing takes longer than all else of such a run."""
    return PrototypeFigures(every_n_epochs=2, every_n_batches=1)


def run(module: DDCLReadoutModule, epochs: int, *more: Any, ckpt_path: Any = None, **kwargs: Any) -> pl.Trainer:
    callbacks = [*watchers(), *more]
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in more)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=checkpointing, **kwargs)
    trainer.fit(module, datamodule=digits(), ckpt_path=ckpt_path)
    return trainer


def adaptive_of(trainer: pl.Trainer) -> AdaptiveBankSize:
    return next(callback for callback in trainer.callbacks if isinstance(callback, AdaptiveBankSize))


@pytest.mark.parametrize("optimizer", ["Adam", "TokenNormalized"])
@pytest.mark.parametrize(("at_validation", "drawn"), [(False, False), (True, False), (False, True)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, optimizer: str, at_validation: bool, drawn: bool
) -> None:
    """Checkpoints of a bank in growth: its size, its optimizer's rows, the idle counts and the end of the changes."""
    kwargs = {"prototype_optimizer": optimizer, "lr_prototypes": 0.1}

    def more(folder: str) -> list[pl.Callback]:
        at_end = not at_validation
        saving = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_end)
        return [saving, figures()] if drawn else [saving]

    whole = run(readout(**kwargs), 6, *more("whole"), default_root_dir=tmp_path)
    sizes = [size for _, size in adaptive_of(whole).history["head.attention.bank"]]
    assert len(sizes) > 2
    for epoch in (2,) if drawn else (0, 1, 2):
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed = run(readout(**kwargs), 6, *more(f"from_{epoch}"), ckpt_path=path, default_root_dir=tmp_path)
        assert adaptive_of(resumed).history == adaptive_of(whole).history
        expected = whole.lightning_module.state_dict()
        actual = resumed.lightning_module.state_dict()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        for first, second in zip(whole.optimizers, resumed.optimizers, strict=True):
            torch.testing.assert_close(first.state_dict()["state"], second.state_dict()["state"], rtol=0, atol=0)


def test_a_grown_checkpoint_tests_predicts_and_loads(tmp_path: Path) -> None:
    trainer = run(readout(), 3, figures(), ModelCheckpoint(tmp_path, "last"), default_root_dir=tmp_path)
    size = trainer.lightning_module.head.num_prototypes
    assert size > 2
    path = tmp_path / "last.ckpt"

    fresh = readout()
    writer = AssignmentWriter(str(tmp_path / "found.csv"), top=99)
    callbacks = [*watchers(), figures(), writer, ModelCheckpoint(tmp_path, "last")]
    other = quiet_trainer(callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    (scores,) = other.test(fresh, datamodule=digits(), ckpt_path=path, verbose=False)
    assert fresh.head.num_prototypes == size
    assert scores["test/acc"] == pytest.approx(float(trainer.callback_metrics["val/acc"]), abs=0.2)
    other.predict(readout(), datamodule=digits(), ckpt_path=path, return_predictions=False)
    assert f"weight_{size}" in (tmp_path / "found.csv").read_text().splitlines()[0]

    loaded = DDCLReadoutModule.load_from_checkpoint(
        path, backbone=PCABackbone(64, 8, trainable=True), head=DDCLReadout(2, embedding_scale="none"),
        task=Clustering(10),
    )  # fmt: skip
    assert torch.equal(loaded.head.attention.bank.prototypes, trainer.lightning_module.head.attention.bank.prototypes)

    trainer.lightning_module.head.save_pretrained(tmp_path / "head")
    head = Head.from_pretrained(tmp_path / "head")
    assert isinstance(head, DDCLReadout)
    assert head.num_prototypes == head.attention.bank.num_prototypes == size


def test_a_grown_head_with_max_parameters_is_saved_by_its_dimension(tmp_path: Path) -> None:
    head = DDCLReadout(4, max_parameters=1000, embed_dim=16)
    width = head.attention.bank.dim
    head.attention.bank.resize(torch.randn(1, 30, width))
    head.save_pretrained(tmp_path)
    again = Head.from_pretrained(tmp_path)
    tokens = torch.randn(2, 3, 16)
    assert torch.equal(again(tokens).pooled, head.eval()(tokens).pooled)


def test_metrics_follow_the_size() -> None:
    metrics = {"": ClusteringMetrics(2, 3)}
    head = DDCLReadout(2, embed_dim=4).eval()
    task = Clustering(3)
    task.build(head)
    batch = {"x": torch.randn(9, 4), "y": torch.arange(9) % 3}
    task.update_metrics(metrics, head(batch["x"].unsqueeze(1)), batch)
    head.attention.bank.resize(torch.randn(1, 7, 4))
    task.update_metrics(metrics, head(batch["x"].unsqueeze(1)), batch)
    assert metrics[""].counts.shape == (7, 3)
    assert int(metrics[""].counts.sum()) == 9
    metrics[""].reset()
    assert metrics[""].sizes.shape == (7,)


def test_collapse_warning_looks_anew_after_a_change() -> None:
    """The smallest distance falls where one prototype becomes two: no sign of a collapse."""
    module, watch = Project(num_prototypes=2), CollapseWarning(every_n_batches=1, rules=CollapseRules(patience=1))
    fit(module, TemperatureAnnealing(), KMeansInitialization(progress=False), watch, AdaptiveBankSize(), data=six(),
        max_epochs=12)  # fmt: skip
    assert module.layer.bank.num_prototypes == 6
    assert watch.findings == []
    assert watch.report["layer.bank"].num_codes == 6


def refusal(module: pl.LightningModule, data: Any = None, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r"number of|num_heads|num_prototypes|banks") as error:
        fit(module, AdaptiveBankSize(**kwargs), data=data)
    return str(error.value)


def test_what_depends_on_the_size_is_refused() -> None:
    message = refusal(Project(num_heads=2))
    assert message.startswith("num_heads must be 1 for a bank that changes its size")
    for pooling in ("histogram", "both", "slots", "tokens_histogram"):
        head = DDCLReadout(2, pooling=pooling, embedding_scale="none")
        module = DDCLReadoutModule(PCABackbone(4, 2), head, Classification(4))
        assert f"'head.attention.bank' must stay as built: pooling='{pooling}'" in refusal(module, tiny_loader())
    module = DDCLReadoutModule(PCABackbone(4, 4), SoftVQ(4), Clustering(4))
    assert "SoftVQ does not say that it can change" in refusal(module, tiny_loader())
    module = DDCLReadoutModule(PCABackbone(4, 4), ResidualVQ(4, 2), SemanticIDs(MLPDecoder(4)))
    with pytest.raises(ValueError, match=r"must be moved by an optimizer; got 'head.quantizer.levels.0'.*code_update"):
        fit(module, AdaptiveBankSize(), data=tiny_loader())
    assert "num_prototypes must start between min_prototypes = 2" in refusal(Project(num_prototypes=1))
    assert "banks must match the name of a bank; got 'nothing'" in refusal(Project(), banks="nothing")
    with pytest.raises(ValueError, match="WeightAveraging averages weights of one shape"):
        fit(Project(), AdaptiveBankSize(), WeightAveraging())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frequency": 0}, "frequency must be at least 1 epoch; got 0"),
        ({"interval": "day"}, "interval must be 'epoch' or 'step'; got 'day'"),
        ({"duration": 0}, "duration must be > 0 epochs; got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"rules": 3}, "rules must be a SizeRules or None; got 3"),
    ],
)
def test_adaptive_bank_size_refuses_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveBankSize(**arguments)


class Momentum(Project):
    """Adam would blow the rounding of the encoder's bias up to whole steps: its gradient is zero at the centroids."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class SaveState(pl.Callback):
    """Writes each process's weights, optimizer state and sizes where the test can find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (adaptive,) = (callback for callback in trainer.callbacks if isinstance(callback, AdaptiveBankSize))
        state = {
            "weights": pl_module.state_dict(),
            "moments": trainer.optimizers[0].state_dict()["state"],
            "history": adaptive.history,
        }
        torch.save(state, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def grow(folder: Path, kind: str, processes: int) -> None:
    torch.manual_seed(0)
    callbacks = [*watchers(), SaveState(folder)]
    settings: dict[str, Any] = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    trainer = quiet_trainer(max_epochs=6, callbacks=callbacks, limit_val_batches=0, **settings)
    if kind == "manual":
        data: dict[str, Any] = {"datamodule": DigitsDataModule(limit=400, batch_size=100 // processes, seed=0)}
        trainer.fit(readout(encoder_optimizer="SGD"), **data)
    else:
        # The whole data in one batch: processes share it in whatever order.
        trainer.fit(Momentum(num_prototypes=2), loader(size=96, batch_size=96 // processes, shuffle=False))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["manual", "automatic"])
def test_two_processes_grow_as_one_does(tmp_path: Path, kind: str) -> None:
    grow(tmp_path, kind, 1)
    succeed_in_processes(tmp_path, grow, tmp_path, kind, 2)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone["history"] == first["history"] == second["history"]
    assert len(next(iter(alone["history"].values()))) > 1
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["moments"], alone["moments"], rtol=1e-3, atol=1e-5)


def test_the_banks_of_a_module_are_found_again_after_a_change() -> None:
    module = Project(num_prototypes=2)
    parameter = module.layer.bank.prototypes
    grown(module)
    (bank,) = find_banks(module).values()
    assert bank.prototypes is parameter
    assert any(parameter is own_parameter for own_parameter in module.parameters())


def test_reconstruction_of_tokens_takes_a_bank_that_grows() -> None:
    """The decoder reads centroids, whose dimension does not depend on their number."""
    head = DDCLReadout(2, embedding_scale="none")
    module = DDCLReadoutModule(PCABackbone(4, 4), head, Reconstruction(SequenceDecoder(4), target="x"), rho=0.0)
    grown(module, data=tiny_loader(size=64), max_epochs=4)
    assert head.num_prototypes == 4
