"""What the layer costs beside two bare matrix products, in time and in memory.

Forward and backward of a bank of K prototypes over N tokens (d = 64, float32; loss: mean square of the centroids plus
L_q), fused as in training and written out plainly, eager and compiled, against ``tokens @ prototypes.T @ prototypes``
with its backward. All of one size take turns in one process, and the fastest turns are compared, for machines are
noisy.

Low temperatures make numbers too small to be normal, which a CPU multiplies slowly unless told to flush them to zero.
``torch.set_flush_denormal`` tells the calling thread, and the worker threads which that one starts later: "caller" is
what it does once the workers exist, "all" is what it does before the first parallel operation.

    python benchmarks/layer_cost.py               # 20 minutes on two cores: keep them free
"""

import itertools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from _measure import in_fresh_process, peak_mib, reset_peak
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table
from torch import Tensor, nn

from ddcl_lightning.functional import critical_temperature
from ddcl_lightning.nn.bank import PrototypeBank

DIM = 64
SIZES = tuple(itertools.product((4096, 32768), (64, 1024)))
FRACTIONS = (0.1, 0.005)  # of the critical temperature
FLUSHES = ("off", "caller", "all")
PRODUCTS = "products"
LABELS = {
    "fused": "fused",
    "fused-compiled": "fused, compiled",
    "plain": "plain",
    "plain-compiled": "plain, compiled",
    PRODUCTS: "matrix products",
}
PLAIN, COMPILED = ("plain", "plain-compiled"), ("fused-compiled", "plain-compiled")
SECONDS, TURNS = 60.0, (5, 25)  # per size and temperature; fewest and most turns


def size_case(size: int, prototypes: int, **config: Any) -> Case:
    return Case(f"{size} x {prototypes}", {"tokens": size, "prototypes": prototypes, **config})


CASES = {f"time/{n}/{k}/{t}": size_case(n, k, measure="time", temperature=t) for n, k in SIZES for t in FRACTIONS} | {
    f"memory/{n}/{k}": size_case(n, k, measure="memory") for n, k in SIZES
}
QUICK = {"time/256/16/0.1": size_case(256, 16, measure="time", temperature=0.1)}
QUICK["memory/256/16"] = size_case(256, 16, measure="memory")

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
        name: Products(prototypes) if name == PRODUCTS else Layer(prototypes, plain=name in PLAIN) for name in names
    }


def step_of(name: str, module: nn.Module, tokens: Tensor) -> Step:
    """One forward and backward."""
    call: Callable[[Tensor], Tensor] = torch.compile(module) if name in COMPILED else module
    leaf = tokens.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        module.zero_grad()
        call(leaf).backward()

    return step


def set_temperature(layers: Iterable[nn.Module], tokens: Tensor, fraction: float) -> None:
    """A fraction of the critical temperature for all layers."""
    temperature = fraction * float(critical_temperature(tokens))
    for module in layers:
        if isinstance(module, Layer):
            module.bank.set_temperature(temperature)


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def run(config: Config, seed: int, options: Options) -> Run:
    """Times of all paths in turn, or the memory of each."""
    size, prototypes = config["tokens"], config["prototypes"]
    # Quick is without what takes longest: compiling, and starting processes.
    paths = ["fused", "plain"] if options.quick else [path for path in LABELS if path != PRODUCTS]
    if config["measure"] == "time":
        turns = Turns(size, prototypes, paths)
        return turns.measure(config["temperature"], *((1.0, (1, 1)) if options.quick else (SECONDS, TURNS)))
    measured = ["fused"] if options.quick else ["fused", "plain", PRODUCTS]
    return {"mib": {path: in_fresh_process(__file__, "memory", path, size, prototypes) for path in measured}}


class Turns:
    """All paths of one size, which take turns."""

    def __init__(self, size: int, prototypes: int, paths: list[str]) -> None:
        torch.compiler.reset()  # so that no size is taken for a dynamic one, or refused as one too many
        self.paths = paths
        self.tokens, bank = problem(size, prototypes)
        self.modules = modules(bank, (PRODUCTS, *paths))
        self.steps = {name: step_of(name, module, self.tokens) for name, module in self.modules.items()}
        # A thread that flushes before its first parallel operation has workers that flush; see above.
        self.flushing = ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))

    def timed(self, name: str, flush: str) -> float:
        """Seconds of one step."""
        if flush == "all":
            return self.flushing.submit(seconds, self.steps[name]).result()
        torch.set_flush_denormal(flush == "caller")
        try:
            return seconds(self.steps[name])
        finally:
            torch.set_flush_denormal(False)

    def measure(self, fraction: float, limit: float, turns: tuple[int, int]) -> Run:
        """Fastest milliseconds by path and way of flushing, at one temperature."""
        set_temperature(self.modules.values(), self.tokens, fraction)
        jobs = [(PRODUCTS, "off"), *itertools.product(self.paths, FLUSHES)]
        times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for job in jobs:
            self.timed(*job)  # compile, start threads, fill caches
        began = time.perf_counter()
        for turn in range(turns[1]):
            if turn >= turns[0] and time.perf_counter() - began > limit:
                break
            for job in jobs:
                times[job].append(1e3 * self.timed(*job))
        fastest: dict[str, dict[str, float]] = {}
        for (path, flush), values in times.items():
            fastest.setdefault(path, {})[flush] = min(values)
        return {"ms": fastest, "turns": len(times[PRODUCTS, "off"])}


def memory(name: str, size: int, prototypes: int) -> float:
    """Memory in MiB that one forward and backward adds to that of the inputs, in this process."""

    def prepared(size: int, prototypes: int) -> Step:
        tokens, bank = problem(size, prototypes)
        module = modules(bank, (name,))[name]
        set_temperature((module,), tokens, FRACTIONS[0])
        return step_of(name, module, tokens)

    prepared(256, 8)()  # loads libraries and starts threads
    step = prepared(size, prototypes)
    if not reset_peak():
        raise OSError("the peak of a process can be measured on Linux only.")
    before = peak_mib()
    step()
    return peak_mib() - before


def short(number: float) -> str:
    """Two digits or more."""
    return f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def time_table(results: Results, columns: dict[str, tuple[tuple[str, str], ...]], last: bool) -> Table:
    """Times over those of the products, by column as ``(path, flush)``; with the products' own as the last column."""
    rows = [["N", "K", "T / T_c", *columns, *(["matrix products"] if last else [])]]
    for case in results.where(measure="time"):
        config, ms = results.configs[case], results.of(case)[0]["ms"]
        size = {key: config[key] for key in ("tokens", "prototypes")}
        # The products are the same at every temperature.
        base = min(results.of(other)[0]["ms"][PRODUCTS]["off"] for other in results.where(measure="time", **size))
        cells = [
            ", ".join(short(ms[path][flush] / base) for path, flush in jobs if path in ms) for jobs in columns.values()
        ]
        numbers = [f"{config['tokens']:,}", f"{config['prototypes']:,}", f"{config['temperature']:g}"]
        rows.append([*numbers, *cells, *([f"{base:.0f} ms"] if last else [])])
    return rows


def paths_table(results: Results) -> Table:
    return time_table(results, {LABELS[path]: ((path, "caller"),) for path in LABELS if path != PRODUCTS}, last=True)


def flush_table(results: Results) -> Table:
    columns = {
        f"{path}: off, fit, all threads": tuple((path, flush) for flush in FLUSHES) for path in ("fused", "plain")
    }
    return time_table(results, columns, last=False)


def memory_table(results: Results) -> Table:
    paths = (PRODUCTS, "fused", "plain")
    rows = [["N", "K", *(LABELS[path] for path in paths)]]
    for case in results.where(measure="memory"):
        config, mib = results.configs[case], results.of(case)[0]["mib"]
        cells = [f"{mib[path]:.0f}" if path in mib else "" for path in paths]
        rows.append([f"{config['tokens']:,}", f"{config['prototypes']:,}", *cells])
    return rows


STUDY = Study(
    "layer_cost",
    CASES,
    run,
    {"paths": paths_table, "flushing": flush_table, "memory": memory_table},
    settings={"dim": DIM},
    quick=QUICK,
    threads=2,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
