"""What watching costs: steps of one training loop with and without a monitor, and its readings by themselves.

A transformer of two layers on 32 x 256 tokens of 384 dimensions with a bank of K prototypes: forward, backward and a
step of Adam. Watched and unwatched steps take turns in one process; process CPU time, medians. A monitor reads one in
ten steps; the probe, a forward pass of 512 samples, comes on top, by its interval with at most 1 % of the training,
and 5 % while there is a sign (``CollapseWarning``).

    python benchmarks/monitor_cost.py               # five minutes on one core: keep it free
"""

import statistics
import time
from collections.abc import Callable

import torch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table
from torch import Tensor, nn

from ddcl_lightning import CodebookMonitor, DDCLAttention

INTERVAL = 10  # steps between two readings, the default
TURNS = 10


def case(batch: int, tokens: int, dim: int, codes: int) -> Case:
    return Case(f"{batch} x {tokens} x {dim}, K = {codes}", {"shape": [batch, tokens, dim], "codes": codes})


CASES = {"k64": case(32, 256, 384, 64), "k1024": case(32, 256, 384, 1024)}
QUICK = {"tiny": case(2, 8, 16, 4)}


class Loop:
    """A training loop, one step at a time."""

    def __init__(self, shape: list[int], codes: int) -> None:
        torch.manual_seed(0)
        dim = shape[2]
        layer = nn.TransformerEncoderLayer(dim, max(1, dim // 64), 4 * dim, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = DDCLAttention(dim, num_prototypes=codes)
        self.model = nn.ModuleList([self.encoder, self.head])
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.batch = torch.randn(shape)

    def step(self) -> Tensor:
        """One step and its loss."""
        output = self.head(self.encoder(self.batch))
        loss = output.tokens.square().mean() + output.terms.loss.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def run(config: Config, seed: int, options: Options) -> Run:
    """Medians of a step, of a step between readings, and of a step that is read and judged."""
    loop = Loop(config["shape"], config["codes"])
    monitor = CodebookMonitor(loop.model, every_n_calls=1, on_collapse="ignore")
    times: dict[str, list[float]] = {"plain": [], "between": [], "read": []}
    for turn in range(2 if options.quick else TURNS + 2):
        for name, measured in times.items():
            monitor.armed = name == "read"

            def step(watched: bool = name != "plain") -> None:
                loss = loop.step()
                if watched:
                    monitor.check(loss)

            taken = seconds(step)
            if turn >= (1 if options.quick else 2):
                measured.append(taken)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    monitor.close()
    return {"milliseconds": {name: 1000 * value for name, value in medians.items()}}


def costs(results: Results) -> Table:
    """Ratios to an unwatched step."""
    rows = [["tokens", "step, ms", "between readings", "with a reading", f"share of one reading in {INTERVAL} steps"]]
    for name in results.configs:
        for each in results.of(name):
            plain, between, read = (each["milliseconds"][key] for key in ("plain", "between", "read"))
            share = (read - plain) / INTERVAL / plain
            cells = [f"{plain:.0f}", f"{between / plain:.3f}", f"{read / plain:.3f}", f"{share:.1%}"]
            rows.append([results.labels[name], *cells])
    return rows


STUDY = Study(
    "monitor_cost",
    CASES,
    run,
    {"steps": costs},
    settings={"interval": INTERVAL, "turns": TURNS},
    quick=QUICK,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
