"""The share of a probe's first variance that codes explain, by hand; and a model that is as it was after a reading."""

import copy
import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddcl_lightning import CodebookMonitor, ResidualVectorQuantizer, VectorQuantizer, find_codebooks
from ddcl_lightning.monitoring.probe import MAX_TOKENS, Probe, _after, _Call, explained_by_levels, explained_variance
from ddcl_lightning.monitoring.records import CodebookRecord
from tests.monitoring.codebook_cases import CASES


def test_codes_that_tell_all_explain_all_and_a_single_code_nothing() -> None:
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    assert explained_variance(tokens, torch.tensor([0, 0, 1, 1, 2, 2]), 3) == pytest.approx(1)
    assert explained_variance(tokens, torch.zeros(6, dtype=torch.int64), 3) == pytest.approx(0)


def test_the_share_is_that_of_an_example_counted_by_hand_and_adjusted_for_the_number_of_codes() -> None:
    tokens = torch.tensor([[0.0], [2.0], [4.0], [6.0], [7.0], [11.0]])
    codes = torch.tensor([0, 0, 1, 1, 2, 2])  # means 1, 5 and 9 around 5: 64 of 80
    within, total = 2.0 + 2.0 + 8.0, 76.0
    expected = 1 - (within / total) * 5 / 3
    assert explained_variance(tokens, codes, 3) == pytest.approx(expected)
    assert explained_variance(tokens, codes, 100) == pytest.approx(expected)  # those in use count


@pytest.mark.parametrize("num_codes", [2, 20, 200])
def test_codes_at_random_explain_nothing_however_many_there_are(num_codes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(600, 4, generator=generator)
    shares = [
        explained_variance(tokens, torch.randint(num_codes, (600,), generator=generator), num_codes) for _ in range(30)
    ]
    assert sum(shares) / 30 == pytest.approx(0, abs=0.01)


def test_tokens_that_cannot_count_are_left_out() -> None:
    tokens = torch.tensor([[1.0], [1.5], [-1.0], [-1.5], [math.nan], [9.0], [9.0]])
    codes = torch.tensor([0, 0, 1, 1, 0, -1, 2])
    assert explained_variance(tokens, codes, 2) == pytest.approx(explained_variance(tokens[:4], codes[:4], 2))


def test_the_share_is_unknown_without_variance_or_with_a_code_for_every_token() -> None:
    assert math.isnan(explained_variance(torch.ones(8, 2), torch.arange(8) % 2, 2))
    assert math.isnan(explained_variance(torch.randn(8, 2), torch.arange(8), 8))
    assert math.isnan(explained_variance(torch.randn(8, 2), torch.full((8,), -1), 2))


class Noisy(nn.Module):
    """Dropout, statistics of the batch, a counter, and noise even in evaluation mode."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.quantizer = quantizer
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(8))

    def forward(self, values: Tensor) -> Any:
        self.calls += 1
        self.latest = values[0]  # another tensor than before
        noise = 0.01 * torch.rand(values.shape)
        return self.quantizer((self.encoder(values) + noise).unsqueeze(0))


def kmeans_quantizer(**options: Any) -> nn.Module:
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer: nn.Module = library.VectorQuantize(dim=8, codebook_size=4, **options)
    return quantizer


QUANTIZERS = {
    "ours": lambda: VectorQuantizer(8, 4),
    "moving averages": lambda: kmeans_quantizer(decay=0.9),
    "k-means at the first call": lambda: kmeans_quantizer(kmeans_init=True),
    "k-means of parameters": lambda: kmeans_quantizer(kmeans_init=True, ema_update=False, learnable_codebook=True),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_reading_leaves_the_model_its_modes_and_the_random_state_as_they_were(name: str) -> None:
    torch.manual_seed(0)
    model, values = Noisy(QUANTIZERS[name]()), torch.randn(64, 8)
    model.encoder[2].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    latest, random = model.latest, torch.get_rng_state()
    probe = Probe(model, find_codebooks(model), lambda: model(values))
    first, second = probe.read(), probe.read()
    assert first == second
    assert all(0 < share <= 1 for shares in first.values() for share in shares)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert model.latest is latest
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_model_is_called_in_evaluation_mode_without_gradients() -> None:
    modes = []

    class Watched(nn.Sequential):
        def forward(self, values: Tensor) -> Any:
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(values)

    model = Watched(VectorQuantizer(8, 4))
    monitor = CodebookMonitor(model, probe=lambda: model(torch.randn(4, 30, 8)), every_n_calls=1)
    assert modes == [(False, False)]
    assert not monitor.report()  # the probe's own call is not counted
    monitor.close()


def test_a_probe_measures_on_its_first_embeddings_also_after_its_state_was_restored() -> None:
    torch.manual_seed(0)
    model, values = nn.Sequential(nn.Linear(8, 8), VectorQuantizer(8, 6)), torch.randn(2, 100, 8)
    probe = Probe(model, find_codebooks(model), lambda: model(values))
    (healthy,) = probe.read()["1"]
    saved = probe.state_dict()
    with torch.no_grad():
        model[0].weight.zero_()  # all tokens become one
    (collapsed,) = probe.read()["1"]
    assert healthy > 0.1
    assert collapsed == pytest.approx(0)
    resumed, fresh = (Probe(model, find_codebooks(model), lambda: model(values)) for _ in range(2))
    resumed.load_state_dict(saved)
    assert resumed.read() == {"1": [collapsed]}
    assert math.isnan(fresh.read()["1"][0])  # its first embeddings have no variance


def test_a_probe_is_of_bounded_size_and_knows_nothing_of_other_samples() -> None:
    model, sizes = nn.Sequential(VectorQuantizer(8, 6)), iter([3 * MAX_TOKENS, 3 * MAX_TOKENS, 50])
    probe = Probe(model, find_codebooks(model), lambda: model(torch.randn(1, next(sizes), 8)))
    assert math.isfinite(probe.read()["0"][0])
    assert probe.state_dict()["0"].shape == (1, MAX_TOKENS, 8)
    probe.read()
    assert math.isnan(probe.read()["0"][0])


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_codebook_is_read_by_a_probe_without_a_trace(name: str) -> None:
    case = CASES[name]
    model = case.make()
    state = copy.deepcopy(model.state_dict())
    probe = Probe(model, find_codebooks(model, case.named), lambda: case.call(model))
    values = probe.read()
    assert values == probe.read() or any(math.isnan(share) for shares in values.values() for share in shares)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_levels_explain_one_after_the_other_what_those_before_leave() -> None:
    tokens = torch.tensor([[-5.0], [-3.0], [3.0], [5.0]]).repeat(20, 1)
    coarse, fine = torch.tensor([0, 0, 1, 1]).repeat(20), torch.tensor([0, 1, 0, 1]).repeat(20)
    assert explained_by_levels(tokens, [coarse], 2) == explained_variance(tokens, coarse, 2)
    assert explained_by_levels(tokens, [coarse], 2) == pytest.approx(1 - 1 / 17 * 79 / 78)
    assert explained_by_levels(tokens, [coarse, fine], 2) == pytest.approx(1)
    assert explained_by_levels(tokens, [coarse, torch.zeros_like(fine)], 2) == explained_by_levels(tokens, [coarse], 2)
    assert math.isnan(explained_by_levels(tokens, [torch.full_like(fine, -1), fine], 2))


class ResidualAutoencoder(nn.Module):
    """An autoencoder of digits with three levels of 32 codes, and one way to train them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))
        if kind == "ours":
            self.quantizer: nn.Module = ResidualVectorQuantizer(16, 32, 3)
        else:
            library = pytest.importorskip("vector_quantize_pytorch")
            options = {"codebook_size": 32, "num_quantizers": 3, "kmeans_init": True, "commitment_weight": 0.25}
            self.quantizer = library.ResidualVQ(dim=16, shared_codebook=kind == "shared", **options)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.quantizer(self.encoder(images))
        if isinstance(self.quantizer, ResidualVectorQuantizer):
            return self.decoder(output.quantized), output.terms.loss
        return self.decoder(output[0]), output[2].sum()


@pytest.mark.parametrize("kind", ["ours", "library", "shared"])
def test_levels_of_a_healthy_residual_quantizer_explain_more_and_more_and_a_dead_one_nothing_more(kind: str) -> None:
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().data / 16, dtype=torch.float32)
    model, probed = ResidualAutoencoder(kind), images[torch.randperm(len(images))[:512]]
    monitor = CodebookMonitor(model, probe=lambda: model(probed), every_n_calls=2, on_collapse="ignore")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def train(steps: int) -> list[float]:
        for _ in range(steps):
            batch = images[torch.randint(len(images), (128,))]
            decoded, loss = model(batch)
            error = (decoded - batch).square().mean()
            optimizer.zero_grad()
            (64 * error + loss).backward()
            optimizer.step()
            monitor.check(error)
        monitor.read_probe()
        return [values[0] for values in monitor._explained.values()]

    healthy = train(100)
    assert healthy[-1] > 0.5
    assert healthy == sorted(healthy)
    assert [finding for finding in monitor.findings if finding.level == "alarm"] == []
    if kind == "shared":
        assert len(healthy) == 1
        return
    name = list(monitor.codebooks)[1]
    with torch.no_grad():  # the second level: all codes but one are far away
        if kind == "ours":
            bank = model.quantizer.levels[1].requires_grad_(False)
            bank.prototypes[:, 1:] += 100
        else:
            codebook = model.quantizer.layers[1]._codebook
            codebook.embed[:, 1:] += 100
            codebook.ema_update = False
    dead = train(60)
    assert dead[1] == pytest.approx(dead[0])
    assert dead[2] > dead[1] + 0.02
    alarms = {(finding.sign, finding.codebook) for finding in monitor.findings if finding.level == "alarm"}
    assert ("few_codes", name) in alarms
    assert {codebook for _, codebook in alarms} == {name}


def test_a_level_that_gets_a_projection_of_the_residual_is_not_measured() -> None:
    case = CASES["DAC"]
    model = case.make()
    explained = Probe(model, find_codebooks(model), lambda: case.call(model)).read()
    assert [math.isnan(values[0]) for values in explained.values()] == [False, True, True]


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_level_is_told_from_another_codebook_at_every_scale(scale: float) -> None:
    z, book, codes = scale * torch.randn(64, 4), scale * torch.randn(8, 4), torch.randint(8, (64,))
    first = CodebookRecord.of_codes(z, book, codes)
    calls: list[_Call] = []
    calls.append(_after(calls, "level0", first))
    level = _after(calls, "level1", CodebookRecord.of_codes(z - book[codes], book, codes))
    other = _after(calls, "other", CodebookRecord.of_codes(scale * torch.randn(64, 4), book, codes))
    assert (level.before, other.before) == ((calls[0],), ())
