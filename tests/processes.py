"""Runs a function in several processes at once, as a launcher would start them, and tells when they hang.

The processes are forked from a server that has imported the package once, so that a start costs no import.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest

PRELOAD = "tests.preload"
LIMIT = 120.0  # seconds; far above what any of the runs takes on a busy machine


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it printed."""

    code: int | None
    output: str


@dataclass(frozen=True)
class Running:
    """A process that was started, and the file that it prints into."""

    process: ForkServerProcess
    log: Path

    def outcome(self) -> Outcome:
        return Outcome(self.process.exitcode, self.log.read_text(errors="replace"))


def start_processes(folder: Path, target: Callable[..., Any], *args: Any, processes: int = 1) -> list[Running]:
    """Call ``target(*args)`` in processes that see themselves as the ranks of one run.

    They work in a folder of their own inside of ``folder``, with one thread each.
    """
    port, folder = _free_port(), folder / "processes"
    folder.mkdir(exist_ok=True)
    context = fork_server()
    running = []
    for rank in range(processes):
        log = folder / f"{port}-{rank}.log"
        log.touch()
        process = context.Process(target=_run, args=(rank, processes, port, str(folder), str(log), target, args))
        process.start()
        running.append(Running(process, log))
    return running


def run_processes(
    folder: Path, target: Callable[..., Any], *args: Any, processes: int = 2, limit: float = LIMIT
) -> list[Outcome]:
    """Start such processes and wait for all of them.

    Fails the test, with the stacks of all processes, if they have not ended within ``limit`` seconds.
    """
    running = start_processes(folder, target, *args, processes=processes)
    end = time.monotonic() + limit
    started = [each.process for each in running]
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(started) if process.is_alive()]
    if hung:
        for process in started:
            if process.is_alive():
                _show_stacks(process.pid)
        time.sleep(1.0)
        for process in started:
            process.kill()
            process.join()
    outcomes = [each.outcome() for each in running]
    if hung:
        pytest.fail(f"processes {hung} hang:\n" + "\n".join(outcome.output[-6000:] for outcome in outcomes))
    return outcomes


def succeed_in_processes(folder: Path, target: Callable[..., Any], *args: Any, processes: int = 2) -> None:
    """Run such processes, none of which may fail."""
    outcomes = run_processes(folder, target, *args, processes=processes)
    failed = [outcome.output[-6000:] for outcome in outcomes if outcome.code != 0]
    assert not failed, "\n".join(failed)


def results_of_processes(folder: Path, target: Callable[[int], Any]) -> list[Any]:
    """What ``target(rank)`` returns in each of two processes of a gloo group, as :func:`torch.save` keeps it."""
    import torch

    stem = str(folder / "result")
    succeed_in_processes(folder, _save_result, target, stem)
    return [torch.load(f"{stem}-{rank}.pt", weights_only=True) for rank in range(2)]


def join_group() -> int:
    """Join the gloo group of the processes, and return the rank in it.

    They leave it by ending, which runs no destructors here. ``destroy_process_group`` can hang in torch 2.6: it holds
    the interpreter's lock and waits for a thread of the group, which may want that lock to free the tensor of the last
    collective (https://github.com/pytorch/pytorch/pull/154976).
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank()


def _save_result(target: Callable[[int], Any], stem: str) -> None:
    import torch

    rank = join_group()
    torch.save(target(rank), f"{stem}-{rank}.pt")


def fork_server() -> ForkServerContext:
    """Starts processes by forking a server that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    folder = os.getcwd()
    os.chdir(Path(__file__).parents[1])  # the server looks nowhere else, and passes over what it does not find
    try:
        ensure_running()
    finally:
        os.chdir(folder)
    return context


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _show_stacks(pid: int | None) -> None:
    import signal

    if pid is not None:
        os.kill(pid, signal.SIGUSR2)


def _run(
    rank: int, processes: int, port: int, folder: str, log: str, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import signal

    multiprocessing.set_start_method(None, force=True)  # further processes start as they do elsewhere
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    assert PRELOAD in sys.modules, "the server has imported nothing, and every process would take seconds to do so"
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)
    os.chdir(folder)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    import torch
    from lightning.fabric.utilities import rank_zero as fabric
    from lightning.pytorch.utilities import rank_zero

    torch.set_num_threads(1)
    # Read from the environment when they were imported, which was in the server.
    fabric.rank_zero_only.rank = rank_zero.rank_zero_only.rank = rank
    target(*args)
