"""Frozen is frozen: there is no way left in which prototypes move, and what is frozen for a while moves after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from ddcl_lightning import (
    OptimizerConfig,
    PrototypeBank,
    SizeRules,
    SoftVectorQuantizer,
    TokenNormalized,
    VectorQuantizer,
)
from ddcl_lightning.callbacks import AdaptiveBankSize, KMeansInitialization
from tests.tiny import clustering_module, loader, quiet_trainer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "SGD": {"prototype_optimizer": OptimizerConfig("SGD", {"momentum": 0.9})},
    "AdamW": {"prototype_optimizer": OptimizerConfig("AdamW", {"weight_decay": 0.1})},
    "TokenNormalized": {
        "prototype_optimizer": OptimizerConfig("TokenNormalized", {"relocation_threshold": 0.5}),
        "lr_prototypes": 0.2,
    },
}


class Positions(Callback):
    """Where the prototypes are after each step; freezes them after some."""

    def __init__(self, freeze_after: int | None = None) -> None:
        self.freeze_after = freeze_after
        self.positions: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.freeze_after:
            pl_module.head.attention.bank.requires_grad_(False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.positions.append(pl_module.head.attention.bank.prototypes.detach().clone())

    def moved(self) -> list[bool]:
        return [not torch.equal(a, b) for a, b in zip(self.positions, self.positions[1:], strict=False)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_first_steps_without_the_prototypes(optimizer: str, tmp_path: Path) -> None:
    """Two epochs of four steps, six of them frozen, in one go and resumed after the fourth."""
    given = {"freeze_prototypes_steps": 6, **OPTIMIZERS[optimizer]}
    whole = Positions()
    module = clustering_module(**given)
    start = module.head.attention.bank.prototypes.detach().clone()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    quiet_trainer(max_epochs=2, callbacks=[whole, saving], enable_checkpointing=True).fit(module, loader())
    assert torch.equal(whole.positions[5], start)
    assert whole.moved()[5:] == [True, True]
    resumed = Positions()
    path = next(tmp_path.glob("epoch=0*.ckpt"))
    again = clustering_module(**given)
    saving_too = ModelCheckpoint(tmp_path / "again", "{epoch}", save_top_k=-1)
    trainer = quiet_trainer(max_epochs=2, callbacks=[resumed, saving_too], enable_checkpointing=True)
    trainer.fit(again, loader(), ckpt_path=path)
    assert [torch.equal(a, b) for a, b in zip(resumed.positions, whole.positions[4:], strict=True)] == [True] * 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_prototypes_frozen_in_the_middle_stay(optimizer: str) -> None:
    watching = Positions(freeze_after=3)
    sizes = AdaptiveBankSize(SizeRules(2, 8, significance=None), frequency=4, interval="step", duration=8)
    module = clustering_module(**OPTIMIZERS[optimizer])
    quiet_trainer(max_epochs=2, callbacks=[sizes, watching]).fit(module, loader())
    assert watching.moved() == [True, True, False, False, False, False, False]


def test_k_means_leaves_frozen_prototypes_alone() -> None:
    module = clustering_module()
    bank = module.head.attention.bank
    bank.requires_grad_(False)
    before = bank.prototypes.detach().clone()
    with pytest.warns(UserWarning, match="are frozen and were never set from data"):
        quiet_trainer(max_epochs=1, callbacks=[KMeansInitialization(num_restarts=1)]).fit(module, loader())
    assert torch.equal(bank.prototypes, before)
    with pytest.raises(ValueError, match="prototypes are frozen, so their number stays"):
        bank.resize(before[:, :2])
    layer = VectorQuantizer(4, 3, init="kmeans")
    layer.codebook.requires_grad_(False)
    start = layer.codebook.clone()
    layer(torch.randn(2, 5, 4))
    assert torch.equal(layer.codebook, start)


def test_evaluation_moves_nothing_and_passes_gradients_straight_through() -> None:
    for gradient in ("straight_through", "soft"):
        vq = SoftVectorQuantizer(4, 8, code_update="optimizer", gradient=gradient, embedding_scale="per_dimension")  # type: ignore[arg-type]
        vq(torch.randn(2, 9, 4))
        vq.eval()
        before = {name: value.clone() for name, value in vq.state_dict().items()}
        z, weights = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 9, 4)
        output = vq(z)
        ((output.quantized * weights).sum() + output.terms.loss).backward()
        assert z.grad is not None
        assert bool(z.grad.any())
        assert vq.bank.prototypes.grad is None
        assert torch.equal(output.quantized, vq.decode(output.indices))
        assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_the_same_parameter_in_two_optimizers_is_refused_by_name() -> None:
    net = nn.ModuleDict({"encoder": nn.Linear(4, 4), "vq": SoftVectorQuantizer(4, 8, code_update="optimizer")})
    everything = torch.optim.Adam(net.parameters(), lr=1e-2)
    codes = TokenNormalized([net["vq"].bank.prototypes]).watch(net)
    net["vq"](net["encoder"](torch.randn(2, 9, 4))).terms.loss.backward()
    before = net["vq"].codebook.clone()
    with pytest.raises(RuntimeError, match=r"'vq.bank.prototypes' is in two optimizers, TokenNormalized and Adam"):
        everything.step()
    assert torch.equal(net["vq"].codebook, before)
    codes.close()
    everything.step()
    # The later of two that watch has them; the earlier one has nothing left to refuse.
    first = TokenNormalized([net["vq"].bank.prototypes]).watch(net)
    second = TokenNormalized([net["vq"].bank.prototypes]).watch(net)
    net["vq"](net["encoder"](torch.randn(2, 9, 4))).terms.loss.backward()
    second.step()
    with pytest.raises(RuntimeError, match="is in two optimizers"):
        first.step()


def test_a_head_that_gives_a_parameter_twice_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = clustering_module()
    monkeypatch.setattr(module.head, "embedding_parameters", lambda: [module.head.attention.bank.prototypes])
    with pytest.raises(ValueError, match=r"'head.attention.bank.prototypes' is in two optimizers, among"):
        module.configure_optimizers()
    with pytest.raises(ValueError, match="freeze_prototypes_steps must be at least 0"):
        clustering_module(freeze_prototypes_steps=-1)


@pytest.mark.parametrize("kind", ["Adam", "TokenNormalized"])
@pytest.mark.parametrize("loaded", ["module", "optimizer"])
def test_another_number_of_prototypes_in_a_state_is_said_in_a_sentence(kind: str, loaded: str) -> None:
    def make(size: int) -> tuple[PrototypeBank, torch.optim.Optimizer]:
        bank = PrototypeBank(size, 4)
        if kind == "Adam":
            return bank, torch.optim.Adam(bank.parameters(), lr=1e-2)
        return bank, TokenNormalized([bank.prototypes], relocation_threshold=0.5).watch(bank)

    def step(bank: PrototypeBank, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        bank(torch.randn(9, 4)).terms.loss.sum().backward()
        optimizer.step()

    small, large = make(5), make(9)
    step(*small)
    step(*large)
    (small[0] if loaded == "module" else small[1]).load_state_dict(
        (large[0] if loaded == "module" else large[1]).state_dict()
    )
    with pytest.raises(RuntimeError, match=r"(prototypes per head, of which there are \d now.*load the state of both)"):
        step(*small)
    (small[1] if loaded == "module" else small[0]).load_state_dict(
        (large[1] if loaded == "module" else large[0]).state_dict()
    )
    step(*small)
