"""Soft codes as a head: what the readout holds, and training, resuming and saving with the token-normalized step."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import quiet_trainer
from torch import Tensor

from ddcl_lightning import ConvBackbone, ConvDecoder, DDCLReadoutModule, Head, OptimizerConfig, Reconstruction
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.heads import SoftVQ
from ddcl_lightning.nn.scaling import ScaleMode
from ddcl_lightning.optim.token_normalized import TokenNormalized


def prepared(**options: Any) -> tuple[SoftVQ, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()
    return SoftVQ(**{"num_codes": 4, "embed_dim": 6, **options}), torch.randn(3, 5, 6), mask


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("code_dim", [None, 2])
def test_evaluation_by_hand(heads: int, code_dim: int | None) -> None:
    head, tokens, mask = prepared(num_heads=heads, code_dim=code_dim)
    readout = head.eval()(tokens.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    assert readout.codes.shape == (3, 5, head.num_codebooks)
    assert bool((readout.codes[~mask] == -1).all())
    indices = readout.codes.clamp(min=0)
    decoded = head.quantizer.decode(indices.squeeze(-1))
    torch.testing.assert_close(readout.tokens[mask], decoded[mask])
    assert not readout.tokens[~mask].any()
    for i in range(3):
        torch.testing.assert_close(readout.pooled[i], decoded[i, mask[i]].mean(0))
        for h in range(heads):
            counts = torch.bincount(readout.codes[i, mask[i], h], minlength=4)
            torch.testing.assert_close(readout.assignments[i, h], counts / counts.sum())
    assert readout.loss_terms == []


def test_training_gives_the_loss_and_its_signals() -> None:
    head, tokens, mask = prepared(code_dim=2)
    readout = head(tokens, mask)
    assert readout.assignments is None
    assert readout.regularization.requires_grad
    assert set(readout.signals) == {"code_entropy", "code_gap"}
    assert [tuple(p.shape) for p in head.prototype_parameters()] == [(1, 4, 2)]
    assert len(head.embedding_parameters()) == 2


def module(**head: Any) -> DDCLReadoutModule:
    return DDCLReadoutModule(
        ConvBackbone(1, 8, (8,)),
        SoftVQ(**{"num_codes": 12, "commitment_weight": 0.03, **head}),
        Reconstruction(ConvDecoder(1, (8,))),
        prototype_optimizer=OptimizerConfig("TokenNormalized", {"relocation_threshold": 0.9}),
        lr_prototypes=0.1,
        rho=0.05,
        lr_task=5e-3,
    )


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=64, val_fraction=0.2, as_images=True, limit=400, seed=0)


def fit(model: DDCLReadoutModule, **options: Any) -> pl.Trainer:
    callbacks = [
        TemperatureAnnealing(start=0.05, end=0.0005),
        KMeansInitialization(num_restarts=1, progress=False),
        DecompositionCheck(every_n_batches=1),
        *options.pop("callbacks", []),
    ]
    resume = options.pop("ckpt_path", None)
    trainer = quiet_trainer(**{"max_epochs": 4, "callbacks": callbacks, "num_sanity_val_steps": 0, **options})
    trainer.fit(model, datamodule=data(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("scale", ["none", "per_dimension"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_code_is_used_and_hard_codes_reconstruct(precision: Any, scale: ScaleMode) -> None:
    pl.seed_everything(0, verbose=False)
    model = module(num_heads=2, embedding_scale=scale)
    trainer = fit(model, precision=precision)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["train/usage"] == metrics["val/usage"] == 1.0
    assert metrics["val/perplexity"] > 8  # of 12, per codebook
    assert metrics["train/code_gap"] < 0.02
    # Hard codes in validation lose little against soft ones in training, and both beat the mean image by far.
    assert metrics["val/mse"] < 0.06
    assert abs(metrics["val/mse"] - metrics["train/reconstruction"]) < 0.02
    checks = next(callback for callback in trainer.callbacks if isinstance(callback, DecompositionCheck))
    assert checks.checks > 20
    assert checks.violations == 0
    optimizers = trainer.optimizers
    assert isinstance(optimizers[0], TokenNormalized)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("scale", ["none", "per_dimension"])
def test_resuming_in_the_middle_of_an_epoch_is_exact(tmp_path: Path, scale: ScaleMode) -> None:
    pl.seed_everything(0, verbose=False)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = module(embedding_scale=scale)
    fit(whole, callbacks=[saving], enable_checkpointing=True, max_epochs=2)
    pl.seed_everything(1, verbose=False)
    resumed = module(embedding_scale=scale)
    fit(resumed, ckpt_path=tmp_path / "step=3.ckpt", max_epochs=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_saved_heads_give_the_same_codes(tmp_path: Path) -> None:
    head, tokens, _ = prepared(num_heads=2, code_dim=2, gradient="soft", embedding_scale="per_dimension")
    head(tokens)  # the temperature has followed the tokens
    head.eval().save_pretrained(tmp_path)
    loaded = Head.from_pretrained(tmp_path)
    assert isinstance(loaded, SoftVQ)
    assert loaded.gradient == "soft"
    assert torch.equal(loaded(tokens).codes, head(tokens).codes)
    torch.testing.assert_close(loaded.quantizer.bank.temperature, head.quantizer.bank.temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1; got 0"),
        ({"gradient": "hard"}, "gradient must be one of"),
        ({"num_heads": 4}, "dim must be divisible by num_heads; got 6 and 4"),
        ({"temperature": -1.0}, "a temperature must be > 0, one number or one per head; got -1.0"),
        ({"embedding_scale": "batch"}, "embedding_scale must be one of"),
    ],
)
def test_soft_vq_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(**options)
    if "num_heads" not in options:
        with pytest.raises(ValueError, match=message):
            SoftVQ(**{"num_codes": 4, **options})
