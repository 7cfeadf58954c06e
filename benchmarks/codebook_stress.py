"""Codebooks under adverse conditions: starts that kill codes, a fast encoder, more codes than data, data that change.

The autoencoder of the recipe digits_soft_vq with 64 codes of 16 dimensions, whose codes start where they should not,
or whose encoder or data do what they should not. What counts are the HARD codes in use on the whole training set at the
end, and the error of the reconstruction.

    python benchmarks/codebook_stress.py
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from _measure import quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, mean
from codebooks import EMA, RELOCATE, SOFT, STEP, annealing, create_head
from torch import Tensor

from ddcl_lightning import ConvBackbone, ConvDecoder, DDCLReadoutModule, Head, OptimizerConfig, Reconstruction
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.heads import SoftVQ, VQPooling
from ddcl_lightning.integrations.vector_quantize import LibraryVQ
from ddcl_lightning.metrics.clustering_metrics import perplexity, usage
from ddcl_lightning.metrics.codebook_metrics import codebook_counts

DIM, RATE, EPOCHS = 16, 2e-3, 10
VARIANCE = 0.14  # of the pixels
NO_START = {**EMA, "kmeans_init": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", SOFT),
    "vqvae": ("VQ-VAE", {"quantizer": "vqvae", "optimizer": "Adam"}),
    "ema": (
        "EMA",
        {
            "quantizer": "VectorQuantize",
            "arguments": {"decay": EMA["decay"], "rotation_trick": False, "commitment_weight": 0.25},
        },
    ),
    "ema-expiry": (
        "EMA, expiry",
        {
            "quantizer": "VectorQuantize",
            "arguments": {**NO_START, "rotation_trick": False, "commitment_weight": 0.25},
        },
    ),
    "rotation-expiry": (
        "rotation trick, expiry",
        {"quantizer": "VectorQuantize", "arguments": {**NO_START, "rotation_trick": True}},
    ),
    "simvq": ("SimVQ", {"quantizer": "SimVQ", "arguments": {}}),
}
CONDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "equal": ("all codes equal", {"start": "equal"}),
    "far": ("all codes far away", {"start": "far"}),
    "duplicates": ("4 distinct codes", {"start": "duplicates"}),
    "fast-encoder": ("encoder rate x 10", {"encoder_rate": 10 * RATE}),
    "many-codes": ("4,096 codes", {"codes": 4096}),
    "inverted": ("images inverted half-way", {"inverted": True}),
}


def with_codes(method: str, codes: int) -> dict[str, Any]:
    """The configuration of a method for a number of codes."""
    config = {"codes": codes, **METHODS[method][1]}
    if "arguments" in config:
        config["arguments"] = {"codebook_size": codes, **config["arguments"]}
    return config


CASES = {
    f"{condition}/{method}": Case(
        label, {**with_codes(method, config.get("codes", 64)), **config, "condition": condition}
    )
    for condition, (label, config) in CONDITIONS.items()
    for method in METHODS
}


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
        return [head.quantizer.codebook]
    assert isinstance(head, LibraryVQ)
    codebook = getattr(head.quantizer.layer, "_codebook", None)
    return [] if codebook is None else [codebook.embed, codebook.embed_avg]


class Inversion(pl.Callback):
    """Inverts the images in the second half of the run."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change the batch in place."""
        assert trainer.max_epochs is not None
        if trainer.current_epoch >= trainer.max_epochs / 2:
            batch["x"].neg_().add_(1)


def run(config: Config, seed: int, options: Options) -> Run:
    """Train, and count the codes in use."""
    torch.set_flush_denormal(True)
    codes, rate, inverted = config["codes"], config.get("encoder_rate", RATE), config.get("inverted", False)
    pl.seed_everything(seed, verbose=False)
    limit = 200 if options.quick else None
    data = DigitsDataModule(batch_size=64, val_fraction=0.2, as_images=True, seed=seed, limit=limit)
    adam = config.get("optimizer") == "Adam"
    optimizer = (
        OptimizerConfig("Adam") if adam else OptimizerConfig("TokenNormalized", {"relocation_threshold": RELOCATE})
    )
    lr_prototypes = max(10 * RATE if adam else STEP * rate / RATE, 2 * rate)
    module = DDCLReadoutModule(
        ConvBackbone(1, DIM, (32,)),
        create_head(config, VARIANCE),
        Reconstruction(ConvDecoder(1, (32,)), quantization_weight=0.0),
        prototype_optimizer=optimizer,
        lr_prototypes=lr_prototypes,
        rho=rate / lr_prototypes,
        lr_task=rate,
    )
    callbacks = [annealing(codes), Start(config.get("start", ""), seed), *([Inversion()] if inverted else [])]
    quiet_trainer(1 if options.quick else EPOCHS, callbacks).fit(module, data)
    module.eval()
    counts, errors = torch.zeros(1, codes, dtype=torch.int64), []
    with torch.no_grad():
        for batch in data.train_dataloader():
            if inverted:
                batch["x"] = 1 - batch["x"]
            readout = module(batch)
            assert readout.codes is not None
            counts += codebook_counts(readout.codes, codes)
            errors.append((module.task.decode(readout.tokens) - batch["x"]).square().flatten(1).mean(1))
    scores = {"usage": usage(counts[0]), "perplexity": perplexity(counts[0]), "mse": torch.cat(errors).mean()}
    return {name: round(float(value), 6) for name, value in scores.items()}


def pivot(results: Results, cell: Any) -> Table:
    """A row per condition, a column per method."""
    rows = [["condition", *(label for label, _ in METHODS.values())]]
    for condition, (label, _) in CONDITIONS.items():
        rows.append([label, *(cell(results.of(f"{condition}/{method}")) for method in METHODS)])
    return rows


def usage_cell(runs: list[Run]) -> str:
    return f"{mean('usage')(runs)} ({mean('mse', '.4f', deviation=False)(runs)})" if runs else ""


STUDY = Study(
    "codebook_stress",
    CASES,
    run,
    {
        "usage": lambda results: pivot(results, usage_cell),
        "perplexity": lambda results: pivot(results, mean("perplexity", ",.0f", deviation=False)),
    },
    seeds=(0, 1, 2),
    settings={"dim": DIM, "rate": RATE, "epochs": EPOCHS},
    quick={f"equal/{method}": CASES[f"equal/{method}"] for method in METHODS},
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
