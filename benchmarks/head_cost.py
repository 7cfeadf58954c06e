"""What each readout head costs, beside mean pooling: forward and backward time, and memory.

32 samples of 256 tokens, D = 384, 16 prototypes, latents, slots, seeds or codes; at the heads' own width and at that of
``text_readouts.py``. Every head ends in a linear classifier, whose loss trains it; L_q is part of the loss where there
is one. All heads take turns in one process, and the fastest turns are compared, for machines are noisy.

    python benchmarks/head_cost.py               # 5 minutes on two cores: keep them free
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measure import in_fresh_process, peak_mib, reset_peak
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table
from torch import nn
from torch.nn.functional import cross_entropy

from ddcl_lightning import DDCLReadout, heads
from ddcl_lightning.functional import critical_temperature

SHAPE, TINY = (32, 256), (2, 16)  # samples and tokens
DIM, SIZE = 384, 16
FRACTION = 0.1  # T / T_c
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {  # label, class, arguments
    "mean": ("mean", "MeanPooling", {}),
    "attention": ("attention", "AttentionPooling", {}),
    "pma": ("PMA", "PMAPooling", {"num_seeds": SIZE}),
    "perceiver": ("Perceiver", "PerceiverPooling", {"num_latents": SIZE}),
    "slot-attention": ("slot attention", "SlotAttentionPooling", {"num_slots": SIZE}),
    "vq": ("VQ (straight-through)", "VQPooling", {"num_codes": SIZE}),
    "ddcl-centroid": ("ours, centroid", "DDCLReadout", {"num_prototypes": SIZE}),
    "ddcl-both": ("ours, centroid + histogram", "DDCLReadout", {"num_prototypes": SIZE, "pooling": "both"}),
    "ddcl-slots": ("ours, slots", "DDCLReadout", {"num_prototypes": SIZE, "pooling": "slots"}),
    "ddcl-slots-8": (
        "ours, 8 heads, slots",
        "DDCLReadout",
        {"num_prototypes": SIZE, "num_heads": 8, "pooling": "slots"},
    ),
}
BASE = "mean"
CASES = {  # all heads of a width are one case, for they take turns
    "own": Case("at its own width", {"max_parameters": None}),
    "equal": Case("at equal parameters", {"max_parameters": 25_600}),
}

Step = Callable[[], None]


def prepare(name: str, max_parameters: int | None, samples: int, tokens: int) -> tuple[Step, int]:
    """One forward and backward, and the parameters of the head."""
    torch.manual_seed(0)
    _, kind, arguments = HEADS[name]
    head = getattr(heads, kind)(
        **arguments, **({} if max_parameters is None or name == BASE else {"max_parameters": max_parameters})
    )
    head.build(DIM)
    classifier = nn.Linear(head.pooled_dim, 2)
    x, y = torch.randn(samples, tokens, DIM, requires_grad=True), torch.arange(samples) % 2
    if isinstance(head, DDCLReadout):
        bank = head.attention.bank
        with torch.no_grad():
            embedded = head.attention(x[:4]).embedded.flatten(0, 1)
            bank.set_temperature(FRACTION * critical_temperature(bank.split_heads(embedded)[0]).float())

    def step() -> None:
        x.grad = None
        head.zero_grad()
        readout = head(x)
        loss = cross_entropy(classifier(readout.pooled), y)
        if readout.loss_terms:
            loss = loss + 0.1 * readout.quantization_loss()
        if readout.regularization is not None:
            loss = loss + readout.regularization
        loss.backward()

    return step, head.num_parameters()


def run(config: Config, seed: int, options: Options) -> Run:
    """Times of all heads in turn, and the memory of each."""
    torch.set_flush_denormal(True)
    shape, turns = (TINY, 1) if options.quick else (SHAPE, 30)
    steps = {name: prepare(name, config["max_parameters"], *shape) for name in HEADS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first one starts threads and fills caches
                times[name].append(1e3 * (time.perf_counter() - start))
    # Starting a process takes longest, so quick measures one head in this one.
    quickly = () if config["max_parameters"] is None else ("ddcl-slots",)
    measured = quickly if options.quick else tuple(HEADS)
    measure = memory if options.quick else partial(in_fresh_process, __file__, "memory")
    return {
        "heads": {
            name: {
                "parameters": steps[name][1],
                "fastest_ms": min(values),
                "median_ms": statistics.median(values),
                "mib": measure(name, config["max_parameters"], *shape) if name in measured else None,
            }
            for name, values in times.items()
        }
    }


def memory(name: str, max_parameters: int | None, samples: int, tokens: int) -> float:
    """Memory in MiB that one forward and backward adds to that of the inputs, in this process."""
    torch.set_flush_denormal(True)
    prepare(name, max_parameters, 1, 8)[0]()  # loads libraries and starts threads
    step, _ = prepare(name, max_parameters, samples, tokens)
    if not reset_peak():
        raise OSError("the peak of a process can be measured on Linux only.")
    before = peak_mib()
    step()
    return peak_mib() - before


def table(results: Results) -> Table:
    widths = {
        label: results.of(name)[0]["heads"] for name, label in (("own", "own width"), ("equal", "equal parameters"))
    }
    rows = [["head", *(f"{label}: {column}" for label in widths for column in ("parameters", "time", "MiB"))]]
    for name, (label, *_) in HEADS.items():
        cells = []
        for measured in widths.values():
            head, base = measured[name], measured[BASE]
            mib = "" if head["mib"] is None else f"{head['mib']:.0f}"
            cells += [f"{head['parameters']:,}", f"{head['fastest_ms'] / base['fastest_ms']:.1f}", mib]
        rows.append([label, *cells])
    return rows


STUDY = Study(
    "head_cost",
    CASES,
    run,
    {"heads": table},
    settings={"samples": SHAPE[0], "tokens": SHAPE[1], "dim": DIM, "size": SIZE, "temperature": FRACTION},
    threads=2,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
