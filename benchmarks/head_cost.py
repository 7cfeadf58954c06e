"""What each readout head costs, beside mean pooling: forward and backward time, and memory.

32 samples of 256 tokens, D = 384, 16 prototypes, latents, slots, seeds or codes; at the heads' own width and at the
budget of ``text_readouts.py``. Every head ends in a linear classifier, whose loss trains it; L_q is part of the loss
where there is one. All heads take turns in one process, and the fastest turns are compared, for machines are noisy.

    python benchmarks/head_cost.py               # 5 minutes on two cores: keep them free
    python benchmarks/head_cost.py --quick

Writes ``head_cost.json``.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import forget_peak, options, peak_since_mib, save
from torch import nn
from torch.nn.functional import cross_entropy

from ddcl_lightning import DDCLReadout, Head
from ddcl_lightning.functional import critical_temperature
from ddcl_lightning.heads import (
    AttentionPooling,
    MeanPooling,
    PerceiverPooling,
    PMAPooling,
    SlotAttentionPooling,
    VQPooling,
)

BATCH, TOKENS, DIM, SIZE = 32, 256, 384, 16
BUDGET = 25_600
BARE = "mean"
FRACTION = 0.1  # T / T_c
HEADS: dict[str, Callable[[dict[str, Any]], Head]] = {
    BARE: lambda width: MeanPooling(),
    "attention": lambda width: AttentionPooling(**width),
    "PMA": lambda width: PMAPooling(num_seeds=SIZE, **width),
    "Perceiver": lambda width: PerceiverPooling(num_latents=SIZE, **width),
    "slot attention": lambda width: SlotAttentionPooling(num_slots=SIZE, **width),
    "VQ (straight-through)": lambda width: VQPooling(num_codes=SIZE, **width),
    "ours, centroid": lambda width: DDCLReadout(SIZE, **width),
    "ours, centroid + histogram": lambda width: DDCLReadout(SIZE, pooling="both", **width),
    "ours, slots": lambda width: DDCLReadout(SIZE, pooling="slots", **width),
    "ours, 8 heads, slots": lambda width: DDCLReadout(SIZE, num_heads=8, pooling="slots", **width),
}
WIDTHS: dict[str, dict[str, Any]] = {"own": {}, "budget": {"budget": BUDGET}}

Step = Callable[[], None]


def prepare(name: str, width: str, batch: int = BATCH, tokens: int = TOKENS) -> tuple[Step, int]:
    """One forward and backward, and the parameters of the head."""
    torch.manual_seed(0)
    head = HEADS[name](WIDTHS[width])
    head.build(DIM)
    classifier = nn.Linear(head.pooled_dim, 2)
    x, y = torch.randn(batch, tokens, DIM, requires_grad=True), torch.arange(batch) % 2
    if isinstance(head, DDCLReadout):
        bank = head.attention.bank
        with torch.no_grad():
            seen = head.attention(x[:4]).embedded.flatten(0, 1)
            bank.set_temperature(FRACTION * critical_temperature(bank.split_heads(seen)[0]).float())

    def step() -> None:
        x.grad = None
        head.zero_grad()
        readout = head(x)
        loss = cross_entropy(classifier(readout.pooled), y)
        if readout.levels:
            loss = loss + 0.1 * readout.quantization_loss()
        if readout.regularization is not None:
            loss = loss + readout.regularization
        loss.backward()

    return step, head.num_parameters()


def measure(width: str, turns: int, batch: int, tokens: int) -> list[dict[str, Any]]:
    """One row per head."""
    cases = {name: prepare(name, width, batch, tokens) for name in HEADS}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, (step, _) in cases.items():
            start = time.perf_counter()
            step()
            if turn:  # the first one starts threads and fills caches
                times[name].append(time.perf_counter() - start)
    bare = min(times[BARE])
    return [
        {
            "head": name,
            "width": width,
            "parameters": cases[name][1],
            "ratio": min(values) / bare,
            "fastest_ms": 1e3 * min(values),
            "median_ms": 1e3 * statistics.median(values),
        }
        for name, values in times.items()
    ]


def memory_of_this_process(name: str, width: str, batch: int, tokens: int) -> float:
    """Memory in MiB that one forward and backward adds to that of the inputs."""
    prepare(name, width, 1, 8)[0]()  # loads libraries and starts threads
    step, _ = prepare(name, width, batch, tokens)
    if not forget_peak():
        raise OSError("the peak of a process can be measured on Linux only.")
    before = peak_since_mib()
    step()
    return peak_since_mib() - before


def memory(name: str, width: str, batch: int, tokens: int) -> float:
    """The same in a fresh process, for the peak of a process never falls."""
    command = [sys.executable, __file__, "--memory-of", name, width, str(batch), str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    if arguments.memory_of:
        name, width, batch, tokens = arguments.memory_of
        print(memory_of_this_process(name, width, int(batch), int(tokens)))
        return
    batch, tokens, turns = (2, 16, 1) if arguments.quick else (BATCH, TOKENS, 30)
    rows = [row for width in WIDTHS for row in measure(width, turns, batch, tokens)]
    measured = (BARE, "ours, slots") if arguments.quick else tuple(HEADS)
    for row in rows:
        if row["head"] in measured:
            row["memory_mib"] = memory(row["head"], row["width"], batch, tokens)
    save(arguments.output, "head_cost", {"batch": batch, "tokens": tokens, "dim": DIM, "size": SIZE, "rows": rows})
    for width in WIDTHS:
        print(f"\nwidth: {width}\n\n| head | parameters | time / mean | ms | memory, MiB |\n|---|---|---|---|---|")
        for row in (row for row in rows if row["width"] == width):
            mib = f"{row['memory_mib']:.0f}" if "memory_mib" in row else "-"
            cells = (row["head"], f"{row['parameters']:,}", f"{row['ratio']:.1f}", f"{row['fastest_ms']:.1f}", mib)
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
