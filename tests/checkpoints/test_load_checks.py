"""Arguments of ``load_from_checkpoint`` that do not fit: a sentence each, with the argument and the value."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ddcl_lightning import Classification, DDCLReadoutModule, IdentityBackbone, PCABackbone
from ddcl_lightning.cli.commands import main

WORDS = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
WORDS += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"lr_prototypes": "x"}, "lr_prototypes must be a finite number; got 'x'. Pass a number."),
    "a flag for a number": ({"rho": True}, "rho must be a finite number; got True. Pass the number that you mean."),
    "a name for a head": (
        {"head": "DDCLReadout"},
        r"head must be a Head; got 'DDCLReadout'. Make it as for training, head=DDCLReadout\(...\)",
    ),
    "a word that is no schedule": ({"lr_schedule": "fast"}, "got 'fast'"),
    "a number for an optimizer": (
        {"prototype_optimizer": 3},
        "prototype_optimizer must be a string or an Optim.*; got 3",
    ),
    "another size": (
        {"backbone": PCABackbone(64, 8)},
        r"^backbone must be of the model that '.*ckpt' was trained with; got another \(size mismatch for back",
    ),
    "another backbone": ({"backbone": IdentityBackbone(64)}, r"^backbone must be of the model .*\(Unexpected key"),
    "another task": ({"task": Classification(10)}, r"^task must be of the model .*\(Missing key.*task.classifier"),
    "a missing file": ({"hparams_file": "x.yaml"}, "hparams_file must be an existing file; got 'x.yaml'. Correct"),
    "wrong arguments of a class": (
        {"backbone": {"class_path": "PCABackbone", "init_args": {"in_features": "x"}}},
        "^backbone must be what DDCLReadoutModule takes; got others .*in_features.*value: x",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    main(["fit", "--config", "digits", *WORDS, f"--trainer.default_root_dir={folder}", "--summary.enabled=false"])
    return next(folder.rglob("*.ckpt"))


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_does_not_fit_is_one_sentence(name: str, checkpoint: Path) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        DDCLReadoutModule.load_from_checkpoint(checkpoint, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [5, None])
def test_what_is_no_path_is_not_taken_for_a_checkpoint(path: Any) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint_path must be a path, .*; got {path}. Pass the path"):
        DDCLReadoutModule.load_from_checkpoint(path)


def test_arguments_that_fit_take_the_place_of_those_in_the_file(checkpoint: Path) -> None:
    module = DDCLReadoutModule.load_from_checkpoint(checkpoint, rho=0.5, backbone=PCABackbone(64, 16, trainable=True))
    assert module.rho == 0.5
    assert bool(torch.isfinite(module.backbone.weight).all())
