"""A checkpoint and a head's files run nothing: no pickle, and no module that is named in them alone."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, IdentityBackbone, PCABackbone
from ddcl_lightning.checkpoints import trust
from ddcl_lightning.checkpoints.trust import UntrustedName, check_hyper_parameters
from ddcl_lightning.cli.commands import main
from ddcl_lightning.heads import Head

EVIL = "canary_module.Thing"
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the command line."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", "digits", *QUICK])
    return next(folder.rglob("*.ckpt"))


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules in the current folder that write a file when they are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sang = tmp_path / "sang"
    code = f"from pathlib import Path\nPath({str(sang)!r}).touch()\nimport torch\nfrom ddcl_lightning import *\n"
    code += "class Thing(IdentityBackbone):\n    pass\nclass Steps(torch.optim.SGD):\n    pass\ndef f(*a): pass\n"
    (tmp_path / "canary_module.py").write_text(code, encoding="utf-8")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "deep.py").write_text(code, encoding="utf-8")
    (tmp_path / "settings.yaml").write_text(f"class_path: {EVIL}\n", encoding="utf-8")
    (tmp_path / "Settings").write_text(f"class_path: {EVIL}\n", encoding="utf-8")
    yield sang  # type: ignore[misc]
    for name in ("canary_module", "nested.deep", "nested"):
        sys.modules.pop(name, None)


SPEC = {"class_path": EVIL, "init_args": {"in_features": 64}}
RECONSTRUCTION = "ddcl_lightning.tasks.Reconstruction"
ATTACKS: dict[str, dict[str, Any]] = {
    "backbone": {"backbone": SPEC},
    "head": {"head": {"class_path": EVIL}},
    "task": {"task": {"class_path": EVIL}},
    "nested package": {"backbone": {"class_path": "nested.deep.Thing"}},
    "function": {"backbone": {"class_path": "canary_module.f"}},
    "text": {"backbone": EVIL},
    "text in YAML": {"backbone": f"{{class_path: {EVIL}}}"},
    "file of settings": {"backbone": "settings.yaml"},
    "file without an end": {"backbone": "Settings"},
    "inner class": {"task": {"class_path": RECONSTRUCTION, "init_args": {"decoder": {"class_path": EVIL}}}},
    "inner text": {"task": {"class_path": RECONSTRUCTION, "init_args": {"decoder": EVIL}}},
    "inner key with a dot": {"task": {"class_path": RECONSTRUCTION, "init_args": {"decoder.class_path": EVIL}}},
    "dict_kwargs": {"task": {"class_path": RECONSTRUCTION, "dict_kwargs": {"decoder": {"class_path": EVIL}}}},
    "arguments without a class": {"task": {"init_args": {"decoder": EVIL}}},
    "any value": {"prototype_optimizer": {"args": {"betas": SPEC}}},
    "any value in YAML": {"prototype_optimizer": {"args": {"betas": f'{{"class\\u005fpath": "{EVIL}"}}'}}},
    "a harmful class of the standard library": {
        "prototype_optimizer": {
            "args": {"betas": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "sang"]}}}
        }
    },
    "optimizer": {"encoder_optimizer": "canary_module.Steps"},
    "name of an optimizer": {"encoder_optimizer": {"name": "canary_module.Steps"}},
    "optimizer of the prototypes": {"prototype_optimizer": "nested.deep.Steps"},
    "class of the module": {"_class_path": EVIL},
    "class of the group": {"class_path": EVIL},
    "instantiator": {"_instantiator": "canary_module.f"},
    "list": {"encoder_optimizer": {"name": "Adam", "args": {"betas": [SPEC]}}},
}


def attacked(trained: Path, attack: dict[str, Any], key: str = "hyper_parameters") -> str:
    state = torch.load(trained, weights_only=True)
    state[key] = {**state.pop("hyper_parameters"), **attack}
    torch.save(state, "attacked.ckpt")
    return "attacked.ckpt"


@pytest.mark.parametrize("name", ATTACKS)
def test_a_checkpoint_imports_nothing_under_the_command_line(
    name: str, trained: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = attacked(trained, ATTACKS[name])
    if name == "instantiator":  # LightningCLI drops it
        main(["validate", "--config", "digits", *QUICK, "--ckpt_path", checkpoint])
    else:
        with pytest.raises(SystemExit) as stop:
            main(["validate", "--config", "digits", *QUICK, "--ckpt_path", checkpoint])
        assert stop.value.code == 2
        line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "attacked.ckpt is refused: its hyperparameters give model" in line
        assert "Nothing of it was run" in line
    assert not canary.exists()


@pytest.mark.parametrize("command", ["fit", "test", "predict", "explain"])
def test_every_command_refuses_a_checkpoint_that_names_unknown_classes(
    command: str, trained: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = attacked(trained, ATTACKS["backbone"])
    with pytest.raises(SystemExit):
        main([command, "--config", "digits", *QUICK, "--ckpt_path", checkpoint])
    assert f"model.backbone = '{EVIL}'" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "key"),
    [*((name, "hyper_parameters") for name in ATTACKS), ("backbone", "hparams"), ("optimizer", "module_arguments")],
)
def test_a_checkpoint_imports_nothing_in_python(name: str, key: str, trained: Path, canary: Path) -> None:
    checkpoint = attacked(trained, ATTACKS[name], key)
    if name == "class of the group":
        DDCLReadoutModule.load_from_checkpoint(checkpoint)  # Lightning leaves out what is no argument
    else:
        with pytest.raises(ValueError, match=r"refused|allowlist"):
            DDCLReadoutModule.load_from_checkpoint(checkpoint)
    assert not canary.exists()


def test_an_open_file_is_checked_and_read_from_where_it_was(trained: Path, canary: Path) -> None:
    with open(trained, "rb") as file:
        module = DDCLReadoutModule.load_from_checkpoint(file)
    assert isinstance(module.backbone, PCABackbone)
    with open(attacked(trained, ATTACKS["backbone"]), "rb") as file, pytest.raises(UntrustedName):
        DDCLReadoutModule.load_from_checkpoint(file)
    assert not canary.exists()


class Pickled:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sang").resolve(),))


def test_no_pickle_runs(trained: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.load(trained, weights_only=True)
    torch.save({**state, "extra": Pickled()}, "pickled.ckpt")
    with pytest.raises(ValueError, match="holds Python objects, which run code when they are loaded"):
        DDCLReadoutModule.load_from_checkpoint("pickled.ckpt")
    for command in ("fit", "validate", "test", "predict", "explain"):
        with pytest.raises((SystemExit, Exception)):
            main([command, "--config", "digits", *QUICK, "--ckpt_path", "pickled.ckpt"])
    assert not canary.exists()


def test_what_the_user_names_is_trusted(trained: Path, canary: Path) -> None:
    checkpoint = attacked(trained, {"encoder_optimizer": "canary_module.Steps"})
    main(
        [
            "validate",
            "--config",
            "digits",
            *QUICK,
            "--ckpt_path",
            checkpoint,
            "--model.encoder_optimizer",
            "canary_module.Steps",
        ]
    )
    assert canary.exists()


def test_what_is_imported_is_known(trained: Path) -> None:
    import canary_module  # type: ignore[import-not-found]

    check_hyper_parameters(DDCLReadoutModule, {"backbone": SPEC, "encoder_optimizer": "canary_module.Steps"}, "x")
    with pytest.raises(UntrustedName, match="is no backbone"):
        check_hyper_parameters(DDCLReadoutModule, {"backbone": {"class_path": "canary_module.f"}}, "x")
    assert canary_module.Thing


def test_an_argument_of_the_caller_takes_the_place_of_an_untrusted_one(trained: Path, canary: Path) -> None:
    checkpoint = attacked(trained, {"encoder_optimizer": "canary_module.Steps"})
    module = DDCLReadoutModule.load_from_checkpoint(checkpoint, encoder_optimizer="Adam")
    assert module.encoder_optimizer.optimizer_class is torch.optim.Adam
    assert not canary.exists()


def test_arguments_of_the_caller_are_checked(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no argument 'rhoo'\. Did you mean 'rho'"):
        DDCLReadoutModule.load_from_checkpoint(trained, rhoo=0.1)
    with pytest.raises(ValueError, match="has no argument 'nonsense'"):
        DDCLReadoutModule.load_from_checkpoint(trained, nonsense=3, weights_only=False)
    state = torch.load(trained, weights_only=True)
    torch.save({**state, "hyper_parameters": {"rho": 0.1}}, "of_objects.ckpt")
    expected = r"head, task must be passed: 'of_objects.ckpt'.*load_from_checkpoint\(path, head=\.\.\., task=\.\.\.\)"
    with pytest.raises(ValueError, match=expected):
        DDCLReadoutModule.load_from_checkpoint("of_objects.ckpt", backbone=IdentityBackbone(4))


@pytest.mark.parametrize("command", ["validate", "explain"])
def test_a_command_reads_its_checkpoint_once(command: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, looks = torch.load, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        looks.append(kwargs.get("map_location"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", counted)
    checkpoint = str(shutil.copy(trained, "copy.ckpt"))
    main([command, "--config", "digits", *QUICK[:-1], "--ckpt_path", checkpoint])
    assert looks.count("meta") == 1  # ours; the others are Lightning's
    DDCLReadoutModule.load_from_checkpoint(checkpoint)
    assert looks.count("meta") == 1
    torch.save({"state_dict": {}}, checkpoint)
    with pytest.raises(ValueError, match="holds no"):
        DDCLReadoutModule.load_from_checkpoint(checkpoint)


INSTALLED: dict[str, tuple[dict[str, str], bool]] = {
    "depends": (
        {"METADATA": "Requires-Dist: ddcl_lightning>=0.1 ; extra == 'x'\n", "top_level.txt": "acme_plugin\n"},
        True,
    ),
    "entry point": ({"METADATA": "", "entry_points.txt": "[ddcl_lightning.plugins]\nacme = acme_plugin\n"}, True),
    "unrelated": ({"METADATA": "Requires-Dist: torch\n", "top_level.txt": "acme_plugin\n"}, False),
    "loose file": ({}, False),
}


@pytest.mark.parametrize("name", INSTALLED)
def test_plugins_of_installed_packages_are_known_without_an_import(
    name: str, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, accepted = INSTALLED[name]
    site = tmp_path / "site"
    info = site / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    for file, text in files.items():
        head = "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n" if file == "METADATA" else ""
        (info / file).write_text(head + text, encoding="utf-8")
    (site / "acme_plugin.py").write_text((tmp_path / "canary_module.py").read_text(), encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    given = {"backbone": {"class_path": "acme_plugin.Thing"}}
    try:
        if accepted:
            check_hyper_parameters(DDCLReadoutModule, given, "x")
        else:
            with pytest.raises(UntrustedName):
                check_hyper_parameters(DDCLReadoutModule, given, "x")
        assert canary.exists() is accepted
        # A file in the current folder that takes the name of an installed package is not that package.
        canary.unlink(missing_ok=True)
        sys.modules.pop("acme_plugin", None)
        (tmp_path / "acme_plugin.py").write_text((tmp_path / "canary_module.py").read_text(), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UntrustedName):
            check_hyper_parameters(DDCLReadoutModule, given, "x")
        assert not canary.exists()
    finally:
        sys.modules.pop("acme_plugin", None)


def test_an_optimizer_of_an_installed_plug_in_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(trust, "_depends", lambda module, on: asked.append(on) or False)
    with pytest.raises(UntrustedName, match="depends on ddcl-lightning"):
        check_hyper_parameters(DDCLReadoutModule, {"encoder_optimizer": "acme.Lion"}, "x")
    assert asked == [{"ddcl-lightning"}]


def head_folder(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    DDCLReadout(3, embed_dim=4).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [EVIL, "nested.deep.Thing", "canary_module", "subprocess.Popen"])
def test_the_files_of_a_head_import_nothing(name: str, tmp_path: Path, canary: Path) -> None:
    folder = head_folder(tmp_path / "head", lambda config: config.update({"class": name}))
    with pytest.raises(ValueError, match="is not imported"):
        Head.from_pretrained(folder)
    assert not canary.exists()


def test_settings_given_by_several_values_are_read_and_checked() -> None:
    head = {"class_path": "ddcl_lightning.DDCLReadout", "init_args": {"temperature": {"value": 0.3, "unit": "initial"}}}
    settings = {"lr_schedule": {"shape": "cosine", "warmup_steps": 3}, "head": head}
    settings["encoder_optimizer"] = {"name": "SGD", "args": {"momentum": 0.9}}
    check_hyper_parameters(DDCLReadoutModule, settings, "a file")
    for key, value in (("lr_schedule", {"shape": SPEC}), ("encoder_optimizer", {"name": "a.b"})):
        with pytest.raises(UntrustedName, match=f"model.{key}"):
            check_hyper_parameters(DDCLReadoutModule, {key: value}, "a file")


def test_a_module_given_as_objects_names_nothing(trained: Path) -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(3), Clustering(4))
    check_hyper_parameters(DDCLReadoutModule, dict(module.hparams), "x")
