"""What the layer costs beside two bare matrix products, in time and in memory.

Forward and backward of a bank of K prototypes over N tokens (d = 64, float32; loss: mean square of the centroids plus
L_q), fused as in training and written out plainly, eager and compiled, against ``tokens @ prototypes.T @ prototypes``
with its backward. All cases take turns in one process, and the fastest turns are compared, for machines are noisy.

Low temperatures make numbers too small to be normal, which a CPU multiplies slowly unless told to flush them to zero.
``torch.set_flush_denormal`` tells the calling thread, and the worker threads which that one starts later: "caller" is
what it does once the workers exist, "all threads" is what it does before the first parallel operation.

    python benchmarks/layer_cost.py               # 15 minutes on two cores: keep them free
    python benchmarks/layer_cost.py --quick

Writes ``layer_cost.json``.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from _common import options, peak_mib, save
from torch import Tensor, nn
from tqdm import tqdm

from ddcl_lightning.functional import critical_temperature
from ddcl_lightning.nn.bank import PrototypeBank

DIM = 64
SIZES = tuple(itertools.product((4096, 32768), (64, 1024)))
FRACTIONS = (0.1, 0.005)  # of the critical temperature
FLUSHES = ("off", "caller", "all threads")
MATMULS = "two matrix products"
PATHS = ("fused", "fused, compiled", "plain", "plain, compiled")
SECONDS, TURNS = 60.0, (5, 25)  # per size and temperature; fewest and most turns
MEMORY_CASES = (MATMULS, "fused", "plain")

Step = Callable[[], None]


class Products(nn.Module):
    """The two matrix products of the layer and nothing else."""

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(prototypes.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean square of ``(N, d)`` outputs."""
        return (tokens @ self.prototypes.T @ self.prototypes).square().mean()


class Layer(nn.Module):
    """A bank with a loss on everything that it returns."""

    def __init__(self, prototypes: Tensor, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.bank = PrototypeBank(*prototypes.shape)
        self.bank.set_prototypes(prototypes.unsqueeze(0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean square of the centroids plus L_q."""
        output = self.bank(tokens, need_weights=self.plain)
        return output.centroids.square().mean() + output.terms.loss.sum()


def problem(size: int, prototypes: int) -> tuple[Tensor, Tensor]:
    """Tokens from as many clusters as there are prototypes, and prototypes near their centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(prototypes, DIM, generator=generator)
    own = torch.randint(prototypes, (size,), generator=generator)
    tokens = centres[own] + 0.5 * torch.randn(size, DIM, generator=generator)
    return tokens, centres + 0.1 * torch.randn(prototypes, DIM, generator=generator)


def modules(prototypes: Tensor, names: Iterable[str]) -> dict[str, nn.Module]:
    """The module of each case."""
    return {
        name: Products(prototypes) if name == MATMULS else Layer(prototypes, name.startswith("plain")) for name in names
    }


def step_of(name: str, module: nn.Module, tokens: Tensor) -> Step:
    """One forward and backward."""
    call: Callable[[Tensor], Tensor] = torch.compile(module) if name.endswith("compiled") else module
    leaf = tokens.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        module.zero_grad()
        call(leaf).backward()

    return step


def set_temperature(cases: Iterable[nn.Module], tokens: Tensor, fraction: float) -> None:
    """A fraction of the critical temperature for all layers."""
    temperature = fraction * float(critical_temperature(tokens))
    for module in cases:
        if isinstance(module, Layer):
            module.bank.set_temperature(temperature)


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class Turns:
    """All cases of one size, which take turns."""

    def __init__(self, size: int, prototypes: int, paths: tuple[str, ...]) -> None:
        torch.compiler.reset()  # so that no size is taken for a dynamic one, or refused as one too many
        self.common = {"tokens": size, "prototypes": prototypes}
        self.paths = paths
        self.tokens, bank = problem(size, prototypes)
        self.modules = modules(bank, (MATMULS, *paths))
        self.steps = {name: step_of(name, module, self.tokens) for name, module in self.modules.items()}
        # A thread that flushes before its first parallel operation has workers that flush; see above.
        self.flushing = ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))

    def timed(self, name: str, flush: str) -> float:
        """Seconds of one step."""
        if flush == "all threads":
            return self.flushing.submit(seconds, self.steps[name]).result()
        torch.set_flush_denormal(flush == "caller")
        try:
            return seconds(self.steps[name])
        finally:
            torch.set_flush_denormal(False)

    def measure(self, fraction: float, budget: float, turns: tuple[int, int]) -> list[dict[str, Any]]:
        """One row per path and way of flushing, at one temperature."""
        set_temperature(self.modules.values(), self.tokens, fraction)
        jobs = [(MATMULS, "off"), *itertools.product(self.paths, FLUSHES)]
        times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for job in jobs:
            self.timed(*job)  # compile, start threads, fill caches
        began = time.perf_counter()
        for turn in range(turns[1]):
            if turn >= turns[0] and time.perf_counter() - began > budget:
                break
            for job in jobs:
                times[job].append(self.timed(*job))
        bare = times.pop((MATMULS, "off"))
        return [
            {
                **self.common,
                "temperature": fraction,
                "turns": len(bare),
                "path": path,
                "flush": flush,
                "median_ratio_within_turns": statistics.median(
                    mine / theirs for mine, theirs in zip(values, bare, strict=True)
                ),
                "fastest_ms": 1e3 * min(values),
                "fastest_matmuls_ms": 1e3 * min(bare),
            }
            for (path, flush), values in times.items()
        ]


def memory_of_this_process(name: str, size: int, prototypes: int) -> float:
    """Memory in MiB that one forward and backward adds to that of the inputs."""

    def prepared(size: int, prototypes: int) -> Step:
        tokens, bank = problem(size, prototypes)
        module = modules(bank, (name,))[name]
        set_temperature((module,), tokens, FRACTIONS[0])
        return step_of(name, module, tokens)

    prepared(256, 8)()  # loads libraries and starts threads
    step = prepared(size, prototypes)
    before = peak_mib()
    step()
    return peak_mib() - before


def memory(name: str, size: int, prototypes: int) -> float:
    """The same in a fresh process, for the peak of a process never falls."""
    command = [sys.executable, __file__, "--memory-of", name, str(size), str(prototypes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(result: dict[str, Any]) -> None:
    """The tables of ``docs/measurements.md``."""
    found = {
        tuple(row[key] for key in ("tokens", "prototypes", "temperature", "path", "flush")): row
        for row in result["time"]
    }
    sizes = sorted({key[:3] for key in found}, key=lambda key: (key[0], key[1], -key[2]))
    paths = list(dict.fromkeys(row["path"] for row in result["time"]))
    for flush in FLUSHES:
        print(f"\nflushing: {flush}\n\n| N | K | T / T_c | {' | '.join(paths)} | matrix products, ms |")
        print("|" + "---|" * (4 + len(paths)))
        for size in sizes:
            # The products are the same at every temperature.
            bare = min(row["fastest_matmuls_ms"] for key, row in found.items() if key[:2] == size[:2])
            cells = " | ".join(f"{found[(*size, path, flush)]['fastest_ms'] / bare:.1f}" for path in paths)
            print(f"| {size[0]:,} | {size[1]:,} | {size[2]:g} | {cells} | {bare:.0f} |")
    names = [name for name in MEMORY_CASES if name in result["memory_mib"][0]]
    print(f"\nmemory, MiB\n\n| N | K | {' | '.join(names)} |")
    print("|" + "---|" * (2 + len(names)))
    for row in result["memory_mib"]:
        cells = " | ".join(f"{row[name]:.0f}" for name in names)
        print(f"| {row['tokens']:,} | {row['prototypes']:,} | {cells} |")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, size, prototypes = arguments.memory_of
        print(memory_of_this_process(name, int(size), int(prototypes)))
        return
    sizes, fractions, budget, turns, paths, in_memory = SIZES, FRACTIONS, SECONDS, TURNS, PATHS, MEMORY_CASES
    if arguments.quick:  # without what takes longest: compiling, and starting processes
        sizes, fractions, budget, turns, paths, in_memory = (
            ((256, 16),),
            (0.1,),
            1.0,
            (1, 1),
            ("fused", "plain"),
            ("fused",),
        )
    result: dict[str, Any] = {"dim": DIM, "threads": torch.get_num_threads(), "time": [], "memory_mib": []}
    for size, prototypes in tqdm(sizes, desc="memory"):
        row = {name: memory(name, size, prototypes) for name in in_memory}
        result["memory_mib"].append({"tokens": size, "prototypes": prototypes, **row})
    for size, prototypes in tqdm(sizes, desc="time"):
        together = Turns(size, prototypes, paths)
        for fraction in fractions:
            result["time"] += together.measure(fraction, budget, turns)
            save(arguments.output, "layer_cost", result)
    report(result)


if __name__ == "__main__":
    main()
