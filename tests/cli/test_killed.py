"""Commands that are told to end, or killed, in the middle of their work."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddcl_lightning import DDCLReadoutModule, DigitsDataModule
from ddcl_lightning.cli.commands import main
from ddcl_lightning.explain import trainer
from tests.processes import LIMIT, Running, start_processes

SIGNALS = [signal.SIGTERM, signal.SIGINT]
QUIET = ["--config", "digits", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
WORKERS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    short = ["--trainer.max_epochs=1", "--summary.enabled=false", f"--trainer.default_root_dir={folder}"]
    main(["fit", *QUIET, *short])
    return str(next(folder.rglob("*.ckpt")))


def patch(monkeypatch: pytest.MonkeyPatch, place: str, number: int) -> None:
    """Send a signal to this process at a place of ``ddcl explain``, when it gets there."""
    module, name = place.rsplit(".", 1)
    owner: Any = DigitsDataModule if module == "DigitsDataModule" else __import__(module, fromlist=[name])
    original: Callable[..., Any] = getattr(owner, name)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "place",
    [
        "DigitsDataModule.setup",
        "DigitsDataModule.example",
        "ddcl_lightning.explain.trainer.collect",
        "ddcl_lightning.explain.trainer.render",
        "os.fsync",  # the page is written, but not in its place
    ],
)
def test_explain_ends_with_one_line_and_leaves_no_page(
    place: str,
    number: int,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "report.html"
    page.write_text("of an earlier run")
    patch(monkeypatch, place, number)
    with pytest.raises(SystemExit) as end:
        main(["explain", *QUIET, "--ckpt_path", checkpoint, "--output", str(page)])
    assert end.value.code == 128 + number
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("Ended by ")] == [error.splitlines()[-1]]
    assert (page.read_text(), list(tmp_path.iterdir())) == ("of an earlier run", [page])


def begin(target: Callable[..., None], folder: Path, *args: Any) -> Running:
    """Start a process, and wait until it says that it is in the middle of its work."""
    (running,) = start_processes(folder, target, *args)
    end = time.monotonic() + LIMIT
    while not (running.log.parent / "working").exists():
        assert running.process.is_alive(), running.outcome()
        assert time.monotonic() < end, running.outcome()
        time.sleep(0.02)
    return running


def explain_until_told(words: list[str]) -> None:
    """``ddcl explain`` that never finishes its page."""

    def render(_: Any) -> None:
        Path("working").touch()
        time.sleep(LIMIT)

    trainer.render = render  # type: ignore[assignment]
    main(["explain", *words])


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_explain_ends_when_somebody_else_says_so(number: int, checkpoint: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = [*QUIET, "--ckpt_path", checkpoint, "--output", str(page)]
    running = begin(explain_until_told, tmp_path, words)
    os.kill(running.process.pid or 0, number)
    running.process.join(LIMIT)
    ended = running.outcome()
    assert ended.code == 128 + number
    assert "Traceback" not in ended.output
    assert ended.output.count("Ended by ") == 1
    assert not page.exists()


def fit_until_told(words: list[str]) -> None:
    """``ddcl fit`` without an end."""
    step = DDCLReadoutModule.training_step

    def training_step(module: DDCLReadoutModule, batch: Any, batch_idx: int) -> Any:
        if module.current_epoch == 1 and batch_idx == 1:
            Path("working").touch()
        return step(module, batch, batch_idx)

    DDCLReadoutModule.training_step = training_step  # type: ignore[method-assign]
    main(["fit", *words])


@pytest.mark.slow
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_workers_of_a_loader_do_not_outlive_the_command(number: int, tmp_path: Path) -> None:
    data = [f"--data.init_args.num_workers={WORKERS}", "--data.init_args.batch_size=256"]
    running = begin(fit_until_told, tmp_path, [*QUIET, *data, "--trainer.max_epochs=100000"])
    workers = psutil.Process(running.process.pid).children(recursive=True)
    assert len(workers) >= WORKERS
    os.kill(running.process.pid or 0, number)
    running.process.join(LIMIT)
    ended = running.outcome()
    assert ended.code == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:  # after SIGKILL a worker of torch's that was reading may print its broken pipe
        assert "Traceback" not in ended.output
    end = time.monotonic() + LIMIT
    while any(is_running(worker) for worker in workers):  # without their parent torch lets them look every few seconds
        assert time.monotonic() < end, [worker.cmdline() for worker in workers if is_running(worker)]
        time.sleep(0.1)


def is_running(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has asked about since its end does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
