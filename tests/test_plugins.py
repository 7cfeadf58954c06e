"""A backbone, a head and a task of somebody else's package, named in YAML and nowhere else."""

import sys
from pathlib import Path

import pytest
import torch

from ddcl_lightning import DDCLReadoutModule
from ddcl_lightning.cli.commands import main

RECIPE = """
model:
  backbone: {class_path: acme_readouts.Strips, init_args: {embed_dim: 10}}
  head: {class_path: acme_readouts.FurthestToken, init_args: {num_prototypes: 5}}
  task: {class_path: acme_readouts.DigitRegression}
data: {class_path: ddcl_lightning.datamodules.DigitsDataModule, init_args: {val_fraction: 0.2}}
trainer:
  accelerator: cpu
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: ddcl_lightning.callbacks.TemperatureAnnealing
    - class_path: ddcl_lightning.callbacks.KMeansInitialization
    - class_path: ddcl_lightning.callbacks.DecompositionCheck
    - class_path: ddcl_lightning.callbacks.CollapseWarning
"""


def test_classes_of_another_package_are_trained_watched_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "plugin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    main(["fit", "--config", "mine.yaml"])
    printed = capsys.readouterr().out
    assert "prototypes (last step)" in printed
    assert " 0 violations" in printed

    checkpoint = next(tmp_path.rglob("*.ckpt"))
    module = DDCLReadoutModule.load_from_checkpoint(checkpoint, weights_only=True)
    plugin = sys.modules["acme_readouts"]
    assert isinstance(module.backbone, plugin.Strips)
    assert isinstance(module.task, plugin.DigitRegression)
    assert bool(module.head.bank.initialized)
    assert module.head.bank.prototypes.shape == (1, 5, 10)
    groups = {name: sum(p.numel() for p in group) for name, group in module.parameter_groups().items()}
    assert groups == {"prototypes": 50, "encoder": 90, "task": 11}

    main(["validate", "--config", "mine.yaml", "--ckpt_path", str(checkpoint)])
    assert "val/mean_absolute_error" in capsys.readouterr().out
    main(["predict", "--config", "mine.yaml", "--ckpt_path", str(checkpoint)])
    assert len((tmp_path / "assignments.csv").read_text().splitlines()) == 1798
    assert torch.isfinite(module.head.bank.prototypes).all()
