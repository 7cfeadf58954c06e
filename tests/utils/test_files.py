"""Files that appear whole or not at all: nothing is left by a full disk, an error, an interruption or a kill."""

import errno
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler

from ddcl_lightning import DDCLReadout
from ddcl_lightning._utils.files import check_file, check_folder, whole_file, write_text
from ddcl_lightning.callbacks import ExactResume, SaveOnSignal
from ddcl_lightning.callbacks._figures import emit
from ddcl_lightning.checkpoints.reading import WholeCheckpointIO
from ddcl_lightning.recipes import copy_recipe
from tests.tiny import clustering_module, loader, quiet_trainer


@contextmanager
def full_disk(after: int = 512) -> Iterator[None]:
    """No file can grow beyond ``after`` bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def table(path: Path) -> None:
    with whole_file(path) as draft:
        pd.DataFrame({"a": range(5000)}).to_csv(draft)


def figure(path: Path) -> None:
    drawing = plt.figure()
    drawing.add_subplot().plot(range(50))
    emit(quiet_trainer(), drawing, path.name.partition("-step")[0], path.parent)
    plt.close(drawing)


WRITERS: dict[str, Any] = {
    "report.html": lambda path: write_text(path, "x" * 5000),
    "table.csv": table,
    "figure-step=000000.png": figure,
    "digits_hierarchical.yaml": lambda path: copy_recipe(path.stem, path.parent),
    "saved.ckpt": lambda path: WholeCheckpointIO().save_checkpoint({"w": torch.rand(5000)}, path),
    "model.safetensors": lambda path: _built().save_pretrained(path.parent),
}


def _built() -> DDCLReadout:
    head = DDCLReadout(64)
    head.build(32)
    return head


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    kept = name != "digits_hierarchical.yaml"  # a recipe is copied into an empty place only
    if kept:
        path.write_bytes(b"before")
    with full_disk(), pytest.raises(OSError, match=r"cannot be written.*Make room"):
        WRITERS[name](path)
    assert [file.name for file in tmp_path.iterdir()] == [name] * kept
    if kept:
        assert path.read_bytes() == b"before"
    WRITERS[name](path)
    assert path.stat().st_size > 512


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interruption_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_file(tmp_path / "report.html") as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    child = os.fork()
    if not child:
        with whole_file(path, suffix=".part") as draft:
            draft.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(tmp_path.rglob("*.ckpt")) == [path]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_halves_of_surrogate_pairs_are_written_as_their_escapes(tmp_path: Path) -> None:
    write_text(tmp_path / "report.html", "a \ud83d b é")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "a \\ud83d b é"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/report.html' cannot be written \(No such file"):
        write_text(tmp_path / "nowhere" / "report.html", "x")


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "real.html", tmp_path / "link.html"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    write_text(link, "after")
    assert link.is_symlink()
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write_text(tmp_path / "new.html", "x")
    plain = tmp_path / "plain.html"
    plain.write_text("x")
    assert (tmp_path / "new.html").stat().st_mode == plain.stat().st_mode


def test_checkpoints_of_a_run_never_lie_in_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes to the folder for temporary files, whence a move may be a copy."""
    monkeypatch.setattr("shutil.move", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another file system")))
    trainer = quiet_trainer(max_epochs=1, callbacks=[ExactResume()])
    trainer.fit(clustering_module(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["global_step"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["end.ckpt"]


def test_a_place_that_can_be_written_to_stays_as_it_was(tmp_path: Path) -> None:
    check_folder(tmp_path / "runs" / "today", "dirpath")
    check_folder(tmp_path, "dirpath")
    check_file(tmp_path / "table.csv", "path")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"^dirpath must be a folder that may be written to; '.*file/runs' is none"):
        check_folder(tmp_path / "file" / "runs", "dirpath")
    with pytest.raises(ValueError, match=r"path must be a file; .* is a folder. Name a file in it."):
        check_file(tmp_path, "path")
    if Path("/proc/self").exists():  # nobody may write there, whoever they are
        with pytest.raises(ValueError, match=r"path must be a file that you may write; '/proc/table.csv' is none"):
            check_file("/proc/table.csv", "path")
    with pytest.raises(OSError, match=r"folder must be a folder that may be written to; .*file/head' is none"):
        _built().save_pretrained(tmp_path / "file" / "head")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: {"callbacks": [SaveOnSignal(dirpath=path)]}, r"SaveOnSignal \(interruption.dirpath\)"),
        (lambda path: {"callbacks": [ModelCheckpoint(path)], "enable_checkpointing": True}, r"ModelCheckpoint \(.*\)"),
        (lambda path: {"profiler": SimpleProfiler(path, "times")}, "SimpleProfiler"),
    ],
)
def test_outputs_that_could_not_be_written_in_the_end_are_refused_at_the_start(
    make: Any, name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    module = clustering_module()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"^dirpath of {name} must be a folder that may be written to; "):
        quiet_trainer(max_epochs=1, **make(str(tmp_path / "file" / "x"))).fit(module, loader())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
