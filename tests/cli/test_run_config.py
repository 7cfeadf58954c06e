"""What `ddcl explain` rebuilds from a checkpoint alone, and what `ddcl fit` says at its end."""

import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, PCABackbone
from ddcl_lightning.cli.commands import main
from ddcl_lightning.cli.run_config import KEY, add_run_config
from ddcl_lightning.datamodules import DigitsDataModule

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FIT = ["fit", "--config", "digits", *QUIET, "--trainer.max_epochs=1", "--summary.enabled=false"]
SHORT = [*QUIET, "--inputs", "2", "--examples", "2", "--max_samples", "300"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--data.init_args.limit=600"])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run's folder, and the working folder."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.delenv("DDCL_TRACEBACK", raising=False)
    return tmp_path / "run"


def checkpoint(folder: Path) -> Path:
    return next(folder.rglob("epoch*.ckpt"))


def without_run(path: Path, **entries: Any) -> None:
    state = torch.load(path, weights_only=True)
    state.pop(KEY, None)
    torch.save({**state, **entries}, path)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    error: str = capsys.readouterr().err
    assert "Traceback" not in error
    return next(line for line in error.splitlines() if line.startswith("error: ")).removeprefix("error: ")


def test_a_checkpoint_alone_gives_the_page_of_its_config(run: Path) -> None:
    path = str(checkpoint(run))
    main(["explain", "--ckpt_path", path, *SHORT, "--output", "alone.html"])
    config = str(next(run.rglob("config.yaml")))
    main(["explain", "--config", config, f"--ckpt_path={path}", *SHORT, "--output", "config.html"])
    assert Path("alone.html").read_bytes() == Path("config.html").read_bytes()
    assert "seen through 512 training samples" in Path("alone.html").read_text(encoding="utf-8")
    assert not Path("checkpoints").exists()


def test_a_checkpoint_that_was_moved_knows_its_data(run: Path) -> None:
    moved = shutil.copy(checkpoint(run), run / "moved.ckpt")
    for config in run.rglob("*.yaml"):
        config.unlink()
    main(["explain", "--ckpt_path", str(moved), *SHORT])
    assert "Digits: 10 prototypes" in Path("report.html").read_text(encoding="utf-8")


def test_the_config_beside_serves_an_older_checkpoint(run: Path) -> None:
    without_run(checkpoint(run))
    main(["explain", "--ckpt_path", str(checkpoint(run)), *SHORT])
    assert "512 training samples" in Path("report.html").read_text(encoding="utf-8")


def test_other_data_and_single_settings_of_data_take_their_place(run: Path) -> None:
    path = str(checkpoint(run))
    settings = yaml.safe_load(add_run_config(["explain", "--ckpt_path", path, "--data", "DigitsDataModule"])[1][9:])
    assert set(settings) == {"model", "seed_everything"}
    main(["explain", "--ckpt_path", path, "--data.init_args.limit=50", *SHORT])
    assert "seen through 50 training samples" in Path("report.html").read_text(encoding="utf-8")
    untouched = ["explain", "--config", "digits", "--ckpt_path", path]
    assert add_run_config(untouched) == untouched
    assert add_run_config(["predict", "--ckpt_path", path]) == ["predict", "--ckpt_path", path]


def test_explain_without_a_checkpoint_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "explain").startswith("ckpt_path is needed: without a checkpoint the prototypes are random.")


def test_data_that_nothing_describes_are_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_run(checkpoint(run))
    for config in run.rglob("config.yaml"):
        config.unlink()
    message = refusal(capsys, "explain", "--ckpt_path", str(checkpoint(run)), *SHORT)
    assert message.startswith("the data of the run that wrote ")
    assert "Pass --data NAME and its arguments, or --config FILE" in message


@pytest.mark.parametrize("place", ["checkpoint", "config"])
def test_a_class_that_is_no_plugin_is_not_imported(run: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (run / "stranger.py").write_text("raise SystemError('it ran')\n")
    sys.path.insert(0, str(run))
    data = {"class_path": "stranger.Data", "init_args": {}}
    try:
        if place == "checkpoint":
            without_run(checkpoint(run), **{KEY: {"data": data}})
        else:
            without_run(checkpoint(run))
            config = next(run.rglob("config.yaml"))
            config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": data}))
        message = refusal(capsys, "explain", "--ckpt_path", str(checkpoint(run)), *SHORT)
    finally:
        sys.path.remove(str(run))
    assert "is refused: its hyperparameters give data = 'stranger.Data'" in message
    assert "stranger" not in sys.modules


def test_a_run_in_python_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = DDCLReadoutModule(PCABackbone(64, 4), DDCLReadout(3), Clustering(10), rho=0.0)
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, datamodule=DigitsDataModule(seed=0))
    trainer.save_checkpoint(tmp_path / "python.ckpt", weights_only=False)
    message = refusal(capsys, "explain", "--ckpt_path", str(tmp_path / "python.ckpt"))
    assert message.startswith("the model in ")
    assert "Pass the --config of the model; in Python, call ddcl_lightning.explain.collect" in message


def test_fit_ends_with_the_checkpoint_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(FIT)
    *_, first, second = capsys.readouterr().out.splitlines()
    path = checkpoint(tmp_path).relative_to(tmp_path)
    assert first == f"Checkpoint: {path}"
    assert second == f"Next: ddcl explain --ckpt_path {path}"
    assert path.is_file()
    main([*second.removeprefix("Next: ddcl ").split(), *SHORT])
    assert Path("report.html").is_file()
    capsys.readouterr()
    main([*FIT, "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"])
    out = capsys.readouterr().out
    assert "Checkpoint:" not in out
    assert "Next:" not in out
