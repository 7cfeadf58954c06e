"""Levels of prototypes: what each reads, what reaches what, and each at its own temperature."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddcl_lightning import Classification, Clustering, DDCLReadoutModule, IdentityBackbone, find_banks
from ddcl_lightning.backbones import Tokens
from ddcl_lightning.callbacks import (
    CollapseWarning,
    DecompositionCheck,
    FitSummary,
    KMeansInitialization,
    TemperatureAnnealing,
)
from ddcl_lightning.functional import critical_temperature, decompose, soft_assign
from ddcl_lightning.heads import Head, HierarchicalReadout
from ddcl_lightning.monitoring.recording import record_codebooks
from ddcl_lightning.nn.idf import PrototypeIDF
from ddcl_lightning.nn.initialization import initial_prototypes
from tests.tiny import absolute

TOKENS = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [0, 1, 1, 1, 1], [1] * 5, [1, 0, 0, 0, 0]]).bool()


class Bags(Dataset[dict[str, Tensor]]):
    """Samples of up to five tokens: each token from one of four blobs, a class mostly from two of its own."""

    def __init__(self, size: int = 96) -> None:
        generator = torch.Generator().manual_seed(1)
        centers = 4 * torch.randn(4, 4, generator=generator)
        self.y = torch.arange(size) % 2
        blobs = torch.randint(2, (size, 5), generator=generator) + 2 * self.y.unsqueeze(1)
        self.x = centers[blobs] + 0.3 * torch.randn(size, 5, 4, generator=generator)
        self.mask = torch.arange(5) < torch.randint(2, 6, (size, 1), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.x[row], "y": self.y[row], "mask": self.mask[row]}


class Scaled(IdentityBackbone):
    """Tokens whose scale a test changes, with a weight to train."""

    def __init__(self) -> None:
        super().__init__(4)
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: Any) -> Tokens:
        values, mask = super().forward(batch)
        return Tokens(self.factor * values, mask)


def bags(batch_size: int = 24) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Bags(), batch_size=batch_size)


def head(*args: Any, **kwargs: Any) -> HierarchicalReadout:
    torch.manual_seed(0)
    return HierarchicalReadout(*(args or ([5, 3],)), **{"temperature": 1.0, "embed_dim": 4, **kwargs})


def fit(module: DDCLReadoutModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": list(callbacks), **kwargs})
    trainer.fit(module, bags(), bags())
    return trainer


def module(**kwargs: Any) -> DDCLReadoutModule:
    torch.manual_seed(0)
    return DDCLReadoutModule(IdentityBackbone(4), HierarchicalReadout([4, 2], **kwargs), Clustering(2), rho=0.0)


# What it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK])
def test_levels_are_the_definitions_one_after_the_other(mask: Tensor | None) -> None:
    layer = head(temperature=[absolute(), absolute(0.3)]).eval()
    first, second = (bank.prototypes[0].detach() for bank in find_banks(layer).values())
    centroids = soft_assign(TOKENS.flatten(0, 1), first, 1.0).view(6, 5, 5) @ first
    keep = torch.ones(6, 5).bool() if mask is None else mask
    means = (centroids * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True)
    shares = soft_assign(means, second, 0.3)

    readout = layer(TOKENS, mask)
    torch.testing.assert_close(readout.assignments, shares.unsqueeze(1))
    torch.testing.assert_close(readout.pooled, shares @ second)
    assert readout.tokens.shape == (6, 1, 4)
    expected = [decompose(TOKENS[keep], first, 1.0), decompose(means, second, 0.3)]
    for terms, exact in zip(readout.loss_terms, expected, strict=True):
        for term, value in zip(terms, exact, strict=True):
            torch.testing.assert_close(term.double(), value.view(1), rtol=1e-4, atol=1e-6)
    total = sum(terms.ols.sum() + terms.variance.sum() for terms in readout.loss_terms)  # eq. 17
    torch.testing.assert_close(readout.quantization_loss(), total)


@pytest.mark.parametrize("reads", ["all", "first", "mean", "idf_mean", "idf_inputs"])
def test_padding_has_no_part_in_anything(reads: Any) -> None:
    layer = head(tokens=["all", reads], num_heads=[2, 1], prototype_dim=[3, 2], pooling="all")
    wild = TOKENS.masked_fill(~MASK.unsqueeze(-1), torch.nan)
    tame = TOKENS.masked_fill(~MASK.unsqueeze(-1), 0.0)
    for mode in (True, False):
        layer.train(mode)
        outputs = [copy.deepcopy(layer)(tokens, MASK) for tokens in (tame, wild)]
        torch.testing.assert_close(outputs[0].pooled, outputs[1].pooled)
        torch.testing.assert_close(outputs[0].quantization_loss(), outputs[1].quantization_loss())
        assert bool(torch.isfinite(outputs[1].pooled).all())


def test_every_level_has_settings_of_its_own() -> None:
    layer = HierarchicalReadout(
        [8, 6, 3],
        num_heads=[2, 1, 3],
        prototype_dim=[4, 8, 2],
        temperature=[0.5, 0.2, 0.1],
        tokens=["all", "all", "mean"],
        embedding_scale=["unit", "none", "total"],
        embed_dim=10,
    )
    banks = find_banks(layer)
    assert list(banks) == ["levels.0.bank", "levels.1.bank", "levels.2.bank"]
    assert [tuple(bank.prototypes.shape) for bank in banks.values()] == [(2, 8, 4), (1, 6, 8), (3, 3, 2)]
    assert [bank.temperature_state.value.tolist() for bank in banks.values()] == [
        pytest.approx([value] * heads) for value, heads in ((0.5, 2), (0.2, 1), (0.1, 3))
    ]
    assert [level.scale.mode for level in layer.levels] == ["unit", "none", "total"]
    assert [level.input_projection is None for level in layer.levels] == [False, True, False]
    readout = layer.eval()(torch.randn(4, 7, 10))
    assert readout.assignments is not None
    assert readout.assignments.shape == (4, 3, 3)
    assert readout.pooled.shape == (4, 6) == (4, layer.pooled_dim)
    assert [terms.loss.shape for terms in readout.loss_terms] == [(2,), (1,), (3,)]


def test_joined_levels_read_the_centroids_in_their_places() -> None:
    layer = head(tokens=["all", "joined"], num_tokens=5).eval()
    first = layer.levels[0](TOKENS).tokens
    torch.testing.assert_close(layer.levels[1](first.flatten(1).unsqueeze(1)).tokens, layer(TOKENS).tokens)
    assert layer.pooled_dim == 20
    with pytest.raises(ValueError, match=r"tokens must be num_tokens = 5 per sample to be joined; got 4"):
        layer(TOKENS[:, :4])
    with pytest.raises(ValueError, match="mask must leave every token valid where a level reads them joined"):
        layer(TOKENS, MASK)


def test_rare_prototypes_weigh_more() -> None:
    """Prototype 0 is in every sample, 1 in a half of them and 2 in a quarter."""
    assignments = torch.eye(3)[torch.tensor([[0, 0, 1], [0, 2, 1], [0, 0, 0], [0, 0, 0]])].unsqueeze(1)
    idf = PrototypeIDF(1, 3)
    even = idf.eval()(assignments)
    assert torch.equal(even, torch.full((4, 3), float(even[0, 0])))
    weights = idf.train()(assignments)
    assert idf.share.tolist() == [[1.0, 0.5, 0.25]]
    expected = torch.tensor([1.0, 4.0, 2.0]).log().square()
    torch.testing.assert_close(weights[1], expected, atol=2e-6, rtol=0.0)
    mask = torch.tensor([[True, True, False]]).expand(4, 3)
    fresh = PrototypeIDF(1, 3)
    assert fresh(assignments, mask)[:, 2].tolist() == [0.0] * 4
    assert float(fresh.share[0, 1]) == 0.0  # only ever in the padding
    idf(assignments.flip(0)[:1])  # the second batch counts as much as the first
    assert idf.share.tolist() == [[1.0, 0.25, 0.125]]


def test_the_idf_mean_is_weighted_by_the_idf() -> None:
    layer = head(tokens=["all", "idf_mean"], temperature=absolute()).eval()
    layer.idf["0"].share.copy_(torch.tensor([[1.0, 0.5, 0.1, 0.9, 0.3]]))
    below = layer.levels[0](TOKENS, MASK, need_weights=True)
    weights = layer.idf["0"](below.weights, MASK)
    mean = torch.einsum("bt,btd->bd", weights, below.tokens) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(layer.levels[1](mean.unsqueeze(1)).tokens, layer(TOKENS, MASK).tokens)

    other = head(tokens=["all", "idf_inputs"], temperature=absolute(), prototype_dim=[2, 3]).eval()
    other.idf["0"].share.copy_(torch.tensor([[1.0, 0.5, 0.1, 0.9, 0.3]]))
    weights = other.idf["0"](other.levels[0](TOKENS, MASK, need_weights=True).weights, MASK)
    mean = torch.einsum("bt,btd->bd", weights, TOKENS) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(other.levels[1](mean.unsqueeze(1)).tokens, other(TOKENS, MASK).tokens)


# What reaches what ------------------------------------------------------------------------------


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_levels_input_is_fixed_for_its_own_loss_unless_told_otherwise(end_to_end: bool) -> None:
    layer = head(end_to_end=end_to_end, prototype_dim=[4, 3], temperature=absolute())
    tokens = TOKENS.clone().requires_grad_()
    readout = layer(tokens)
    first, second = (bank.prototypes for bank in find_banks(layer).values())
    above = torch.autograd.grad(readout.loss_terms[1].loss.sum(), [first, tokens, second], allow_unused=True)
    assert [gradient is not None for gradient in above] == [end_to_end, end_to_end, True]
    below = torch.autograd.grad(layer(tokens).loss_terms[0].loss.sum(), [first, tokens, second], allow_unused=True)
    assert [gradient is not None for gradient in below] == [True, True, False]


def test_a_tasks_loss_reaches_the_levels_that_are_pooled() -> None:
    for pooling, end_to_end, reached in (("last", False, False), ("all", False, True), ("last", True, True)):
        layer = head(pooling=pooling, end_to_end=end_to_end)
        layer(TOKENS).pooled.square().sum().backward()
        assert (layer.levels[0].bank.prototypes.grad is not None) == reached
        assert layer.levels[1].bank.prototypes.grad is not None
        assert layer.pooled_dim == layer(TOKENS).pooled.shape[1] == (8 if pooling == "all" else 4)


def test_scale_is_bounded_where_something_trained_could_shrink_it() -> None:
    def scales(rho: float = 0.1, **kwargs: Any) -> list[str]:
        built = DDCLReadoutModule(Scaled(), HierarchicalReadout([5, 3], **kwargs), Clustering(2), rho=rho)
        assert isinstance(built.head, HierarchicalReadout)
        return [level.scale.mode for level in built.head.levels]

    assert scales() == ["whiten", "none"]  # the input of the second is fixed
    assert scales(prototype_dim=[4, 2]) == ["whiten", "whiten"]  # its own projection is not
    assert scales(end_to_end=True) == ["whiten", "whiten"]
    assert scales(rho=0.0, prototype_dim=2) == ["none", "none"]
    assert scales(prototype_dim=2, embedding_scale=["auto", "unit"]) == ["whiten", "unit"]


def test_projections_step_with_the_encoder() -> None:
    layer = head(num_heads=2, prototype_dim=3)
    assert [tuple(p.shape) for p in layer.embedding_parameters()] == [(6, 4), (6, 6)]
    assert len(layer.prototype_parameters()) == 2
    groups = DDCLReadoutModule(IdentityBackbone(4), layer, Clustering(2)).parameter_groups()
    assert [len(groups[name]) for name in ("prototypes", "encoder", "task")] == [2, 2, 0]


# Starting and training --------------------------------------------------------------------------


def means_of_centroids(head: Head, prototypes: Tensor, temperature: Tensor) -> Tensor:
    """What the second level reads of all the bags."""
    data = Bags()
    centroids = soft_assign(data.x.flatten(0, 1), prototypes[0], float(temperature)) @ prototypes[0]
    keep = data.mask.unsqueeze(-1)
    return (centroids.view(-1, 5, 4) * keep).sum(1) / keep.sum(1)


def test_kmeans_starts_the_levels_in_order_each_from_what_the_one_below_gives() -> None:
    trained = module()
    started: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            started.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(trained, TemperatureAnnealing(start=0.2, end=0.2), KMeansInitialization(seed=0), Look(), max_epochs=1)
    data = Bags()
    valid = data.x[data.mask]
    first, second = (started[f"head.levels.{level}.bank.prototypes"] for level in (0, 1))

    def fits(tokens: Tensor, prototypes: Tensor) -> bool:
        """Whether the prototypes are the centres of k-means of these tokens, in any order."""
        best = initial_prototypes(tokens, len(prototypes)).float()
        inertia = [torch.cdist(tokens, p).square().min(1).values.mean() for p in (prototypes, best)]
        return bool(inertia[0] < 1.01 * inertia[1])

    assert fits(valid, first[0])
    temperature = 0.2 * critical_temperature(valid)
    torch.testing.assert_close(
        started["head.levels.0.bank.temperature_state.current"].double(), temperature.view(1), rtol=1e-5, atol=0.0
    )
    read = means_of_centroids(trained.head, first, temperature)
    assert fits(read, second[0])
    torch.testing.assert_close(
        started["head.levels.1.bank.temperature_state.current"].double(),
        0.2 * critical_temperature(read).view(1),
        rtol=1e-4,
        atol=0.0,
    )


def test_rarities_count_in_the_start_of_the_next_level_and_leave_no_trace() -> None:
    trained = module(tokens=["all", "idf_mean"])
    inputs: list[Tensor] = []
    layer = trained.head.levels[1]
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert int(pl_module.head.idf["0"].num_batches) == 0
            assert pl_module.head.idf["0"].share.unique().tolist() == [1.0]
            plain = pl_module.eval()(next(iter(bags()))).tokens
            pl_module.train()
            assert plain.shape == (24, 1, 4)
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(trained, TemperatureAnnealing(), KMeansInitialization(seed=0), Look())
    handle.remove()
    weighted, plain = (
        inputs[-5],
        inputs[-1],
    )  # four batches of the start, then the first in evaluation mode, evenly weighted
    assert not torch.allclose(weighted, plain, atol=1e-2)


def test_every_level_keeps_its_fraction_while_the_levels_below_move() -> None:
    """The scale of the tokens grows tenfold on the way, and the first level's prototypes follow it."""
    trained = DDCLReadoutModule(Scaled(), HierarchicalReadout([4, 2]), Clustering(2), rho=0.0, lr_prototypes=0.5)
    ratios: dict[str, list[float]] = {}

    class Grow(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 5:
                pl_module.backbone.factor.data.fill_(10.0)

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            """T over the critical temperature of all the tokens that a level gets."""
            records: dict[str, list[Tensor]] = {}
            recording = record_codebooks(
                find_banks(pl_module), lambda name, record: records.setdefault(name, []).append(record)
            )
            with torch.no_grad(), recording:
                for batch in bags():
                    pl_module.eval()(batch)
            pl_module.train()
            for name, bank in find_banks(pl_module).items():
                tokens = torch.cat([record.valid_tokens() for record in records[name]], 1)
                ratios.setdefault(name, []).append(float(bank.temperature / critical_temperature(tokens)))

    first = TemperatureAnnealing(start=0.3, end=0.3, banks="*levels.0.*")
    second = TemperatureAnnealing(start=0.05, end=0.05, banks="*levels.1.*")
    fit(trained, first, second, KMeansInitialization(), Grow(), max_epochs=40)
    for level, fraction in ((0, 0.3), (1, 0.05)):
        measured = ratios[f"head.levels.{level}.bank"]
        assert measured[4] == pytest.approx(fraction, rel=0.1)
        assert measured[5] < 0.8 * fraction  # just after the growth, before the running covariance has followed
        assert measured[-1] == pytest.approx(fraction, rel=0.1)


def test_one_temperature_for_both_levels_collapses_the_second_and_is_reported() -> None:
    """The cause of the paper's level-2 assignments at H = ln K."""
    trained = module(temperature=absolute())
    data = Bags()
    high = 0.9 * float(critical_temperature(data.x[data.mask]))
    watch = CollapseWarning(every_n_batches=1)
    annealing = TemperatureAnnealing(start=absolute(high), end=absolute(high))
    with pytest.warns(UserWarning, match=r"CollapseWarning: uniform in head.levels.1.bank at step"):
        fit(trained, annealing, KMeansInitialization(), watch, max_epochs=2)
    signs = {(finding.sign, finding.codebook) for finding in watch.findings}
    assert {("above_critical", "head.levels.1.bank"), ("uniform", "head.levels.1.bank")} <= signs
    assert not any("levels.0" in codebook for _, codebook in signs)


def test_classes_of_bags_are_found_and_every_level_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    check = DecompositionCheck(every_n_batches=1)
    trainer = fit(
        module(tokens=["all", "idf_mean"]),
        TemperatureAnnealing(),
        KMeansInitialization(),
        check,
        CollapseWarning(every_n_batches=1),
        FitSummary(),
        max_epochs=5,
    )
    assert (check.checks, check.violations) == (2 * 5 * 4, 0)
    assert sorted(check.smallest_variance) == ["head.levels.0.bank", "head.levels.1.bank"]
    assert all(value > 0 for value in check.smallest_variance.values())
    logged = set(trainer.callback_metrics)
    for signal in ("delta_min", "entropy", "temperature_ratio", "temperature", "decomposition_error", "variance"):
        assert {f"ddcl/{signal}/head.levels.{level}.bank" for level in (0, 1)} <= logged
    assert float(trainer.callback_metrics["val/acc"]) > 0.6
    printed = capsys.readouterr().out
    assert "level 1: Delta" in printed
    assert "level 2: Delta" in printed


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(end_to_end: bool, tmp_path: Any) -> None:
    def run(epochs: int, ckpt_path: Any = None) -> tuple[DDCLReadoutModule, pl.Trainer]:
        torch.manual_seed(0)
        built = DDCLReadoutModule(
            IdentityBackbone(4),
            HierarchicalReadout(
                [5, 3], num_heads=2, tokens=["all", "idf_mean"], embedding_scale="total", end_to_end=end_to_end
            ),
            Clustering(2),
            lr_prototypes=0.02,
        )
        schedules = [TemperatureAnnealing(duration=4, banks=f"*levels.{level}.*") for level in (0, 1)]
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[*schedules, KMeansInitialization()])
        trainer.fit(built, bags(), ckpt_path=ckpt_path)
        return built, trainer

    whole, _ = run(4)
    _, half = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(4, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_it_classifies_through_all_levels() -> None:
    trained = DDCLReadoutModule(
        Scaled(), HierarchicalReadout([5, 3], pooling="all"), Classification(2), lr_prototypes=0.02
    )
    trainer = fit(trained, TemperatureAnnealing(), KMeansInitialization(), max_epochs=10)
    assert float(trainer.callback_metrics["val/acc"]) > 0.9


# Saving and sizes -------------------------------------------------------------------------------


def test_it_survives_a_trip_through_files(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    built = DDCLReadoutModule(
        Scaled(), HierarchicalReadout([5, 3], tokens=["all", "idf_mean"], prototype_dim=[3, 2]), Clustering(2)
    ).head
    built.train()(torch.randn(50, 5, 4))
    built.eval().save_pretrained(tmp_path)
    loaded = Head.from_pretrained(tmp_path)
    assert isinstance(loaded, HierarchicalReadout)
    assert [level.scale.mode for level in loaded.levels] == ["whiten", "whiten"]
    assert torch.equal(loaded(TOKENS, MASK).pooled, built(TOKENS, MASK).pooled)


@pytest.mark.parametrize("kwargs", [{}, {"num_heads": [4, 2]}, {"tokens": ["all", "joined"], "num_tokens": 5}])
def test_levels_use_max_parameters_up(kwargs: dict[str, Any]) -> None:
    for max_parameters in (300, 3000):
        layer = HierarchicalReadout([8, 4], max_parameters=max_parameters, embed_dim=16, **kwargs)
        larger = [dim + 1 for dim in (level.bank.dim for level in layer.levels)]
        assert layer.num_parameters() <= max_parameters
        assert (
            HierarchicalReadout([8, 4], prototype_dim=larger, embed_dim=16, **kwargs).num_parameters() > max_parameters
        )


def test_compiled_it_gives_the_same() -> None:
    layer = head(tokens=["all", "idf_mean"]).eval()
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(TOKENS, MASK).pooled, layer(TOKENS, MASK).pooled)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((20,), {}, r"num_prototypes must be a list of integers; got 20"),
        (([],), {}, "num_prototypes must be a list"),
        (([5, 0],), {}, "num_prototypes must be at least 1; got 0"),
        (([5, 3],), {"num_heads": [1]}, r"num_heads must be one value for all levels or a list with one per level, 2"),
        (([5, 3],), {"temperature": [1.0, 1.0, 1.0]}, r"temperature must be one value .*; got \[1.0, 1.0, 1.0\]"),
        (([5, 3],), {"tokens": ["all", "sum"]}, "tokens must be one of .*; got 'sum'"),
        (([5, 3],), {"tokens": ["idf_inputs", "all"]}, "tokens of the first level must not be 'idf_inputs'"),
        (([5, 3],), {"tokens": ["mean", "idf_mean"]}, "above a level that reads one vector per sample"),
        (([5, 3],), {"tokens": ["all", "joined"]}, "num_tokens belongs to tokens 'joined', which needs it; got"),
        (([5, 3],), {"num_tokens": 4}, "num_tokens belongs to tokens 'joined'"),
        (([5, 3],), {"tokens": ["all", "joined"], "num_tokens": 0}, "num_tokens must be at least 1"),
        (([5, 3],), {"embedding_scale": ["unit", "big"]}, "embedding_scale must be one of .*; got 'big'"),
        (([5, 3],), {"pooling": "max"}, "pooling must be one of .*; got 'max'"),
        (([5, 3],), {"prototype_dim": 3, "max_parameters": 100}, "max_parameters chooses prototype_dim"),
        (([5, 3],), {"max_parameters": 3}, "max_parameters must be at least"),
        (([5, 3],), {"temperature": [1.0, 0.0]}, "a temperature must be > 0, one number or one per head; got 0.0"),
        (([5, 3],), {"num_heads": 3}, "embed_dim must be divisible by num_heads; got 4 and 3"),
    ],
)
def test_hierarchical_readout_refuses_settings_that_do_not_fit_the_levels(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchicalReadout(*args, embed_dim=4, **kwargs)
