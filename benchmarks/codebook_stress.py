"""Codebooks under bad luck: starts that kill codes, a fast encoder, more codes than data, data that change; and cost.

The autoencoder of the recipe digits_soft_vq with 64 codes of 16 dimensions, whose codes start where they should not,
or whose encoder or data do what they should not. What counts are the HARD codes in use on the whole training set at the
end, and the error of the reconstruction. With ``--cost``: time and memory of one step of the quantiser against K.

    python benchmarks/codebook_stress.py           # the grid
    python benchmarks/codebook_stress.py --cost    # keep the other cores free
    python benchmarks/codebook_stress.py --quick

Goes on where an interrupted run ended. Writes ``codebook_stress.json`` and ``codebook_cost.json``.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from _common import forget_peak, load, options, peak_since_mib, plus_minus, quiet_trainer, save
from codebooks import EMA, OURS, RELOCATE, SHARE, annealing, soft
from torch import Tensor

from ddcl_lightning import (
    ConvBackbone,
    ConvDecoder,
    DDCLReadoutModule,
    Head,
    Reconstruction,
    SoftVectorQuantizer,
    TokenNormalized,
)
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.heads import SoftVQ, VQPooling
from ddcl_lightning.integrations.vector_quantize import LibraryVQ
from ddcl_lightning.metrics.clustering_metrics import perplexity, usage
from ddcl_lightning.metrics.codebook_metrics import codebook_counts

SEEDS = (0, 1, 2)
DIM, RATE, EPOCHS = 16, 2e-3, 10
VARIANCE = 0.14  # of the pixels
METHODS: dict[str, Callable[[int], Head]] = {
    OURS: lambda codes: soft()(codes, VARIANCE),
    "VQ-VAE, straight-through": lambda codes: VQPooling(codes, weight=VARIANCE),
    "EMA": lambda codes: LibraryVQ(
        "VectorQuantize",
        {"codebook_size": codes, "decay": EMA["decay"], "rotation_trick": False, "commitment_weight": 0.25},
        weight=VARIANCE,
    ),
    "EMA, expiry": lambda codes: LibraryVQ(
        "VectorQuantize",
        {**EMA, "codebook_size": codes, "kmeans_init": False, "rotation_trick": False, "commitment_weight": 0.25},
        weight=VARIANCE,
    ),
    "rotation trick, expiry": lambda codes: LibraryVQ(
        "VectorQuantize", {**EMA, "codebook_size": codes, "kmeans_init": False, "rotation_trick": True}, weight=VARIANCE
    ),
    "SimVQ": lambda codes: LibraryVQ("SimVQ", {"codebook_size": codes}, weight=VARIANCE),
}
CASES = {
    "all codes equal": {"start": "equal"},
    "all codes far away": {"start": "far"},
    "4 distinct codes": {"start": "duplicates"},
    "encoder rate x 10": {"rate": 10 * RATE},
    "4,096 codes": {"codes": 4096},
    "images inverted half-way": {"shift": True},
}
SIZES = (64, 256, 1024, 4096, 16_384)


class Start(pl.Callback):
    """Codes from the encoder's own tokens, or where they should not be."""

    def __init__(self, start: str, seed: int) -> None:
        self.start, self.seed = start, seed

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: DDCLReadoutModule) -> None:  # type: ignore[override]
        """Replace the codes, wherever the method keeps them."""
        assert trainer.train_dataloader is not None
        images = torch.cat([batch["x"] for batch in trainer.train_dataloader])
        tokens = pl_module.backbone({"x": images})[0].flatten(0, 1)
        generator = torch.Generator().manual_seed(self.seed)
        for place in code_places(pl_module.head):
            size = place.shape[-2]
            codes = tokens[torch.randperm(len(tokens), generator=generator)[:size]]
            noise = 1e-3 * torch.randn(codes.shape, generator=generator)
            if self.start == "equal":
                codes = codes[:1] + noise
            elif self.start == "far":
                codes = codes + 100
            elif self.start == "duplicates":
                codes = codes[:4].repeat(math.ceil(size / 4), 1)[:size] + noise
            place.copy_(codes.expand_as(place))


def code_places(head: Head) -> list[Tensor]:
    """The tensors that hold a head's codes; SimVQ's lie behind a learned projection and stay."""
    if isinstance(head, SoftVQ):
        return [head.quantizer.bank.prototypes]
    if isinstance(head, VQPooling):
        return [head.layer.get_parameter("codebook")]
    assert isinstance(head, LibraryVQ)
    codebook = getattr(head.quantizer_layer, "_codebook", None)
    return [] if codebook is None else [codebook.embed, codebook.embed_avg]


class Shift(pl.Callback):
    """Inverts the images in the second half of the run."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change the batch in place."""
        assert trainer.max_epochs is not None
        if trainer.current_epoch >= trainer.max_epochs / 2:
            batch["x"].neg_().add_(1)


def train(args: argparse.Namespace, case: str, name: str, seed: int) -> dict[str, Any]:
    """One run."""
    settings: dict[str, Any] = CASES[case]
    codes, rate = settings.get("codes", 64), settings.get("rate", RATE)
    pl.seed_everything(seed, verbose=False)
    data = DigitsDataModule(
        batch_size=64, val_fraction=0.2, as_images=True, seed=seed, limit=200 if args.quick else None
    )
    adam = name.startswith("VQ-VAE")
    lr_prototypes = max(10 * RATE if adam else SHARE * rate / RATE, 2 * rate)
    module = DDCLReadoutModule(
        ConvBackbone(1, DIM, (32,)),
        METHODS[name](codes),
        Reconstruction(ConvDecoder(1, (32,)), quantization_weight=0.0),
        prototype_optimizer="Adam" if adam else "TokenNormalized",
        prototype_optimizer_args={} if adam else {"relocate": RELOCATE},
        lr_prototypes=lr_prototypes,
        rho=rate / lr_prototypes,
        lr_task=rate,
    )
    callbacks = [annealing(codes), Start(settings.get("start", ""), seed)]
    shifted = settings.get("shift", False)
    quiet_trainer(1 if args.quick else EPOCHS, [*callbacks, *([Shift()] if shifted else [])]).fit(module, data)
    module.eval()
    counts, error = torch.zeros(1, codes, dtype=torch.int64), []
    with torch.no_grad():
        for batch in data.train_dataloader():
            if shifted:
                batch["x"] = 1 - batch["x"]
            readout = module(batch)
            assert readout.codes is not None
            counts += codebook_counts(readout.codes, codes)
            error.append((module.task.decode(readout.tokens) - batch["x"]).square().flatten(1).mean(1))
    found = {
        "usage": float(usage(counts[0])),
        "perplexity": float(perplexity(counts[0])),
        "mse": float(torch.cat(error).mean()),
    }
    return {"case": case, "method": name, "seed": seed, **{key: round(value, 6) for key, value in found.items()}}


def table(result: dict[str, Any]) -> str:
    """Codes in use as Markdown, with the error in brackets."""
    lines = ["| case | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for case in CASES:
        cells = []
        for name in METHODS:
            runs = [run for run in result["runs"] if run["case"] == case and run["method"] == name]
            if runs:
                error = plus_minus((run["mse"] for run in runs), 4).split(" ")[0]
                cells.append(f"{plus_minus(run['usage'] for run in runs)} ({error})")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prepare(name: str, codes: int, tokens: Tensor) -> Callable[[], None]:
    """One step of a quantiser: forward, backward, and its codes moved."""
    torch.manual_seed(0)
    start = torch.randn(codes, DIM)
    if name == OURS:
        vq = SoftVectorQuantizer(DIM, codes, temperature=0.005)
        vq.bank.set_prototypes(start.unsqueeze(0))
        optimizer = TokenNormalized([vq.bank.prototypes], lr=SHARE, relocate=RELOCATE).watch(vq)

        def ours() -> None:
            tokens.grad = None
            found = vq(tokens)
            (found.quantized.square().mean() + found.terms.loss).backward()
            optimizer.step()
            optimizer.zero_grad()

        return ours
    head = METHODS[name](codes)
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


def prepare_autoencoder(batch_size: int) -> Callable[[], None]:
    """What the quantiser stands beside: encoder and decoder of ``codebooks.py`` on images of 32 x 32 pixels."""
    encoder, decoder = ConvBackbone(1, DIM, (32, 64)), ConvDecoder(1, (64, 32))
    images = torch.rand(batch_size, 1, 32, 32)
    decoder.build(DIM)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], RATE)

    def step() -> None:
        (decoder(encoder({"x": images})[0]) - images).square().mean().backward()
        adam.step()
        adam.zero_grad()

    return step


def _seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a step against K; methods take turns, and the fastest turns count."""
    shape = (2, 64, DIM) if args.quick else (64, 64, DIM)
    rows = []
    autoencoder = prepare_autoencoder(shape[0])
    beside = min(_seconds(autoencoder) for _ in range(2 if args.quick else 12))
    for codes in SIZES[:2] if args.quick else SIZES:
        tokens = torch.randn(*shape, requires_grad=True)
        turns = 2 if args.quick else 12 if codes <= 1024 else 5
        steps, memory = {}, {}
        for name in METHODS:
            steps[name] = prepare(name, codes, tokens)
            steps[name]()
            if forget_peak():
                before = peak_since_mib()
                steps[name]()
                memory[name] = round(peak_since_mib() - before, 1)
        times: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(turns):
            for name, step in steps.items():
                times[name].append(_seconds(step))
        for name in METHODS:
            rows.append(
                {"codes": codes, "method": name, "ms": round(1e3 * min(times[name]), 2), "mib": memory.get(name)}
            )
            print(rows[-1], flush=True)
    setting = {"tokens": shape[0] * shape[1], "dim": DIM, "threads": torch.get_num_threads()}
    return {**setting, "autoencoder_ms": round(1e3 * beside, 2), "rows": rows}


def cost_table(result: dict[str, Any]) -> str:
    """Milliseconds and MiB as Markdown, and the exponent of K between the two largest sizes of the table's ends."""
    sizes = sorted({row["codes"] for row in result["rows"]})
    lines = [
        "| method | " + " | ".join(f"K = {size:,}" for size in sizes) + " | exponent |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for name in METHODS:
        rows = [row for row in result["rows"] if row["method"] == name]
        exponent = math.log(rows[-1]["ms"] / rows[0]["ms"]) / math.log(sizes[-1] / sizes[0])
        cells = [f"{row['ms']:.1f} ms" + ("" if row["mib"] is None else f", {row['mib']:.0f} MiB") for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {exponent:.2f} |")
    times = {(row["method"], row["codes"]): row["ms"] for row in result["rows"]}
    for name in list(METHODS)[1:]:
        ratios = [
            (result["autoencoder_ms"] + times[OURS, size]) / (result["autoencoder_ms"] + times[name, size])
            for size in sizes
        ]
        cells = [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| ours / {name}, with encoder and decoder | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = options(__doc__)
    parser.add_argument("--cost", action="store_true", help="time and memory against K instead of the grid")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    if args.cost or args.quick:
        measured = cost(args)
        save(args.output, "codebook_cost", measured)
        print(cost_table(measured))
    if args.cost:
        return
    result = {} if args.quick else load(args.output, "codebook_stress")
    result.pop("versions", None)
    runs = result.setdefault("runs", [])
    for seed in SEEDS[:1] if args.quick else SEEDS:
        for case in list(CASES)[:1] if args.quick else CASES:
            for name in METHODS:
                if not any((run["case"], run["method"], run["seed"]) == (case, name, seed) for run in runs):
                    runs.append(train(args, case, name, seed))
                    save(args.output, "codebook_stress", result)
                    print(runs[-1], flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
