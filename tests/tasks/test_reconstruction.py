"""Autoencoders of images and sequences through any head."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ddcl_lightning import (
    ConvBackbone,
    ConvDecoder,
    DDCLReadout,
    DDCLReadoutModule,
    IdentityBackbone,
    ReadoutOutput,
    Reconstruction,
    SequenceDecoder,
)
from ddcl_lightning.heads import CLSPooling, Head, MeanPooling, VQPooling

HEADS = {
    "prototypes": lambda: DDCLReadout(5),
    "residual": lambda: DDCLReadout(5, num_heads=2, residual=True),
    "codes": lambda: VQPooling(5, code_dim=3),
    "none": MeanPooling,
}


class Pictures(DataLoader[dict[str, Tensor]]):
    """Bars of 8 x 8 pixels, as dict batches."""

    def __init__(self, size: int = 24, batch_size: int = 8, pixels: int = 8, as_bytes: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.zeros(size, 1, pixels, pixels)
        for image in x:
            image[0, :, int(torch.randint(pixels, (), generator=generator))] = 1
        x = (x * 255).byte() if as_bytes else x
        super().__init__([{"x": image} for image in x], batch_size=batch_size)  # type: ignore[arg-type]


def autoencoder(head: Head | None = None, task: Reconstruction | None = None, **kwargs: Any) -> DDCLReadoutModule:
    torch.manual_seed(0)
    task = task or Reconstruction(ConvDecoder(1, (4,)))
    return DDCLReadoutModule(ConvBackbone(1, 6, (4,)), head or VQPooling(5), task, **kwargs)


def sequences() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(4, 3, 6, generator=generator), "other": torch.randn(4, 3, 2, generator=generator)}
    return batch | {"mask": torch.tensor([[True, True, False], [True] * 3, [False, True, True], [True] * 3])}


def sequence_module(target: str = "tokens", out_dim: int = 6, head: Head | None = None) -> DDCLReadoutModule:
    task = Reconstruction(SequenceDecoder(out_dim, 8), quantization_weight=0.0, target=target)
    return DDCLReadoutModule(IdentityBackbone(6), head or VQPooling(5), task)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("name", HEADS)
def test_loss_by_hand(name: str, weight: float) -> None:
    module = autoencoder(HEADS[name](), Reconstruction(ConvDecoder(1, (4,)), weight))
    batch = next(iter(Pictures()))
    readout = module(batch)
    losses = module.task.losses(readout, batch)
    expected = (module.task.decoder(readout.tokens) - batch["x"]).square().mean()
    torch.testing.assert_close(losses["reconstruction"], expected)
    if name in ("prototypes", "residual") and weight:
        terms = readout.loss_terms[0]
        torch.testing.assert_close(losses["quantization"], (terms.ols + terms.variance).sum())
        expected = expected + weight * losses["quantization"]
    if name == "codes":
        expected = expected + readout.regularization
    torch.testing.assert_close(losses["loss"], expected)
    beside = {"quantization"} if readout.loss_terms and weight else {"regularization"} if name == "codes" else set()
    assert set(losses) == {"loss", "reconstruction"} | beside


def test_l1_loss_is_the_mean_absolute_error() -> None:
    module, batch = autoencoder(task=Reconstruction(ConvDecoder(1, (4,)), loss="l1")), next(iter(Pictures()))
    readout = module(batch)
    expected = (module.task.decoder(readout.tokens) - batch["x"]).abs().mean()
    torch.testing.assert_close(module.task.losses(readout, batch)["reconstruction"], expected)


def test_bytes_are_scaled() -> None:
    module = autoencoder()
    plain, raw = next(iter(Pictures())), next(iter(Pictures(as_bytes=True)))
    assert raw["x"].dtype == torch.uint8
    torch.testing.assert_close(module.task.losses(module(raw), raw), module.task.losses(module(plain), plain))


def test_flat_rows_take_the_shape_of_what_is_decoded() -> None:
    module, batch = autoencoder(), next(iter(Pictures()))
    flat = {"x": batch["x"].flatten(1)}
    torch.testing.assert_close(module.task.losses(module(flat), flat), module.task.losses(module(batch), batch))
    rows = {"x": torch.randn(4, 6)}
    module = sequence_module("x")
    expected = (module.task.decoder(module(rows).tokens)[:, 0] - rows["x"]).square().mean()
    torch.testing.assert_close(module.task.losses(module(rows), rows)["reconstruction"], expected)


def test_the_module_keeps_what_the_head_has_read() -> None:
    module, batch = sequence_module(), sequences()
    readout = module(batch)
    assert torch.equal(readout.inputs, batch["x"])
    assert readout.mask is batch["mask"]
    bare = module.head(batch["x"], batch["mask"])
    assert bare.inputs is bare.mask is None
    assert torch.equal(bare.tokens, readout.tokens)


@pytest.mark.parametrize(("target", "key"), [("tokens", "x"), ("x", "x"), ("other", "other")])
def test_sequences_come_back_without_their_padding(target: str, key: str) -> None:
    batch = sequences()
    module = sequence_module(target, batch[key].shape[-1])
    readout, mask = module(batch), batch["mask"]
    difference = module.task.decoder(readout.tokens, mask) - batch[key]
    losses = module.task.losses(readout, batch)
    torch.testing.assert_close(losses["reconstruction"], difference[mask].square().mean())
    expected = [float(d[m].square().mean()) for d, m in zip(difference.detach(), mask, strict=True)]
    assert module.task.predict(readout, batch)["mse"].tolist() == pytest.approx(expected)
    metrics = module.task.metrics()
    module.eval()
    module.task.update_metrics(metrics, module(batch), batch)
    figures = metrics[""].compute()
    torch.testing.assert_close(figures["mse"], difference[mask].square().mean())
    assert bool(figures["psnr"].isnan())
    counted = torch.bincount(readout.codes[mask].flatten(), minlength=5)
    assert float(figures["usage"]) == pytest.approx(float((counted > 0).float().mean()))


def test_metrics_by_hand() -> None:
    module, batch = autoencoder().eval(), next(iter(Pictures()))
    metrics = module.task.metrics()
    readout = module(batch)
    module.task.update_metrics(metrics, readout, batch)
    figures = {name: float(value) for name, value in metrics[""].compute().items()}
    mse = float((module.task.decoder(readout.tokens) - batch["x"]).detach().square().mean())
    shares = torch.bincount(readout.codes.flatten(), minlength=5) / readout.codes.numel()
    entropy = float(torch.special.entr(shares).sum())
    assert figures["mse"] == pytest.approx(mse)
    assert figures["psnr"] == pytest.approx(-10 * math.log10(mse))
    assert math.isnan(figures["ssim"])  # 8 x 8 pixels
    assert figures["usage"] == pytest.approx(float((shares > 0).float().mean()))
    assert figures["perplexity"] == pytest.approx(figures["soft_perplexity"]) == pytest.approx(math.exp(entropy))


def test_ssim_of_images_that_are_large_enough() -> None:
    module, batch = autoencoder().eval(), next(iter(Pictures(pixels=12)))
    metrics = module.task.metrics()
    module.task.update_metrics(metrics, module(batch), batch)
    assert -1 <= float(metrics[""].compute()["ssim"]) < 1


@pytest.mark.parametrize("name", HEADS)
def test_everything_trains_and_is_logged(name: str) -> None:
    module = autoencoder(HEADS[name]())
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, Pictures(), Pictures())
    assert [key for key, value in module.named_parameters() if torch.equal(value, before[key])] == []
    logged = trainer.callback_metrics
    assert {"val/mse", "val/psnr", "val/reconstruction"} <= set(logged)
    assert float(logged["val/mse"]) == pytest.approx(float(logged["val/reconstruction"]), rel=1e-5)
    codes = {f"{stage}/{figure}" for stage in ("train", "val") for figure in ("usage", "perplexity")}
    assert (codes <= set(logged)) == (name == "codes")
    assert "train/soft_perplexity" not in logged
    assert "val/ssim" not in logged


def test_the_codes_of_training_are_counted_over_one_epoch() -> None:
    module = autoencoder(lr_prototypes=1e-12, lr_task=1e-12)  # nothing moves
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, Pictures(), Pictures())
    logged = trainer.callback_metrics
    for figure in ("usage", "perplexity"):
        assert float(logged[f"train/{figure}"]) == pytest.approx(float(logged[f"val/{figure}"]))
    assert not any(metric.counts.any() for metric in module.stage_metrics["train_metrics"].values())


def test_a_trained_autoencoder_is_better_than_the_mean_image() -> None:
    module = autoencoder(VQPooling(12, init="kmeans"), lr_prototypes=0.02, rho=0.5, lr_task=0.01)
    trainer = quiet_trainer(max_epochs=40)
    trainer.fit(module, Pictures(), Pictures())
    x = torch.cat([batch["x"] for batch in Pictures()])
    assert float(trainer.callback_metrics["val/mse"]) < 0.3 * float(x.var(0, unbiased=False).mean())


@pytest.mark.parametrize("name", HEADS)
def test_autoencoders_train_in_bf16_mixed(name: str) -> None:
    module, trainer = autoencoder(HEADS[name]()), quiet_trainer(max_epochs=2, precision="bf16-mixed")
    trainer.fit(module, Pictures(), Pictures())
    assert math.isfinite(trainer.callback_metrics["val/loss"])
    batch = next(iter(Pictures()))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.task.decode(module(batch).tokens).dtype == torch.float32


def test_loads_from_a_checkpoint(tmp_path: Path) -> None:
    module, trainer = autoencoder(), quiet_trainer(max_epochs=1)
    trainer.fit(module, Pictures(), Pictures())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    modules = {"backbone": ConvBackbone(1, 6, (4,)), "head": VQPooling(5)}
    loaded = DDCLReadoutModule.load_from_checkpoint(
        tmp_path / "last.ckpt", weights_only=True, task=Reconstruction(ConvDecoder(1, (4,))), **modules
    )
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())


def test_a_run_resumed_at_the_very_end_of_an_epoch(tmp_path: Path) -> None:
    """It finishes an epoch of which it has seen nothing, and ends as the uninterrupted run."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(folder: str, resume: Path | None = None) -> tuple[DDCLReadoutModule, dict[str, Tensor]]:
        saver = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        module, trainer = autoencoder(), quiet_trainer(max_epochs=2, callbacks=[saver], enable_checkpointing=True)
        trainer.fit(module, Pictures(), Pictures(), ckpt_path=resume)
        return module, dict(trainer.callback_metrics)

    whole, logged = run("whole")
    resumed, again = run("resumed", tmp_path / "whole" / "step=3.ckpt")  # the third of three batches
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert again == logged


class OnlyInEvaluation(VQPooling):
    """Finds codes only where somebody asks for them, or not even then."""

    silent = False

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        readout = super().forward(tokens, mask)
        return replace(readout, codes=None) if self.training or self.silent else readout


def test_a_head_may_give_codes_in_evaluation_only() -> None:
    module, trainer = autoencoder(OnlyInEvaluation(5)), quiet_trainer(max_epochs=1)
    trainer.fit(module, Pictures(), Pictures())
    assert "val/usage" in trainer.callback_metrics
    assert "train/usage" not in trainer.callback_metrics
    module.head.silent = True
    batch = next(iter(Pictures()))
    with pytest.raises(ValueError, match=r"num_codes = 5 must give the codes .* got None in ReadoutOutput.codes. Fill"):
        module.eval().task.update_metrics(module.task.metrics(), module(batch), batch)


class Undersized(MeanPooling):
    """Says nothing of its tokens' dimension."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        return ReadoutOutput(tokens[..., :2], tokens.mean(1))


def test_reconstruction_refuses_batches_and_heads_that_cannot_come_back() -> None:
    batch = sequences()
    module = sequence_module()
    with pytest.raises(ValueError, match=r"needs the readout's inputs; got None. Call the module"):
        module.task.losses(module.head(batch["x"]), batch)
    trained = DDCLReadoutModule(ConvBackbone(1, 6, (4,)), VQPooling(5), module.task)
    pictures = next(iter(Pictures()))
    with pytest.raises(ValueError, match=r"needs a frozen encoder; got one that is trained.*Set rho=0"):
        trained.task.losses(trained(pictures), pictures)
    for key, kind in (("nothing", "NoneType"), ("mask", "torch.bool")):
        module = sequence_module(key)
        with pytest.raises(TypeError, match=f"target '{key}' as a tensor of floating-point .*; got {kind}"):
            module.task.losses(module(batch), batch)
    module = sequence_module("other")
    with pytest.raises(ValueError, match=r"shape of the target 'other', \(4, 3, 2\); got \(4, 3, 6\)"):
        module.task.losses(module(batch), batch)
    module = sequence_module(head=Undersized())
    with pytest.raises(ValueError, match=r"token_dim = 6\) .*got \(4, 3, 2\).*must say so in its token_dim"):
        module.task.losses(module(batch), batch)
    with pytest.raises(RuntimeError, match=r"CLSPooling is not built, so token_dim is unknown. Call build"):
        Reconstruction(SequenceDecoder(3)).build(CLSPooling())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization_weight": -0.1}, "quantization_weight must be >= 0; got -0.1"),
        ({"loss": "l2"}, "loss must be one of .*got 'l2'"),
        ({"data_range": 0.0}, "data_range must be > 0; got 0.0"),
    ],
)
def test_reconstruction_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reconstruction(ConvDecoder(1), **options)
