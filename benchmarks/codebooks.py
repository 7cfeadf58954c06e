"""Codebooks side by side: soft codes, straight-through VQ-VAE, and the quantizers of vector-quantize-pytorch.

One encoder, one decoder, the same images, epochs, batches, code dimension and number of codes for all; after every
epoch 2,000 test images are encoded with HARD codes, counted and decoded, and all of them at the end. Every baseline has
the settings that its authors document: k-means start, decay 0.99 and expiry of dead codes for EMA and the rotation
trick; the rotation trick inside of SimVQ; the levels of the FSQ paper. Losses of quantizers are relative to the
variance of the images, as in the VQ-VAE paper.

    python benchmarks/codebooks.py --fashion FOLDER --cifar FILE.npz
    python benchmarks/codebooks.py --fashion FOLDER --cases 'fashion/64/16/*'
"""

import math
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from _measure import quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, extreme, mean, read

from ddcl_lightning import (
    ConvBackbone,
    ConvDecoder,
    DDCLReadoutModule,
    EmbeddingScale,
    Head,
    OptimizerConfig,
    Reconstruction,
    SoftVectorQuantizer,
    Tokens,
)
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import CIFAR10DataModule, DigitsDataModule, FashionMNISTDataModule
from ddcl_lightning.heads import MeanPooling, QuantizerReadout, SoftVQ, VQPooling
from ddcl_lightning.integrations.vector_quantize import LibraryVQ

SEEDS = (0, 1, 2)
EPOCHS, IMAGES = 8, 6_000
EVAL_BATCH = 250
RATE = 1e-3  # of encoder and decoder, cosine
STEP, RELOCATE = 0.05, 0.5  # of the token-normalized step, see TokenNormalized
WATCHED = 2_000  # test images that are evaluated after every epoch; all of them are at the end
LEVELS = {16: [4, 4], 64: [8, 8], 256: [8, 6, 5], 1024: [8, 5, 5, 5]}  # of FSQ; [8, 6, 5] has 240 codes, as its paper

# Soft codes: commitment and bonus (times 64 / K) in units of the images' variance, and the token-normalized step.
SOFT: dict[str, Any] = {
    "quantizer": "soft",
    "commitment": 0.1,
    "bonus": 0.01,
    "optimizer": "TokenNormalized",
    "rate": STEP,
    "optimizer_args": {"relocation_threshold": RELOCATE},
}
STANDARD = {**SOFT, "commitment": 0.25, "bonus": 0.04, "embedding_scale": "per_dimension"}
SLOW = {**SOFT, "commitment": 0.25, "rate": 0.02}
STILL = {**SLOW, "optimizer_args": {}}
EMA = {"decay": 0.99, "kmeans_init": True, "threshold_ema_dead_code": 2}
MOVING = {**EMA, "rotation_trick": False, "commitment_weight": 0.25}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("no bottleneck", {"quantizer": "none"}),
    "ours": ("**ours**", SOFT),
    "ours-standardized": ("**ours, standardized**", {**STANDARD, "project": True}),
    "ours-standardized-wide": ("ours, standardized, 16 dimensions", STANDARD),
    "one-line": ("ours in one line, codes move inside", {"quantizer": "one_line"}),
    "slow": ("(a) ours, more commitment (.25), slower (2 %)", SLOW),
    "slow-error": (
        "(a), relocation by error alone",
        {**SLOW, "optimizer_args": {"relocation_threshold": RELOCATE, "load_exponent": 0.0}},
    ),
    "slow-still": ("(a), no relocation", STILL),
    "slow-still-soft": ("(a), no relocation, soft output", {**STILL, "training_output": "soft"}),
    "paper": (
        "the paper's recipe (Adam, soft gradient, no bonus)",
        {
            "quantizer": "soft",
            "commitment": 0.25,
            "bonus": 0.0,
            "training_output": "soft",
            "gradient": "soft",
            "optimizer": "Adam",
            "rate": 10 * RATE,
            "annealing_start": 0.05,  # the rule for K is ours
        },
    ),
    "vqvae": ("VQ-VAE, straight-through", {"quantizer": "vqvae", "optimizer": "Adam", "rate": 10 * RATE}),
    "ema": ("EMA, k-means start, expiry", {"quantizer": "VectorQuantize", "arguments": MOVING}),
    # Documented by nobody: what the tokens alone bring.
    "ema-standardized": (
        "EMA, k-means start, expiry, standardized",
        {"quantizer": "VectorQuantize", "arguments": MOVING, "standardised_backbone": True},
    ),
    "rotation": ("rotation trick", {"quantizer": "VectorQuantize", "arguments": {**EMA, "rotation_trick": True}}),
    "simvq": ("SimVQ", {"quantizer": "SimVQ", "arguments": {}}),
    "fsq": ("FSQ", {"quantizer": "FSQ"}),
    "lfq": ("LFQ", {"quantizer": "LFQ", "arguments": {}}),
}
COMPARED = ("ours", "ours-standardized", "one-line", "ema", "ema-standardized", "rotation", "simvq", "fsq", "lfq")
WIDE = ("ours-standardized-wide", "slow-error", "vqvae", "paper")
OTHER_DIM = ("ours", "ours-standardized", "slow", "ema", "rotation", "fsq")
# Data, codes, dimension of the codes: methods, and those that have fewer seeds.
TABLES: dict[str, tuple[tuple[str, int, int], tuple[str, ...], dict[str, tuple[int, ...]]]] = {
    "fashion-64": (
        ("fashion", 64, 16),
        (*COMPARED, *WIDE, "none", "slow", "slow-still", "slow-still-soft"),
        {"none": (0,), "paper": (0,), "slow-still-soft": (0,)},
    ),
    "cifar10-64": (("cifar10", 64, 16), (*COMPARED, *WIDE), {"slow-error": (0, 1)}),
    "fashion-1024": (("fashion", 1024, 16), COMPARED, {}),
    "cifar10-1024": (("cifar10", 1024, 16), COMPARED, {}),
    "fashion-16": (("fashion", 16, 16), ("ours", "slow", "vqvae", "paper"), {"slow": (0,)}),
    "cifar10-16": (("cifar10", 16, 16), ("ours", "vqvae", "paper"), dict.fromkeys(("ours", "vqvae", "paper"), (0,))),
    "fashion-64-d8": (("fashion", 64, 8), OTHER_DIM, dict.fromkeys(OTHER_DIM, (0,))),
    "fashion-64-d64": (
        ("fashion", 64, 64),
        OTHER_DIM,
        dict.fromkeys(("ours", "slow", "rotation", "fsq"), (0,)),
    ),
}


def case(method: str, data: str, codes: int, dim: int, seeds: tuple[int, ...] | None = None) -> Case:
    """A method with the number of its codes."""
    label, config = METHODS[method]
    config = {"data": data, "codes": codes, "dim": dim, **config}
    if "arguments" in config:
        config["arguments"] = {"codebook_size": codes, **config["arguments"]}
    if method == "fsq":
        config["arguments"] = {"levels": LEVELS[codes]}
    if config.pop("project", False) and codes <= 64:
        config["code_dim"] = 8  # few codes have no use for many dimensions
    needs = {"fashion": ("fashion",), "cifar10": ("cifar",), "digits": ()}[data]
    return Case(label, config, needs, seeds)


CASES = {
    f"{'/'.join(map(str, place))}/{method}": case(method, *place, fewer.get(method))
    for place, methods, fewer in TABLES.values()
    for method in methods
}
QUICK = {f"digits/16/16/{method}": case(method, "digits", 16, 16) for method in METHODS}


def create_head(config: Config, variance: float) -> Head:
    """A quantizer whose losses suit a reconstruction loss of images of this variance."""
    quantizer, codes = config["quantizer"], config["codes"]
    if quantizer == "none":
        return MeanPooling()
    if quantizer == "one_line":
        return QuantizerReadout(SoftVectorQuantizer(config["dim"], codes))
    if quantizer == "vqvae":
        return VQPooling(codes, weight=variance)
    if quantizer != "soft":
        return LibraryVQ(quantizer, dict(config["arguments"]), weight=variance)
    names = ("embedding_scale", "code_dim", "training_output", "gradient")
    return SoftVQ(
        codes,
        commitment_weight=config["commitment"] * variance,
        # The bonus pulls at a token by 1 / T, so that its weight goes with the temperature.
        entropy_weight=config["bonus"] * 64 / codes * variance,
        **{name: config[name] for name in names if name in config},
    )


def annealing(codes: int, start: float | None = None) -> TemperatureAnnealing:
    """From a fraction of the critical temperature to a hundredth of it; cells shrink with K, so T does."""
    start = min(0.2, 0.05 * 64 / codes) if start is None else start
    return TemperatureAnnealing(start=start, end=start / 100, interval="step")


class StandardisedBackbone(ConvBackbone):
    """Tokens as ours are before they are quantized, for a baseline that has no such option."""

    def __init__(self, in_channels: int, embed_dim: int, widths: tuple[int, ...], code_dim: int) -> None:
        super().__init__(in_channels, embed_dim, widths)
        self.code_projection = torch.nn.Linear(embed_dim, code_dim) if code_dim != embed_dim else torch.nn.Identity()
        self.scale = EmbeddingScale(code_dim, "per_dimension")
        self.embed_dim = code_dim

    def forward(self, batch: Batch) -> Tokens:
        """Projected and standardized tokens ``(B, T, code_dim)``."""
        return Tokens(self.scale(self.code_projection(super().forward(batch)[0])))


class History(pl.Callback):
    """Metrics of the test set after every epoch, and seconds per training step."""

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
        """Keep the metrics."""
        self.epochs.append(metrics(trainer, "val"))
        entropy = trainer.callback_metrics.get("train/code_entropy")
        if entropy is not None:
            self.epochs[-1]["soft_perplexity"] = round(math.exp(float(entropy)), 3)


def metrics(trainer: pl.Trainer, stage: str) -> dict[str, float]:
    """Results of the last pass over a set."""
    logged = {
        name: trainer.callback_metrics.get(f"{stage}/{name}") for name in ("mse", "psnr", "ssim", "usage", "perplexity")
    }
    return {name: round(float(value), 6) for name, value in logged.items() if value is not None}


def data_module(config: Config, seed: int, options: Options) -> tuple[pl.LightningDataModule, int]:
    """Images and their channels."""
    common: dict[str, Any] = {"batch_size": 64, "eval_batch_size": EVAL_BATCH, "seed": seed}
    if config["data"] == "fashion":
        return FashionMNISTDataModule(path=str(options.fashion), limit=IMAGES, **common), 1
    if config["data"] == "cifar10":
        return CIFAR10DataModule(path=str(options.cifar), limit=IMAGES, **common), 3
    return DigitsDataModule(**common, val_fraction=0.2, as_images=True, limit=200), 1


def run(config: Config, seed: int, options: Options) -> Run:
    """Train, and evaluate after every epoch."""
    torch.set_flush_denormal(True)
    pl.seed_everything(seed, verbose=False)
    data, channels = data_module(config, seed, options)
    data.setup("fit")
    variance = float(next(iter(data.val_dataloader()))["x"].var())
    widths = (16,) if options.quick else (32, 64)
    backbone = ConvBackbone(channels, config["dim"], widths)
    if config.get("standardised_backbone"):
        code_dim = 8 if config["codes"] <= 64 else config["dim"]
        backbone = StandardisedBackbone(channels, config["dim"], widths, code_dim)
    rate = config.get("rate", STEP)
    module = DDCLReadoutModule(
        backbone,
        create_head(config, variance),
        Reconstruction(ConvDecoder(channels, widths[::-1]), quantization_weight=0.0),
        prototype_optimizer=OptimizerConfig(
            config.get("optimizer", "TokenNormalized"), config.get("optimizer_args", {})
        ),
        lr_prototypes=rate,
        rho=RATE / rate,
        lr_task=RATE,
        lr_schedule="cosine",
    )
    history = History()
    callbacks = [
        annealing(config["codes"], config.get("annealing_start")),
        KMeansInitialization(num_restarts=1, max_tokens=16_384, progress=False),
        history,
    ]
    watched = 1.0 if options.quick else WATCHED // EVAL_BATCH
    trainer = quiet_trainer(1 if options.quick else EPOCHS, callbacks, limit_val_batches=watched)
    trainer.fit(module, datamodule=data)
    trainer.test(module, data, verbose=False)
    step = round(1e3 * history.seconds / history.steps, 2)
    return {"step_ms": step, "test": metrics(trainer, "test"), "epochs": history.epochs}


def until_full(runs: list[Run]) -> str:
    """The epoch after which all codes were in use first, per seed where some never were."""
    if "usage" not in runs[0]["epochs"][0]:
        return ""
    epochs = [
        next((place for place, epoch in enumerate(run["epochs"], 1) if epoch["usage"] == 1), None) for run in runs
    ]
    reached = [epoch for epoch in epochs if epoch is not None]
    if not reached:
        return "never"
    if len(reached) < len(epochs):
        return ", ".join("never" if epoch is None else str(epoch) for epoch in epochs)
    return " to ".join(dict.fromkeys(str(pick(reached)) for pick in (min, max)))


def least_used(run: Run) -> float | None:
    return min((epoch["usage"] for epoch in run["epochs"] if "usage" in epoch), default=None)


def of_codes(run: Run, codes: int) -> float | None:
    """Perplexity over K."""
    return run["test"]["perplexity"] / codes if "perplexity" in run["test"] else None


def table(results: Results, data: str, codes: int, dim: int) -> Table:
    """The methods by their error."""
    cases = results.where(data=data, codes=codes, dim=dim)
    cases.sort(key=lambda name: statistics.fmean(read(results.of(name), "test.mse")))
    columns = {
        "seeds": lambda runs: f"{len(runs)}",
        "test MSE": mean("test.mse", ".5f"),
        "SSIM": mean("test.ssim", deviation=False),
        "perplexity / K": mean(lambda run: of_codes(run, codes), deviation=False),
        "used, epoch 1": mean(lambda run: run["epochs"][0].get("usage"), deviation=False),
        "used, end": mean("test.usage", deviation=False),
        "least used": extreme(min, least_used),
        "epochs to 100 %": until_full,
    }
    return results.table("method", cases, columns)


STUDY = Study(
    "codebooks",
    CASES,
    run,
    {name: lambda results, place=place: table(results, *place) for name, (place, _, _) in TABLES.items()},
    seeds=SEEDS,
    settings={"epochs": EPOCHS, "images": IMAGES, "rate": RATE},
    quick=QUICK,
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
