"""What a command writes beside its results, where there is no room for it: one sentence, and nothing torn."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ddcl_lightning.cli.commands import main
from tests.cli.test_cli import QUICK, fails
from tests.utils.test_files import full_disk

BARE = [*QUICK, "--trainer.callbacks=null", "--summary.enabled=false", "--trainer.enable_checkpointing=false"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_config_of_a_run_is_written_whole_and_runs_again(tmp_path: Path) -> None:
    main(["fit", "--config", "digits", *BARE, "--trainer.fast_dev_run=false"])
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["model"]["head"]["init_args"]["num_prototypes"] == 10
    assert [path.name for path in saved.parent.iterdir() if "part" in path.name] == []
    main(["fit", "--config", str(saved)])
    again = tmp_path / "lightning_logs" / "version_1" / "config.yaml"
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(saved.read_text())


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_hyperparameters_are_written_whole(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = yaml.dump

    def stops(values: Any, stream: Any = None, **options: Any) -> Any:
        if stream is None:  # a trial of one value
            return dump(values, **options)
        stream.write("rho: ")
        stream.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning.pytorch.core.saving.yaml.dump", stops)
    monkeypatch.setattr("lightning.pytorch.core.saving._OMEGACONF_AVAILABLE", False)
    words = [*BARE, f"--trainer.logger={logger}", f"--trainer.logger.save_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "digits", *words])
    assert not list(tmp_path.rglob("*hparams*"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "digits", *words, "--trainer.fast_dev_run=false"])
    (saved,) = tmp_path.rglob("hparams.yaml")
    assert yaml.safe_load(saved.read_text())["rho"] == 0.01


def test_a_config_for_which_there_is_no_room_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(1024):
        line = fails(capsys, "fit", "--config", "digits", *QUICK)
    assert "config.yaml' cannot be written (File too large); what was there before is as it was. Make room" in line
    assert not list(tmp_path.rglob("*.yaml"))


def test_events_for_which_there_is_no_room_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "digits", *BARE, "--trainer.log_every_n_steps=1"]
    with full_disk(3072), pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == [
        "error: the events of TensorBoard cannot be written (File too large). Make room, choose another place "
        "(--trainer.default_root_dir), or pass --trainer.logger false."
    ]
