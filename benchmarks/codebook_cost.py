"""Time and memory of one step of a quantizer against the number of its codes.

Forward, backward, and the codes moved; 4,096 tokens of 16 dimensions, one thread, CPU time. Methods take turns and the
fastest turns count. The whole step has the encoder and the decoder of ``codebooks.py`` beside the quantizer.

    OMP_NUM_THREADS=1 python benchmarks/codebook_cost.py    # keep the other cores free
"""

import math
import time
from collections.abc import Callable

import torch
from _measure import peak_mib, reset_peak
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table
from codebook_stress import DIM, METHODS, RATE, code_places, with_codes
from codebooks import RELOCATE, STEP, create_head
from torch import Tensor

from ddcl_lightning import ConvBackbone, ConvDecoder, SoftVectorQuantizer, TokenNormalized

SAMPLES, PER_SAMPLE = 64, 64
SIZES = (64, 256, 1024, 4096, 16_384, 65_536)
CASES = {f"{codes}": Case(f"K = {codes:,}", {"codes": codes, "methods": ["one-line", *METHODS]}) for codes in SIZES}
BASELINE = "rotation-expiry"
ROWS = ("one-line", "ours", BASELINE, "ema-expiry", "simvq", "vqvae")
LABELS = {"one-line": "**ours, one line**", "ours": "ours, codes by an optimizer", "vqvae": "VQ-VAE, straight-through"}

Step = Callable[[], None]


def prepare(name: str, codes: int, tokens: Tensor) -> Step:
    """One step of a quantizer."""
    torch.manual_seed(0)
    start = torch.randn(codes, DIM)
    if name == "one-line":
        one_line = SoftVectorQuantizer(DIM, codes)
        one_line.bank.set_prototypes(start.unsqueeze(0))

        def moving() -> None:
            tokens.grad = None
            output = one_line(tokens)
            (output.quantized.square().mean() + output.terms).backward()
            one_line.settle()

        return moving
    if name == "ours":
        vq = SoftVectorQuantizer(DIM, codes, code_update="optimizer", temperature=0.005)
        vq.bank.set_prototypes(start.unsqueeze(0))
        optimizer = TokenNormalized([vq.bank.prototypes], lr=STEP, relocation_threshold=RELOCATE).watch(vq)

        def ours() -> None:
            tokens.grad = None
            output = vq(tokens)
            (output.quantized.square().mean() + output.terms.loss).backward()
            optimizer.step()
            optimizer.zero_grad()

        return ours
    head = create_head(with_codes(name, codes), 0.14)
    head.build(DIM)
    for place in code_places(head):
        with torch.no_grad():
            place.copy_(start.expand_as(place))
    parameters = [p for p in head.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, RATE) if parameters else None

    def step() -> None:
        tokens.grad = None
        readout = head(tokens)
        assert readout.regularization is not None
        (readout.tokens.square().mean() + readout.regularization).backward()
        if adam is not None:
            adam.step()
            adam.zero_grad()

    return step


def prepare_autoencoder(batch_size: int) -> Step:
    """Training step of the encoder and decoder around the quantizer, for images of 32 x 32 pixels."""
    encoder, decoder = ConvBackbone(1, DIM, (32, 64)), ConvDecoder(1, (64, 32))
    images = torch.rand(batch_size, 1, 32, 32)
    decoder.build(DIM)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], RATE)

    def step() -> None:
        (decoder(encoder({"x": images})[0]) - images).square().mean().backward()
        adam.step()
        adam.zero_grad()

    return step


def milliseconds(step: Step) -> float:
    start = time.process_time()
    step()
    return 1e3 * (time.process_time() - start)


def run(config: Config, seed: int, options: Options) -> Run:
    """Time and memory of a step with one number of codes."""
    torch.set_flush_denormal(True)
    codes, samples = config["codes"], 2 if options.quick else SAMPLES
    turns = 2 if options.quick else 12 if codes <= 1024 else 5
    autoencoder = prepare_autoencoder(samples)
    beside = min(milliseconds(autoencoder) for _ in range(turns))
    tokens = torch.randn(samples, PER_SAMPLE, DIM, requires_grad=True)
    steps, memory = {}, {}
    for name in config["methods"]:
        steps[name] = prepare(name, codes, tokens)
        steps[name]()
        if reset_peak():
            before = peak_mib()
            steps[name]()
            memory[name] = round(peak_mib() - before, 1)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            times[name].append(milliseconds(step))
    return {
        "ms": {name: round(min(values), 2) for name, values in times.items()},
        "mib": memory,
        "autoencoder_ms": round(beside, 2),
    }


def table(results: Results) -> Table:
    """Milliseconds (MiB) by the number of codes, the exponent of K, and ours over the rotation trick."""
    runs = {results.configs[name]["codes"]: results.of(name)[0] for name in results.where()}
    ends = (runs[min(runs)], runs[max(runs)])
    rows = [["method", *(f"K = {codes:,}" for codes in runs), "exponent"]]
    for name in ROWS:
        cells = [
            f"{run['ms'][name]:{'.1f' if run['ms'][name] < 99.95 else '.0f'}} ms"
            + (f" ({run['mib'][name]:.0f})" if name in run["mib"] else "")
            for run in runs.values()
        ]
        exponent = math.log(ends[1]["ms"][name] / ends[0]["ms"][name]) / math.log(max(runs) / min(runs))
        rows.append([LABELS[name] if name in LABELS else METHODS[name][0], *cells, f"{exponent:.2f}"])
    for ours, other, label in (
        ("one-line", "ema-expiry", "one line / EMA"),
        ("ours", BASELINE, "by an optimizer / rotation trick"),
    ):
        for scope, beside in (("quantizer", 0), ("whole step", 1)):
            ratios = [
                (beside * run["autoencoder_ms"] + run["ms"][ours]) / (beside * run["autoencoder_ms"] + run["ms"][other])
                for run in runs.values()
            ]
            rows.append([f"{label}, {scope}", *(f"{ratio:.2f}" for ratio in ratios), ""])
    return rows


STUDY = Study(
    "codebook_cost",
    CASES,
    run,
    {"step": table},
    settings={"tokens": SAMPLES * PER_SAMPLE, "dim": DIM},
    quick={name: CASES[name] for name in ("64", "256")},
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
