"""Nothing that is not finite enters what is followed from batch to batch, and nothing that cannot be is loaded."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ddcl_lightning import EmbeddingScale, PrototypeBank, SoftVectorQuantizer, Temperature
from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.heads import HierarchicalReadout, VQPooling
from ddcl_lightning.heads.base import Head
from ddcl_lightning.nn.idf import PrototypeIDF
from ddcl_lightning.nn.running_covariance import RunningCovariance
from tests.tiny import absolute, clustering_module, loader, quiet_trainer


def hierarchy() -> nn.Module:
    torch.manual_seed(0)
    return HierarchicalReadout([5, 3], tokens=["all", "idf_mean"], embedding_scale="per_dimension", embed_dim=6)


def quantizer(scale: str = "whiten") -> nn.Module:
    torch.manual_seed(0)
    return SoftVectorQuantizer(6, 5, embedding_scale=scale)  # type: ignore[arg-type]


def fitted_pca() -> nn.Module:
    pca = PCABackbone(6, 3)
    pca.fit(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    return pca


def tokens(number: int) -> Tensor:
    return torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(number))


FOLLOWING: dict[str, Callable[[], nn.Module]] = {
    "whiten": quantizer,
    "per_dimension": lambda: quantizer("per_dimension"),
    "total": lambda: quantizer("total"),
    "none": lambda: quantizer("none"),
    "hierarchy": hierarchy,
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_poisoned_batch_that_is_skipped_leaves_the_state_of_a_run_without_it(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody looks; the batch is skipped because its loss is not finite."""
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)
    states = []
    for poisoned in (True, False):
        module = FOLLOWING[name]()
        for number in range(4):
            batch = tokens(number)
            if number in (0, 2):
                if not poisoned:
                    continue
                batch[1, 2, 3] = bad
            module(batch)
        states.append(module.state_dict())
    for key, value in states[1].items():
        assert torch.equal(states[0][key], value), key


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_batch_without_tokens_counts_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)
    monkeypatch.setattr("ddcl_lightning.heads.base.check_tokens", lambda *args: None)
    monkeypatch.setattr("ddcl_lightning.heads.hierarchical.check_tokens", lambda *args: None)
    module = FOLLOWING[name]()
    module(tokens(1))
    before = copy.deepcopy(module.state_dict())
    module(tokens(2), torch.zeros(4, 9, dtype=torch.bool))
    for key, value in before.items():
        if "rarities" not in key:  # counts samples
            assert torch.equal(module.state_dict()[key], value), key


class NoLook(TorchDispatchMode):
    """Fails where a value is read, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        return func(*args, **(kwargs or {}))


def test_nobody_waits_for_the_device_to_find_out() -> None:
    bad = torch.full((2, 9, 6), torch.nan)
    covariance, idf = RunningCovariance(2, 6), PrototypeIDF(2, 3)
    scales = [EmbeddingScale(6, "per_dimension"), EmbeddingScale(6, "total")]
    with NoLook():
        covariance(bad)
        idf(torch.full((2, 2, 9, 3), torch.nan))
        for scale in scales:
            scale(bad)
    for module in (covariance, idf, *scales):
        assert int(module.num_batches) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_followed_once(reentrant: bool) -> None:
    states = []
    for run_again in (True, False):
        vq, x = quantizer("per_dimension"), tokens(1).requires_grad_()
        forward = lambda x, vq=vq: vq(x).quantized.square().mean()  # noqa: E731
        loss = checkpoint(forward, x, use_reentrant=reentrant) if run_again else forward(x)
        loss.backward()
        states.append((vq.state_dict(), x.grad))
    torch.testing.assert_close(states[0], states[1])


def test_half_precision_rounds_no_statistic_and_no_temperature() -> None:
    vq = quantizer("per_dimension").bfloat16()
    vq(tokens(1).bfloat16())
    for name, buffer in vq.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), name
    trainable = SoftVectorQuantizer(6, 5, code_update="optimizer").bfloat16()
    assert trainable.bank.prototypes.dtype == torch.bfloat16
    assert all(buffer.dtype != torch.float32 for buffer in quantizer().double().buffers())
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in hierarchy().buffers())
    finally:
        torch.set_default_dtype(default)


def test_models_are_averaged_with_their_buffers() -> None:
    vq = quantizer("per_dimension")
    vq.bank.set_prototypes(torch.randn(1, 5, 6))
    for average in (None, get_ema_multi_avg_fn(0.999)):
        averaged = AveragedModel(vq, use_buffers=True, multi_avg_fn=average)
        for number in range(3):
            vq(tokens(number))
            averaged.update_parameters(vq)
        assert bool(averaged.module.bank.initialized)
        vq.load_state_dict(averaged.module.state_dict())
        assert torch.isfinite(vq.eval()(tokens(1)).quantized).all()


def test_lightning_averages_a_module_with_a_bank() -> None:
    module = clustering_module(prototype_optimizer="TokenNormalized", lr_prototypes=0.1)
    quiet_trainer(max_epochs=2, callbacks=[WeightAveraging()]).fit(module, loader())
    assert torch.isfinite(module.head.attention.bank.prototypes).all()


def test_boolean_flags_of_older_states_are_taken() -> None:
    for flag in (True, False):
        for assign in (True, False):
            bank = PrototypeBank(4, 3)
            bank.load_state_dict({**bank.state_dict(), "initialized": torch.tensor(flag)}, assign=assign)
            assert bool(bank.initialized) is flag
            assert bank.initialized.dtype == torch.float32
    pca = PCABackbone(6, 3)
    pca.load_state_dict({**fitted_pca().state_dict(), "fitted": torch.tensor(True)})
    assert pca.fitted


def tampered(value: Tensor, name: str) -> list[Tensor]:
    """States that no run can have left behind."""

    def with_last(last: float) -> Tensor:
        changed = value.clone()
        changed.view(-1)[-1] = last
        return changed

    of = {
        ("value", "current"): [0.0, -1.0],
        (
            "lambda_max",
            "share",
            "explained_variance_ratio",
            "num_batches",
            "initialized",
            "fitted",
            "variance",
        ): [-1],
        ("covariance",): [-1.0],
    }
    lasts = [number for names, numbers in of.items() if name in names for number in numbers]
    if value.is_floating_point():
        lasts += [torch.nan, torch.inf, -torch.inf]
    states = [with_last(last) for last in lasts]
    if name in ("covariance", "variance") and value.dim() > 1:
        skewed = value.clone()
        skewed[..., 0, 1] += 10 * value.abs().max() + 1
        states.append(skewed)
    if name == "direction":
        states.append(torch.zeros_like(value))
    return [*states, value.to(torch.complex64)]


GUARDED: dict[str, Callable[[], nn.Module]] = {
    **FOLLOWING,
    "critical": lambda: PrototypeBank(4, 6),
    "initial": lambda: PrototypeBank(4, 6, temperature=Temperature(0.1, unit="initial")),
    "absolute": lambda: PrototypeBank(4, 6, temperature=absolute()),
    "vq": lambda: VQPooling(4, embed_dim=6),
    "pca": fitted_pca,
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_damaged_state_is_refused_by_name_and_changes_nothing(name: str) -> None:
    module = GUARDED[name]()
    if name in FOLLOWING:
        module(tokens(1))
    state = copy.deepcopy(module.state_dict())
    for key, value in state.items():
        for damaged in tampered(value, key.rpartition(".")[2]):
            with pytest.raises(RuntimeError, match=rf"{key} must be .*; got .*damaged: load another"):
                module.load_state_dict({**state, key: damaged})
            assert torch.equal(module.state_dict()[key], value)
    module.load_state_dict(state)


def test_a_damaged_head_is_refused_by_name(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    head = hierarchy()
    head(tokens(1))
    head.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in head.state_dict().items()}
    for key, last in (
        ("levels.0.bank.temperature_state.current", 0.0),
        ("levels.1.bank.prototypes", torch.nan),
        ("levels.0.scale.num_batches", -3),
    ):
        changed = {name: value.clone() for name, value in state.items()}
        changed[key].view(-1)[-1] = last
        safetensors.save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{key} must"):
            Head.from_pretrained(tmp_path)
    projected = VQPooling(4, code_dim=3, embed_dim=6)
    with torch.no_grad():
        projected.quantizer.projection.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    projected.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"projection.weight must hold finite real numbers. Save the head again"):
        Head.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 7.0), ("relocation_threshold", -1.0), ("load_exponent", float("nan"))]
)
def test_damaged_rates_of_the_prototypes_are_refused(key: str, value: float) -> None:
    from ddcl_lightning import TokenNormalized

    bank = PrototypeBank(4, 6)
    codes = TokenNormalized([bank.prototypes], relocation_threshold=0.5).watch(bank)
    bank(tokens(1)).terms.loss.sum().backward()
    codes.step()
    state = copy.deepcopy(codes.state_dict())
    state["state"][0]["cells"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="'cells' in the state of TokenNormalized must be finite and >= 0; got nan"):
        codes.load_state_dict(state)
    state = codes.state_dict()
    state["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=key):
        codes.load_state_dict(state)


def test_a_checkpoint_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    module, trainer = clustering_module(), quiet_trainer(max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    name = next(name for name, value in module.named_parameters() if value.is_floating_point())
    checkpoint["state_dict"][name].view(-1)[0] = torch.nan
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(
        ValueError, match=f"{re.escape(name)} in a checkpoint must be finite; got NaN or infinity in 1 of"
    ):
        quiet_trainer(max_epochs=2).fit(clustering_module(), loader(), ckpt_path=tmp_path / "damaged.ckpt")
