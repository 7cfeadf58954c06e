import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from toys import QUIET, Project, fit

from ddcl_lightning import (
    ConvBackbone,
    ConvDecoder,
    DDCLReadoutModule,
    IdentityBackbone,
    Reconstruction,
    SequenceDecoder,
)
from ddcl_lightning.callbacks import ReconstructionFigures
from ddcl_lightning.callbacks import reconstruction_figures as figures_module
from ddcl_lightning.callbacks.reconstruction_figures import mean_tokens
from ddcl_lightning.heads import MeanPooling, VQPooling

PICTURES = DataLoader([{"x": torch.rand(1, 4, 4)} for _ in range(12)], batch_size=4)
VECTORS = DataLoader([{"x": torch.rand(3, 4)} for _ in range(12)], batch_size=4)
KINDS = ("atoms_codebook", "codes_codebook", "codes_history", "images")


def autoencoder(head=None):
    return DDCLReadoutModule(
        ConvBackbone(1, 3, (4,)), head or VQPooling(5), Reconstruction(ConvDecoder(1, (4,)), quantization_weight=0.0)
    )


def run(callback, folder, module=None, data=PICTURES, **kwargs):
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = pl.Trainer(
        callbacks=[callback],
        **{**QUIET, "max_epochs": 1, "num_sanity_val_steps": 1, "default_root_dir": folder, **kwargs},
    )
    trainer.fit(module or autoencoder(), PICTURES if data is None else data, data, ckpt_path=ckpt_path)
    return trainer


def names(folder):
    return sorted(path.name for path in folder.glob("**/*.png"))


def expected(*steps, kinds=KINDS):
    return sorted(f"{kind}-step={step:06d}.png" for kind in kinds for step in steps)


def test_files_at_every_interval_and_at_the_end(tmp_path):
    run(ReconstructionFigures(every_n_epochs=2), tmp_path, max_epochs=3)
    assert names(tmp_path / "figures") == expected(6, 9)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("figures/*.png"))


def test_tensorboard_gets_them_instead(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    run(ReconstructionFigures(), tmp_path, logger=logger, log_every_n_steps=1)
    assert names(tmp_path) == []
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == sorted(kind.replace("_", "/") for kind in KINDS)


def test_what_does_not_exist_is_not_drawn(tmp_path):
    run(ReconstructionFigures(), tmp_path / "plain", autoencoder(MeanPooling()))
    assert names(tmp_path / "plain") == expected(3, kinds=["images"])
    task = Reconstruction(SequenceDecoder(4), quantization_weight=0.0)
    vectors = DDCLReadoutModule(IdentityBackbone(4), VQPooling(5), task)
    run(ReconstructionFigures(), tmp_path / "vectors", vectors, VECTORS)
    assert names(tmp_path / "vectors") == expected(3, kinds=["codes_codebook", "codes_history"])
    run(ReconstructionFigures(), tmp_path / "blind", data=None)
    assert names(tmp_path / "blind") == []


def test_figures_show_the_same_images_and_the_counts_of_the_whole_set(tmp_path, monkeypatch):
    shown, counted = [], []
    real_images, real_usage = figures_module.draw_images, figures_module.draw_usage
    monkeypatch.setattr(
        figures_module, "draw_images", lambda originals, *rest: shown.append(originals) or real_images(originals, *rest)
    )
    monkeypatch.setattr(
        figures_module,
        "draw_usage",
        lambda counts, *rest, **kw: counted.append(counts) or real_usage(counts, *rest, **kw),
    )
    module = autoencoder()
    trainer = run(ReconstructionFigures(every_n_epochs=1, num_images=3), tmp_path, module, max_epochs=2)
    first = next(iter(PICTURES))["x"][:3]
    assert len(shown) == 2
    assert all(torch.equal(images, first) for images in shown)
    assert [int(counts.sum()) for counts in counted] == [12 * 4, 12 * 4]  # 2 x 2 tokens
    usage = float((counted[-1] > 0).float().mean())
    assert float(trainer.callback_metrics["val/usage"]) == pytest.approx(usage)
    assert module.training


def test_atoms_of_straight_through_codes_are_the_codes():
    head = VQPooling(6, embed_dim=3).eval()
    torch.nn.init.normal_(head.quantizer.codebook)
    tokens, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.3
    mask[:, 0] = True
    with torch.no_grad():
        readout = head(tokens, mask)
    vectors, counts = mean_tokens(readout.tokens, readout.codes[..., 0], 6)
    assert torch.equal(counts, torch.bincount(readout.codes[mask].flatten(), minlength=6))
    used = counts > 0
    torch.testing.assert_close(vectors[used], head.quantizer.codebook.detach()[used])
    assert bool((vectors[~used] == 0).all())


def test_curves_survive_a_restart_and_not_another_run(tmp_path):
    callback = ReconstructionFigures()
    run(callback, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
    assert [point["step"] for point in callback.state_dict()["history"]] == [3.0]
    assert set(callback.state_dict()["history"][0]) == {"step", "mse", "psnr", "usage", "perplexity"}
    again = ReconstructionFigures()
    run(again, tmp_path, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert [point["step"] for point in again.state_dict()["history"]] == [3.0, 6.0]
    run(again, tmp_path)
    assert [point["step"] for point in again.state_dict()["history"]] == [3.0]


def test_curves_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_module, "MAX_POINTS", 3)
    callback = ReconstructionFigures(every_n_epochs=100)
    run(callback, tmp_path, max_epochs=6)
    steps = [point["step"] for point in callback.state_dict()["history"]]
    assert len(steps) <= 3
    assert steps[0] == 3


def test_reconstruction_figures_refuse_sizes_of_zero_and_other_tasks():
    for name in ("every_n_epochs", "num_images"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            ReconstructionFigures(**{name: 0})
    with pytest.raises(ValueError, match=r"whose task is Reconstruction; got Project with task NoneType. Remove"):
        fit(Project(), ReconstructionFigures())
