"""SIGTERM and Ctrl-C while the command is still importing torch."""

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

SIGNALS = [signal.SIGTERM, signal.SIGINT]
(COMMAND,) = entry_points(group="console_scripts", name="ddcl")
IMPORTING = f"from {COMMAND.module} import {COMMAND.attr}\n"


def start(folder: Path, number: int, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Python with these words, and a torch that gets a signal while it is imported."""
    (folder / "torch.py").write_text(
        f"import os, sys\nprint('importing', flush=True)\nos.kill(os.getpid(), {int(number)})\nsys.exit('went on')\n"
    )
    settings = {**os.environ, "PYTHONPATH": str(folder), **environment}

    def listen() -> None:  # a shell's job in the background ignores Ctrl-C, and its children inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=60, preexec_fn=listen)


def script(folder: Path, name: str, before: str = "") -> str:
    """A program that does what the installed entry point does."""
    (folder / name).write_text(f"{before}\n{IMPORTING}{COMMAND.attr}()\n")
    return str(folder / name)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("way", ["script", "module", "options", "joined"])
def test_the_command_ends_with_one_line(way: str, number: int, tmp_path: Path) -> None:
    words = {
        "script": lambda: [script(tmp_path, "ddcl")],
        "module": lambda: ["-m", "ddcl_lightning"],
        "options": lambda: ["-W", "ignore", "-u", "-m", "ddcl_lightning.__main__"],
        "joined": lambda: ["-mddcl_lightning"],
    }[way]()
    ended = start(tmp_path, number, *words, "fit", "--config", "digits")
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "importing\n", f"Ended by {name}.\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_further_processes_of_a_run_end_without_a_word(number: int, tmp_path: Path) -> None:
    words = ["-m", "ddcl_lightning.__main__", "fit", "--trainer.strategy", "ddp"]
    ended = start(tmp_path, number, *words, LOCAL_RANK="1")
    assert (ended.returncode, ended.stderr) == (128 + number, "")


@pytest.mark.parametrize("name", ["train.py", "ddcl.py"])
def test_a_program_that_imports_the_package_keeps_its_handlers(name: str, tmp_path: Path) -> None:
    program = script(tmp_path, name)
    assert start(tmp_path, signal.SIGTERM, program, "ddcl").returncode == -signal.SIGTERM
    assert "KeyboardInterrupt" in start(tmp_path, signal.SIGINT, program, "-m", "ddcl_lightning").stderr
    own = script(tmp_path, name, "import signal, sys\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(7))")
    assert start(tmp_path, signal.SIGINT, own).returncode == 7


def test_handlers_that_are_there_before_stay(tmp_path: Path) -> None:
    ignoring = script(tmp_path, "ddcl", "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert start(tmp_path, signal.SIGINT, ignoring).stderr == "went on\n"


def test_a_process_that_the_command_spawns_is_not_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddcl_lightning._utils.at_start import is_command

    monkeypatch.setattr(sys, "argv", ["/usr/bin/ddcl", "fit"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/usr/bin/ddcl", "fit"])
    assert is_command()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "from multiprocessing.spawn import spawn_main", "--x"])
    assert not is_command()
    for argv in ([], [""]):  # an embedded or interactive interpreter
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", ["python"])
        assert not is_command()
