"""Codebooks side by side: soft codes, straight-through VQ-VAE, and the quantisers of vector-quantize-pytorch.

One encoder, one decoder, the same images, epochs, batches, code dimension and number of codes for all; after every
epoch 2,000 test images are encoded with HARD codes, counted and decoded, and all of them at the end. Every rival has
the settings that its authors document: k-means start, decay 0.99 and expiry of dead codes for EMA and the rotation
trick; the rotation trick inside of SimVQ; the levels of the FSQ paper. Losses of quantisers are relative to the
variance of the images, as in the VQ-VAE paper.

    python benchmarks/codebooks.py --data fashion --images FOLDER --codes 64       # or cifar10, FILE.npz
    python benchmarks/codebooks.py --quick

Goes on where an interrupted run ended. Writes ``codebooks_DATA_CODES.json``,
with ``_dD`` for another dimension.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import load, options, plus_minus, quiet_trainer, save

from ddcl_lightning import (
    ConvBackbone,
    ConvDecoder,
    DDCLReadoutModule,
    EmbeddingScale,
    Head,
    Reconstruction,
    Tokens,
)
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import CIFAR10DataModule, DigitsDataModule, FashionMNISTDataModule
from ddcl_lightning.heads import MeanPooling, SoftVQ, VQPooling
from ddcl_lightning.integrations.vector_quantize import LibraryVQ

SEEDS = (0, 1, 2)
DIM = 16
EVAL_BATCH = 250
RATE = 1e-3  # of encoder and decoder, cosine
SHARE, RELOCATE = 0.05, 0.5  # of the way that our codes go in a step; of the mean load, see TokenNormalized
WATCHED = 2_000  # test images that are looked at after every epoch; all of them are at the end
LEVELS = {16: [4, 4], 64: [8, 8], 256: [8, 6, 5], 1024: [8, 5, 5, 5]}  # of FSQ; [8, 6, 5] has 240 codes, as its paper
EMA = {"decay": 0.99, "kmeans_init": True, "threshold_ema_dead_code": 2}

OURS, PAPER = "soft codes", "soft codes as in the paper, Adam"
STANDARD, WIDE = "soft codes, standardised tokens", "soft codes, standardised tokens, not projected"
EMA_STANDARD = "EMA, k-means, expiry, standardised tokens"  # not documented by anybody: what the tokens alone bring
SLOW = "soft codes, more commitment, slower"  # and what was tried with it
BY_ERROR, STILL = f"{SLOW}, relocation by error", f"{SLOW}, no relocation"
SOFT = f"{STILL}, soft output"


Create = Callable[[int, float], Head]  # number of codes, variance of the images


def soft(commitment: float = 0.1, entropy: float = 0.01, **options: Any) -> Create:
    """Soft codes whose weights suit a reconstruction loss in units of the images' variance.

    The bonus pulls at a token by 1 / T, so that its weight goes with the temperature.
    """

    def create(codes: int, variance: float) -> Head:
        weights = {"commitment_weight": commitment * variance, "entropy_weight": entropy * 64 / codes * variance}
        return SoftVQ(codes, **{**weights, **options})

    return create


def annealing(codes: int) -> TemperatureAnnealing:
    """From a fraction of the critical temperature to a hundredth of it; cells shrink with K, so T does."""
    start = min(0.2, 0.05 * 64 / codes)
    return TemperatureAnnealing(start=start, end=start / 100, per="step")


def compact(codes: int) -> int | None:
    """Dimensions that standardised tokens are projected to: few codes have no use for many."""
    return 8 if codes <= 64 else None


def standardised(code_dim: Callable[[int], int | None]) -> Create:
    """Soft codes of standardised tokens, which bear more commitment and a larger bonus."""

    def create(codes: int, variance: float) -> Head:
        return soft(0.25, 0.04, embedding_scale="per_dimension", code_dim=code_dim(codes))(codes, variance)

    return create


class StandardisedBackbone(ConvBackbone):
    """Tokens as ours are before they are quantised, for a rival that has no such option."""

    def __init__(self, in_channels: int, embed_dim: int, widths: tuple[int, ...], code_dim: int) -> None:
        super().__init__(in_channels, embed_dim, widths)
        self.code_projection = torch.nn.Linear(embed_dim, code_dim) if code_dim != embed_dim else torch.nn.Identity()
        self.scale = EmbeddingScale(code_dim, "per_dimension")
        self.embed_dim = code_dim

    def forward(self, batch: Batch) -> Tokens:
        """Projected and standardised tokens ``(B, T, code_dim)``."""
        return Tokens(self.scale(self.code_projection(super().forward(batch)[0])))


def ema(codes: int, variance: float) -> Head:
    """Codes as moving averages, with the settings that the library documents."""
    arguments = {"codebook_size": codes, **EMA, "rotation_trick": False, "commitment_weight": 0.25}
    return LibraryVQ("VectorQuantize", arguments, weight=variance)


METHODS: dict[str, Create] = {
    "no bottleneck": lambda codes, variance: MeanPooling(),
    OURS: soft(),
    STANDARD: standardised(compact),
    WIDE: standardised(lambda codes: None),
    SLOW: soft(0.25),
    BY_ERROR: soft(0.25),
    STILL: soft(0.25),
    SOFT: soft(0.25, training_output="soft"),
    f"{SOFT} and gradient": soft(0.25, training_output="soft", gradient="soft"),
    PAPER: soft(0.25, entropy_weight=0.0, training_output="soft", gradient="soft"),
    "VQ-VAE, straight-through": lambda codes, variance: VQPooling(codes, weight=variance),
    "EMA, k-means, expiry": ema,
    EMA_STANDARD: ema,
    "rotation trick": lambda codes, variance: LibraryVQ(
        "VectorQuantize", {"codebook_size": codes, **EMA, "rotation_trick": True}, weight=variance
    ),
    "SimVQ": lambda codes, variance: LibraryVQ("SimVQ", {"codebook_size": codes}, weight=variance),
    "FSQ": lambda codes, variance: LibraryVQ("FSQ", {"levels": LEVELS[codes]}, weight=variance),
    "LFQ": lambda codes, variance: LibraryVQ("LFQ", {"codebook_size": codes}, weight=variance),
}


class History(pl.Callback):
    """Figures of the test set after every epoch, and seconds per training step."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.seconds, self.steps, self._start = 0.0, 0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the start."""
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation runs inside of the last step of an epoch and does not count."""
        self.seconds += time.perf_counter() - self._start
        self.steps = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the figures."""
        self.epochs.append(figures(trainer, "val"))
        entropy = trainer.callback_metrics.get("train/code_entropy")
        if entropy is not None:
            self.epochs[-1]["soft_perplexity"] = round(math.exp(float(entropy)), 3)


def figures(trainer: pl.Trainer, stage: str) -> dict[str, float]:
    """What the last pass over a set found."""
    names = ("mse", "psnr", "ssim", "usage", "perplexity")
    found = {name: trainer.callback_metrics.get(f"{stage}/{name}") for name in names}
    return {name: round(float(value), 6) for name, value in found.items() if value is not None}


def data_module(args: argparse.Namespace, seed: int) -> tuple[pl.LightningDataModule, int]:
    """Images and their channels."""
    common: dict[str, Any] = {"batch_size": 64, "eval_batch_size": EVAL_BATCH, "seed": seed}
    if args.quick:
        return DigitsDataModule(**common, val_fraction=0.2, as_images=True, limit=200), 1
    if args.data == "fashion":
        return FashionMNISTDataModule(path=str(args.images), limit=args.limit, **common), 1
    return CIFAR10DataModule(path=str(args.images), limit=args.limit, **common), 3


def train(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run."""
    pl.seed_everything(seed, verbose=False)
    data, channels = data_module(args, seed)
    data.setup("fit")
    images = next(iter(data.val_dataloader()))["x"]
    variance = float(images.var())
    widths = (16,) if args.quick else (32, 64)
    adam = name.startswith("VQ-VAE") or name == PAPER
    lr_prototypes = 10 * RATE if adam else 0.02 if name.startswith(SLOW) else SHARE  # a rate of Adam, or a share
    relocation: dict[str, Any] = {} if adam or name.startswith(STILL) else {"relocate": RELOCATE}
    if name == BY_ERROR:
        relocation["balance"] = 0.0
    backbone = ConvBackbone(channels, args.dim, widths)
    if name == EMA_STANDARD:
        backbone = StandardisedBackbone(channels, args.dim, widths, compact(args.codes) or args.dim)
    module = DDCLReadoutModule(
        backbone,
        METHODS[name](args.codes, variance),
        Reconstruction(ConvDecoder(channels, widths[::-1]), quantization_weight=0.0),
        prototype_optimizer="Adam" if adam else "TokenNormalized",
        prototype_optimizer_args=relocation,
        lr_prototypes=lr_prototypes,
        rho=RATE / lr_prototypes,
        lr_task=RATE,
        lr_schedule="cosine",
    )
    history = History()
    callbacks = [
        annealing(64 if name == PAPER else args.codes),  # the rule for K is ours
        KMeansInitialization(num_restarts=1, max_tokens=16_384, progress=False),
        history,
    ]
    watched = 1.0 if args.quick else WATCHED // EVAL_BATCH
    trainer = quiet_trainer(1 if args.quick else args.epochs, callbacks, limit_val_batches=watched)
    trainer.fit(module, datamodule=data)
    trainer.test(module, data, verbose=False)
    step = 1e3 * history.seconds / history.steps
    result = {"method": name, "seed": seed, "step_ms": round(step, 2), "test": figures(trainer, "test")}
    return {**result, "epochs": history.epochs}


def table(result: dict[str, Any], codes: int) -> str:
    """The rows as Markdown."""
    lines = ["| method | hard MSE | perplexity / K | usage, first epoch | usage, last | smallest | ms per step |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in METHODS:
        runs = [run for run in result["runs"] if run["method"] == name]
        if not runs:
            continue
        last = [run["test"] for run in runs]
        cells = [plus_minus((found["mse"] for found in last), 5)]
        if "usage" in last[0]:
            cells.append(plus_minus(found["perplexity"] / codes for found in last))
            cells.append(plus_minus(run["epochs"][0]["usage"] for run in runs))
            cells.append(plus_minus(found["usage"] for found in last))
            cells.append(f"{min(epoch['usage'] for run in runs for epoch in run['epochs']):.3f}")
        else:
            cells += ["-"] * 4
        # Figures from a machine that did other things too are kept without their times.
        times = [run["step_ms"] for run in runs if "step_ms" in run]
        cells.append(f"{min(times):.0f}" if times else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = options(__doc__)
    parser.add_argument("--data", choices=("fashion", "cifar10"), default="fashion")
    parser.add_argument("--images", type=Path, help="folder of idx files, or CIFAR-10 as a folder or .npz")
    parser.add_argument("--codes", type=int, choices=tuple(LEVELS), default=64)
    parser.add_argument("--dim", type=int, default=DIM, help="dimension of tokens and codes")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=6_000, help="training images")
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    if args.quick:
        args.codes, args.seeds = 16, SEEDS[:1]
    elif args.images is None:
        parser.error("--images is needed: where the images are")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_flush_denormal(True)
    name = (
        "codebooks"
        if args.quick
        else f"codebooks_{args.data}_{args.codes}" + (f"_d{args.dim}" if args.dim != DIM else "")
    )
    result = {} if args.quick else load(args.output, name)
    result.pop("versions", None)
    result["settings"] = {
        "epochs": args.epochs,
        "limit": args.limit,
        "codes": args.codes,
        "dim": args.dim,
        "rate": RATE,
    }
    runs = result.setdefault("runs", [])
    for seed in args.seeds:
        for method in args.methods:
            if not any(run["method"] == method and run["seed"] == seed for run in runs):
                runs.append(train(args, method, seed))
                save(args.output, name, result)
                print(method, seed, runs[-1]["epochs"][-1], runs[-1]["step_ms"], flush=True)
    print(table(result, args.codes))


if __name__ == "__main__":
    main()
