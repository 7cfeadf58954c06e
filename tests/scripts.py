"""Fresh processes for scripts, without the seconds that each would spend on importing torch and Lightning.

The server of :mod:`tests.processes` forks for every script: what a script does to its process stays there.
"""

import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.processes import fork_server


@dataclass(frozen=True)
class Finished:
    """What a script has left.

    Attributes:
        code: Its exit code.
        stdout: What it has printed.
        stderr: What it has complained about.
    """

    code: int
    stdout: str
    stderr: str


def run_script(script: Path, arguments: list[str], folder: Path, timeout: float = 300) -> Finished:
    """Run ``python script *arguments`` with one thread, its output kept in ``folder``."""
    return _finish(script, arguments, folder, timeout)


def run_module(name: str, arguments: list[str], folder: Path, timeout: float = 300) -> Finished:
    """Run ``python -m name *arguments`` in the same way."""
    return _finish(name, arguments, folder, timeout)


def _finish(program: Path | str, arguments: list[str], folder: Path, timeout: float) -> Finished:
    logs = [folder / f"{Path(program).stem}.{stream}" for stream in ("stdout", "stderr")]
    process = fork_server().Process(target=_run, args=(program, arguments, *logs))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Finished(process.exitcode, *(log.read_text(encoding="utf-8") for log in logs))


def _run(program: Path | str, arguments: list[str], stdout: Path, stderr: Path) -> None:
    # Descriptors, not sys.stdout: a script's own subprocesses write there too.
    for descriptor, log in ((1, stdout), (2, stderr)):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    sys.argv = [str(program), *arguments]
    try:
        if isinstance(program, Path):
            sys.path.insert(0, str(program.parent))
            runpy.run_path(str(program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
