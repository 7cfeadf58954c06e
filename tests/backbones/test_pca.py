"""PCA as scikit-learn computes it, once, from clean data, and honest about what it is."""

from collections.abc import Iterable, Iterator

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.decomposition import PCA
from tiny import LinearBackbone, loader, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, PCABackbone
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.backbones.base import count_batches, input_sample


def data(n: int = 80) -> Tensor:
    """Correlated features (n, 6), away from the origin."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=g) @ torch.randn(6, 6, generator=g) + 3


@pytest.mark.parametrize("whiten", [False, True])
def test_equals_scikit_learn(whiten: bool) -> None:
    x = data()
    backbone = PCABackbone(6, 4, whiten=whiten)
    backbone.fit(x)
    reference = PCA(4, whiten=whiten, svd_solver="full").fit(x.double().numpy())
    new = data(100)[80:]
    values, mask = backbone({"x": new})
    assert mask is None
    assert values.shape == (20, 1, 4)
    expected = torch.from_numpy(reference.transform(new.double().numpy())).float().unsqueeze(1)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert float(backbone.explained_variance_ratio) == pytest.approx(
        reference.explained_variance_ratio_.sum(), rel=1e-5
    )


def test_sequences_and_masks() -> None:
    x, mask = data().view(8, 10, 6), torch.rand(8, 10) < 0.5
    backbone, flat = PCABackbone(6, 2), PCABackbone(6, 2)
    backbone.fit(x)
    flat.fit(data())
    tokens = backbone({"x": x, "mask": mask})
    assert tokens.values.shape == (8, 10, 2)
    assert tokens.mask is mask
    torch.testing.assert_close(tokens.values.flatten(0, 1), flat(data()).values.squeeze(1))


def test_whitening_leaves_a_constant_feature_at_zero() -> None:
    x = torch.cat([data()[:, :3], torch.full((80, 1), 7.3)], 1)
    backbone = PCABackbone(4, 4, whiten=True)
    backbone.fit(x)
    values = backbone((x, None)).values.squeeze(1)
    torch.testing.assert_close(values[:, :3].var(0), torch.ones(3), rtol=1e-3, atol=0)
    # New data in which the feature varies after all must not blow up either.
    x[:, 3] += torch.linspace(-1, 1, 80)
    assert not values[:, 3].any()
    assert float(backbone((x, None)).values.abs().max()) < 10


def test_is_fitted_once_and_for_all() -> None:
    backbone = PCABackbone(6, 4)
    assert not backbone.fitted
    with pytest.raises(RuntimeError, match="PCABackbone is not fitted"):
        backbone(data())
    backbone.fit(data())
    assert backbone.fitted
    twin = PCABackbone(6, 4)
    twin.load_state_dict(backbone.state_dict())
    assert twin.fitted
    assert torch.equal(twin(data()).values, backbone(data()).values)


def test_equal_samples_give_equal_components() -> None:
    first, second = PCABackbone(6, 4), PCABackbone(6, 4)
    first.fit(data())
    second.fit(data().bfloat16().float())
    assert torch.equal(first.weight.sign(), second.weight.sign())
    second.fit(data())
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_and_repr_tell_whether_it_trains(trainable: bool) -> None:
    backbone = PCABackbone(6, 4, trainable=trainable)
    assert "not fitted yet" in repr(backbone)
    backbone.fit(data())
    assert all(p.requires_grad == trainable for p in backbone.parameters())
    assert ("trainable: no longer a PCA" in repr(backbone)) == trainable
    share = f"frozen PCA, {float(backbone.explained_variance_ratio):.1%} of the variance kept"
    assert (share in repr(backbone)) != trainable
    backbone.requires_grad_(False)  # rho = 0
    assert share in repr(backbone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_values_that_are_not_finite(bad: float) -> None:
    x = data()
    x[3, 2] = bad
    with pytest.raises(ValueError, match="x must be finite to fit a PCA"):
        PCABackbone(6, 4).fit(x)


def test_refuses_data_without_components() -> None:
    with pytest.raises(ValueError, match="at least num_components = 4 rows to fit a PCA; got 3"):
        PCABackbone(6, 4).fit(data(3))
    with pytest.raises(ValueError, match="x must vary to fit a PCA; got 9 equal rows"):
        PCABackbone(6, 4).fit(torch.ones(9, 6))


@pytest.mark.parametrize("components", [0, 7])
def test_refuses_a_number_of_components(components: int) -> None:
    with pytest.raises(ValueError, match=rf"num_components must be in \[1, in_features = 6\]; got {components}"):
        PCABackbone(6, components)


def test_refuses_another_dimension() -> None:
    backbone = PCABackbone(6, 4)
    for call in (backbone.fit, backbone):
        backbone.fitted.fill_(True)
        with pytest.raises(ValueError, match=r"\(B, 6\) or \(B, T, 6\); got \(4, 5\)"):
            call(torch.randn(4, 5))


class Endless(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield {"x": torch.randn(6)}


def test_is_fitted_to_so_much_of_an_endless_stream_as_fills_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = DataLoader(Endless(), batch_size=8)
    assert count_batches(stream) is None
    assert count_batches([1, 2]) == 2
    assert len(input_sample(stream, size=20)) == 20
    monkeypatch.setattr("ddcl_lightning.backbones.base.Reservoir", lambda size: Reservoir(20))
    backbone = PCABackbone(6, 4)
    backbone.prepare(stream)
    weight = backbone.weight.clone()
    backbone.prepare(stream)  # once and for all
    assert torch.equal(backbone.weight, weight)


class Asks(LinearBackbone):
    def prepare(self, batches: Iterable[Batch]) -> None:
        self.shapes = [tuple(batch["x"].shape) for batch in batches]


class LoaderInSanityCheck(Callback):
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_set_up = trainer.train_dataloader is not None


def test_loaders_are_set_up_early_only_for_a_backbone_that_asks_for_its_data() -> None:
    for backbone in (Asks(), LinearBackbone()):
        callback = LoaderInSanityCheck()
        module = DDCLReadoutModule(backbone, DDCLReadout(4), Clustering(4))
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader(), loader())
        assert callback.is_set_up == isinstance(backbone, Asks)
        if isinstance(backbone, Asks):
            assert backbone.shapes == [(16, 4)] * 4
