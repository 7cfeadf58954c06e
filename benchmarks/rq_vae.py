"""Semantic IDs: an RQ-VAE of the field's shape on sentence embeddings, with three kinds of residual quantizers.

The trainer is that of public RQ-VAE repositories: an MLP 384-512-256-32 without biases and its mirror, three levels of
256 codes, AdamW, squared errors summed over dimensions. Items are 20 Newsgroups posts (by date) and SST-2 phrases,
embedded by MiniLM; half of the phrases and the later posts are held out. Reported on held-out items: the error of the
reconstruction relative to the variance, the share of items whose ID another item has too, codes used and perplexity of
every level, and the effective dimension of what the encoder gives. Fewer collisions come mostly with fewer directions
and more error, so all are shown.

    python benchmarks/rq_vae.py --encoder FOLDER --texts FOLDER [--cache FOLDER]
"""

import time
from itertools import pairwise
from typing import Any

import torch
from _residual_quantizers import create
from _study import ROOT, Case, Options, Study
from _tables import Cell, Config, Results, Run, Table, extreme, mean
from _text_embeddings import embeddings
from torch import Tensor, nn

from ddcl_lightning.functional import effective_dimension
from ddcl_lightning.metrics.clustering_metrics import perplexity, usage

SEEDS = (0, 1, 2)
HIDDEN, DIM, CODES, LEVELS = (512, 256), 32, 256, 3
STEPS, BATCH, RATE = 1_500, 256, 1e-3
START = 4_096  # training items of the k-means start of the baselines; ours collects its own batches
VALIDATION = 2_000  # held-out items by which settings are chosen; the others are the test
EMA = {"decay": 0.8, "threshold_ema_dead_code": 2, "rotation_trick": False}
# Batches have one token per code: an expiry at 2 replaces most codes at every step.
GENTLE = {"decay": 0.99, "threshold_ema_dead_code": 0.1, "rotation_trick": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "continuous": ("no quantizer", {"quantizer": "none"}),
    "public": (
        "public recipe (straight through, k-means start)",
        {"quantizer": "straight_through", "commitment": 0.25},
    ),
    **{
        f"library-{name}-{weight}": (
            f"ResidualVQ, {title}, commitment {weight}",
            {"quantizer": "ResidualVQ", "arguments": {**arguments, "commitment_weight": weight}},
        )
        for name, title, arguments in (("ema", "expiry 2, decay .8", EMA), ("gentle", "expiry .1, decay .99", GENTLE))
        for weight in (1.0, 8.0)  # a mean over 32 dimensions: 8 is .25 as a sum
    },
    "ours": ("**ours**", {"quantizer": "ours", "arguments": {}}),
    **{
        f"ours-{ratio}": (
            f"ours, commitment ratio {ratio}",
            {"quantizer": "ours", "arguments": {"commitment_ratio": ratio}},
        )
        for ratio in (0.7, 1.0, 2.0)
    },
}
TITLES = {"sst2": "SST-2", "newsgroups": "20 Newsgroups"}


def case(method: str, data: str, **changes: Any) -> Case:
    """A quantizer on a set of items."""
    label, config = METHODS[method]
    sizes = {"data": data, "dim": DIM, "codes": CODES, "levels": LEVELS, "steps": STEPS}
    return Case(label, {**sizes, **config, **changes}, ("encoder", "texts"))


CASES = {f"{data}/{method}": case(method, data) for data in TITLES for method in METHODS}
QUICK = {f"tiny/{method}": case(method, "sst2", codes=4, levels=2, steps=10) for method in METHODS}


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers without bias, ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(config: Config, seed: int, options: Options) -> Run:
    """Train, and measure held-out items."""
    torch.set_flush_denormal(True)
    assert options.encoder is not None
    assert options.texts is not None
    items = embeddings(config["data"], options.encoder, options.texts, options.cache or ROOT / "feature_cache")
    train, held_out = items["train"], items["test"]
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    splits = {"validation": held_out[order[:VALIDATION]], "test": held_out[order[VALIDATION:]]}
    if options.quick:
        splits["test"] = held_out
    torch.manual_seed(seed)
    width = train.shape[1]
    encoder, decoder = mlp(width, *HIDDEN, config["dim"]), mlp(config["dim"], *HIDDEN[::-1], width)
    levels = None if config["quantizer"] == "none" else create(dict(config))
    model = nn.ModuleList([encoder, decoder, *([] if levels is None else [levels])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    start = time.process_time()
    if levels is not None and hasattr(levels, "start"):
        with torch.no_grad():
            levels.start(encoder(train[torch.randperm(len(train))[:START]]), seed)
    model.train()
    for _ in range(config["steps"]):
        x = train[torch.randint(len(train), (BATCH,))]
        z = encoder(x)
        quantized, _, loss = (z, None, z.new_zeros(())) if levels is None else levels(z)
        error = (decoder(quantized) - x).square().sum(-1).mean()
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
    seconds = round(time.process_time() - start, 1)
    model.eval()
    results = {name: measure(encoder, decoder, levels, x, config) for name, x in {**splits, "train": train}.items()}
    return {"seconds": seconds, **results}


@torch.no_grad()
def measure(encoder: nn.Module, decoder: nn.Module, levels: nn.Module | None, x: Tensor, config: Config) -> Run:
    """Error, collisions and codes of some items."""
    z = encoder(x)
    quantized, indices, _ = (z, None, None) if levels is None else levels(z)
    variance = (x - x.mean(0)).square().sum(-1).mean()
    result: Run = {
        "error": round(float((decoder(quantized) - x).square().sum(-1).mean() / variance), 5),
        "effective_dimension": round(float(effective_dimension(z.double())), 2),
        "variance": float(f"{float(z.var(0).sum()):.4g}"),
    }
    if indices is not None:
        counts = [torch.bincount(level, minlength=config["codes"]) for level in indices.T]
        number = torch.unique(indices, dim=0, return_counts=True)[1]
        result["used"] = [round(float(usage(count)), 4) for count in counts]
        result["perplexity"] = [round(float(perplexity(count)), 1) for count in counts]
        result["colliding"] = round(float(number[number > 1].sum() / len(x)), 5)
    return result


def per_level(value: str, form: str) -> Cell:
    """Mean over the seeds for every level."""

    def cell(runs: list[Run]) -> str:
        if value not in runs[0]["test"]:
            return ""
        levels = range(len(runs[0]["test"][value]))
        return ", ".join(
            mean(lambda run, level=level: run["test"][value][level], form, deviation=False)(runs) for level in levels
        )

    return cell


def table(results: Results, data: str) -> Table:
    """The quantizers on one set of items."""
    columns = {
        "seeds": lambda runs: f"{len(runs)}",
        "error, validation": mean("validation.error", ".4f", deviation=False),
        "error": mean("test.error", ".4f"),
        "colliding": mean("test.colliding", ".4f"),
        "used, by level": per_level("used", ".3f"),
        "least used, training items": extreme(
            min, lambda run: min(run["train"]["used"]) if "used" in run["train"] else None
        ),
        "perplexity, by level": per_level("perplexity", ".0f"),
        "dimensions": mean("test.effective_dimension", ".1f", deviation=False),
        "CPU seconds": mean("seconds", ".0f", deviation=False),
    }
    return results.table("quantizer", results.where(data=data), columns)


STUDY = Study(
    "rq_vae",
    CASES,
    run,
    {name: lambda results, name=name: table(results, name) for name in TITLES},
    seeds=SEEDS,
    settings={"batch": BATCH, "rate": RATE, "hidden": HIDDEN, "start": START, "validation": VALIDATION},
    quick=QUICK,
    packages=("vector-quantize-pytorch", "transformers"),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
