"""SIGTERM and Ctrl-C, at every place of a run."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ddcl_lightning._utils.interruption import INTERRUPTION, Interrupted
from ddcl_lightning.callbacks import SaveOnSignal
from ddcl_lightning.cli import commands as cli
from tests.tiny import clustering_module, loader, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


class Signals(pl.Callback):
    """Sends a signal to this process in one hook, once."""

    def __init__(self, hook: str, number: int = signal.SIGTERM, times: int = 1) -> None:
        self.number, self.times = number, times
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        late = trainer.sanity_checking or (trainer.training and trainer.global_step not in (0, 2, 4, 8))
        if self.times and not late:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0


def train(folder: Path, *callbacks: pl.Callback, resume: Path | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = clustering_module(**kwargs)
    saving = ModelCheckpoint(folder, "{step}", every_n_epochs=1)
    trainer = quiet_trainer(max_epochs=2, callbacks=[*callbacks, SaveOnSignal(), saving], enable_checkpointing=True)
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("hook", "number", "step"),
    [
        ("on_train_batch_end", signal.SIGTERM, 8),
        ("on_train_epoch_end", signal.SIGINT, 5),
        ("on_validation_batch_start", signal.SIGTERM, 4),
        ("on_train_end", signal.SIGTERM, 8),
        ("on_fit_end", signal.SIGINT, 8),
    ],
)
def test_what_was_trained_is_kept_and_the_run_goes_on_from_it(
    hook: str,
    number: int,
    step: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    whole = train(tmp_path / "whole")
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "run", Signals(hook, number))
    assert end.value.code == 128 + number
    path = tmp_path / "run" / "interrupted.ckpt"
    message = capsys.readouterr().err
    assert f"--ckpt_path {path}" in message
    assert "weights_only" not in message + caplog.text
    assert torch.load(path, weights_only=True)["global_step"] <= step
    if torch.load(path, weights_only=True)["global_step"] in (4, 8):  # a plain loader knows no other place
        resumed = train(tmp_path / "resumed", resume=path)
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_before_training_it_ends_at_once_and_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted) as end:
        train(tmp_path, Signals("on_train_start"))
    assert end.value.code == 143
    assert "Nothing was trained" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_later_signal_does_not_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddcl_lightning._utils.interruption.ONE_SIGNAL", -1.0)
    with pytest.raises(Interrupted):
        train(tmp_path, Signals("on_before_optimizer_step", times=2))
    assert "There is no checkpoint of it" in capsys.readouterr().err


def test_gradients_that_wait_for_more_batches_are_not_lost(tmp_path: Path) -> None:
    class First(Signals):
        def _send(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
            if arguments[-1] == 0 and trainer.current_epoch == 0:  # the first of two batches of a step
                super()._send(trainer)

    with pytest.raises(SystemExit):
        train(tmp_path, First("on_train_batch_end"), accumulate_grad_batches=2)
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert (saved["global_step"], progress["completed"]) == (1, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_commands_without_training_end_at_once(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda _: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        cli.main(["validate"])
    assert end.value.code == 128 + number
    assert "nothing was written" in capsys.readouterr().err


def test_workers_of_a_loader_leave_ctrl_c_to_their_parent() -> None:
    assert INTERRUPTION.begin()
    try:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    finally:
        INTERRUPTION.end()
