"""The config that one command wrote serves every other."""

from pathlib import Path

import pytest
import yaml

from ddcl_lightning.cli.commands import SUBCOMMANDS, main

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What ``--print_config`` prints."""
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("reader", SUBCOMMANDS)
@pytest.mark.parametrize("writer", SUBCOMMANDS)
def test_every_command_reads_what_every_other_wrote(
    writer: str, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "written.yaml"
    file.write_text(printed(capsys, writer, "--config", "digits", "--model.rho=0.3"), encoding="utf-8")
    assert yaml.safe_load(file.read_text()).keys() >= {"model", "ckpt_path", "weights_only"}
    read = yaml.safe_load(printed(capsys, reader, "--config", str(file)))
    assert read["model"]["rho"] == 0.3
    assert read == yaml.safe_load(printed(capsys, reader, "--config", "digits", "--model.rho=0.3"))


def test_a_run_is_explained_and_repeated_from_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "digits", *QUICK])
    checkpoint, config = str(next(tmp_path.rglob("*.ckpt"))), str(next(tmp_path.rglob("config.yaml")))
    main(["explain", "--config", config, "--ckpt_path", checkpoint])
    assert (tmp_path / "report.html").is_file()
    main(["predict", "--config", config, "--ckpt_path", checkpoint])
    assert (tmp_path / "assignments.csv").is_file()


def test_a_word_that_belongs_to_another_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--verbose=false", "--output=a.html"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "digits", *word.split("=")])
        assert stop.value.code == 2
        assert f"error: unknown key {word.split('=')[0][2:]!r} for fit" in capsys.readouterr().err
