"""Everything that can be plugged in, from somebody else's package: named in YAML and nowhere else."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from registry import PLUGIN, classes

from ddcl_lightning import Backbone, DDCLReadoutModule, Decoder, Head, Quantizer, Signal, SplitDataModule, Task
from ddcl_lightning.cli.commands import main

FOLDER = Path(__file__).parent / "plugin" / PLUGIN
TRAINER = """
trainer:
  accelerator: cpu
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
"""
PROTOTYPES = f"""
model:
  backbone: {{class_path: {PLUGIN}.Strips, init_args: {{embed_dim: 10}}}}
  head: {{class_path: {PLUGIN}.FurthestToken, init_args: {{num_prototypes: 5}}}}
  task: {{class_path: {PLUGIN}.DigitRegression}}
data: {{class_path: {PLUGIN}.StripedDataModule}}
{TRAINER}
  callbacks:
    - class_path: ddcl_lightning.callbacks.TemperatureAnnealing
    - class_path: ddcl_lightning.callbacks.KMeansInitialization
    - class_path: ddcl_lightning.callbacks.DecompositionCheck
    - class_path: ddcl_lightning.callbacks.CollapseWarning
      init_args:
        every_n_batches: 1
        additional: [{{class_path: {PLUGIN}.LargestShare, init_args: {{limit: 0.1}}}}]
"""
AUTOENCODER = f"""
model:
  backbone: {{class_path: {PLUGIN}.Strips, init_args: {{embed_dim: 10}}}}
  head:
    class_path: ddcl_lightning.QuantizerReadout
    init_args:
      quantizer: {{class_path: {PLUGIN}.SignQuantizer, init_args: {{dim: 10, num_codebooks: 4}}}}
  task:
    class_path: ddcl_lightning.Reconstruction
    init_args:
      decoder: {{class_path: {PLUGIN}.StripDecoder}}
  rho: 0.1
data: {{class_path: {PLUGIN}.StripedDataModule, init_args: {{val_fraction: 0.3}}}}
{TRAINER}
"""
POOLING = f"""
model:
  backbone: {{class_path: {PLUGIN}.Strips}}
  head: {{class_path: {PLUGIN}.NormPooling, init_args: {{max_parameters: 300}}}}
  task: {{class_path: ddcl_lightning.Classification, init_args: {{num_classes: 5, quantization_weight: 0.0}}}}
data: {{class_path: {PLUGIN}.StripedDataModule}}
{TRAINER}
"""


def test_each_plug_in_is_one_file() -> None:
    """A file of its own that imports nothing of the package but names that it exports."""
    for base in (Backbone, Decoder, Head, Quantizer, Signal, SplitDataModule, Task):
        ours = [kind for kind in classes(base) if kind.__module__.startswith(PLUGIN)]
        assert ours, f"no {base.__name__} in the plug-in"
        for kind in ours:
            text = (FOLDER / f"{kind.__module__.split('.')[1]}.py").read_text(encoding="utf-8")
            assert text.count("\nclass ") == 1
            assert "ddcl_lightning." not in text


def fitted(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DDCLReadoutModule, Path]:
    monkeypatch.chdir(folder)
    (folder / "mine.yaml").write_text(recipe, encoding="utf-8")
    main(["fit", "--config", "mine.yaml"])
    checkpoint = next(folder.rglob("*.ckpt"))
    return DDCLReadoutModule.load_from_checkpoint(checkpoint, weights_only=True), checkpoint


def test_prototypes_a_task_and_a_metric_are_trained_watched_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, checkpoint = fitted(PROTOTYPES, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    (health,) = [line for line in printed.splitlines() if line.startswith("health of head.bank: ")]
    assert "largest_share at step 3" in health
    assert "prototypes (last step)" in printed
    assert " 0 violations" in printed
    plugin = sys.modules[PLUGIN]
    assert isinstance(module.backbone, plugin.Strips)
    assert bool(module.backbone.mean.any())  # it was prepared, and that was saved
    assert isinstance(module.task, plugin.DigitRegression)
    assert bool(module.head.bank.initialized)
    assert module.head.bank.prototypes.shape == (1, 5, 10)
    groups = {name: sum(p.numel() for p in group) for name, group in module.parameter_groups().items()}
    assert groups == {"prototypes": 50, "encoder": 90, "task": 11}
    assert torch.isfinite(module.head.bank.prototypes).all()

    main(["validate", "--config", "mine.yaml", "--ckpt_path", str(checkpoint)])
    printed = capsys.readouterr().out
    assert "val/mean_absolute_error" in printed
    assert "val/within_one" in printed
    main(["predict", "--config", "mine.yaml", "--ckpt_path", str(checkpoint)])
    rows = (tmp_path / "assignments.csv").read_text().splitlines()
    assert len(rows) == 301
    assert "number" in rows[0].split(",")


def test_a_quantizer_and_a_decoder_make_an_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, checkpoint = fitted(AUTOENCODER, tmp_path, monkeypatch)
    capsys.readouterr()
    assert isinstance(module.head.quantizer, sys.modules[PLUGIN].SignQuantizer)
    assert isinstance(module.task.decoder, sys.modules[PLUGIN].StripDecoder)
    main(["validate", "--config", "mine.yaml", "--ckpt_path", str(checkpoint)])
    printed = capsys.readouterr().out
    assert "val/mse" in printed
    assert "val/codebook3_usage" in printed


def test_a_pooling_head_keeps_to_its_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = fitted(POOLING, tmp_path, monkeypatch)
    assert isinstance(module.head, sys.modules[PLUGIN].NormPooling)
    assert module.head.num_parameters() == 286 == 11 * 2 * (12 + 1)
