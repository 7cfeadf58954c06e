"""Encoders that are hard on a quantizer: outputs of 1e-4 to 1e4 in size, fast and slow rates, few tokens, bfloat16.

A small autoencoder of digits, 64 codes, short runs in a plain loop. A grid of encoders for each condition: five sizes
of the output at the start, with and without biases, with and without layer normalization at the end. A run has
collapsed if its tokens end in about one direction (effective dimension under 1.5) where those of the same encoder
without a quantizer do not, if less than half of the codes are in use on the training images, or if anything is not
finite.

    python benchmarks/quantizer_stability.py
"""

import math
from itertools import product
from typing import Any

import torch
from _autoencoder import Autoencoder, evaluate, load_images, quantizer, train_epoch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, mean
from torch import Tensor

CODES, DIM, WIDTHS, BATCH, RATE = 64, 16, (16, 32), 32, 1e-3
SIZES = (1e-4, 1e-2, 1.0, 1e2, 1e4)
FEWEST_DIMENSIONS, LEAST_USED = 1.5, 0.5
CONDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("rate 1e-3", {}),
    "slow": ("rate 1e-4", {"rate": 0.1 * RATE}),
    "fast": ("rate 1e-2", {"rate": 10 * RATE}),
    "few": ("32 tokens in a batch", {"batch": 8}),
    "bfloat16": ("weights in bfloat16", {"dtype": "bfloat16"}),
}
STARTED = {"kmeans_init": True, "threshold_ema_dead_code": 2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("no quantizer", {"quantizer": "none"}),
    "ours": ("**ours**", {"quantizer": "ours", "arguments": {}}),
    "vq": (
        "VectorQuantize",
        {"quantizer": "VectorQuantize", "arguments": {**STARTED, "rotation_trick": False}, "scale": False},
    ),
    "rotation": (
        "VectorQuantize, rotation trick",
        {"quantizer": "VectorQuantize", "arguments": {**STARTED, "rotation_trick": True}, "scale": False},
    ),
    "vq-scaled": (
        "VectorQuantize, scaled",
        {"quantizer": "VectorQuantize", "arguments": {**STARTED, "rotation_trick": False}, "scale": True},
    ),
}


def case(method: str, condition: str, **changes: Any) -> Case:
    """A method under a condition."""
    label, config = METHODS[method]
    sizes = {"codes": CODES, "dim": DIM, "sizes": SIZES, "images": 1077, "steps": 400, "batch": BATCH, "rate": RATE}
    common = {**sizes, "condition": condition, "dtype": "float32"}
    return Case(label, {**common, **config, **CONDITIONS[condition][1], **changes})


CASES = {f"{condition}/{method}": case(method, condition) for condition in CONDITIONS for method in METHODS}
QUICK = {
    f"tiny/{condition}/{method}": case(method, condition, images=200, steps=2, sizes=[1e-4, 1e4], codes=16)
    for condition in ("plain", "bfloat16")
    for method in METHODS
}


def run(config: Config, seed: int, options: Options) -> Run:
    """Train every encoder of the grid."""
    torch.set_flush_denormal(True)
    images = load_images("digits", config["images"], 0, options).train.to(getattr(torch, config["dtype"]))
    return {
        "encoders": [
            {"size": size, "bias": bias, "norm": norm, **train(config, seed, images, size, bias, norm)}
            for size, bias, norm in product(config["sizes"], (True, False), (True, False))
        ]
    }


def train(config: Config, seed: int, images: Tensor, size: float, bias: bool, norm: bool) -> Run:
    """One encoder; numbers that are not finite are None."""
    torch.manual_seed(seed)
    model = Autoencoder(1, config["dim"], WIDTHS, quantizer(dict(config)), bias, norm, size).to(images.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"])
    left = config["steps"]
    while left > 0:
        number = min(left, len(images) // config["batch"])
        chosen = torch.randperm(len(images))[: number * config["batch"]]
        train_epoch(model, images[chosen], config["batch"], optimizer)
        left -= number
    result = evaluate(model, images, config["codes"])
    return {name: value if math.isfinite(value) else None for name, value in result.items()}


def flat(encoder: Run, reference: dict[tuple[Any, ...], Run]) -> bool:
    """True if tokens are in about one direction, and would not be without a quantizer."""
    free = reference.get((encoder["size"], encoder["bias"], encoder["norm"]))
    dimensions = encoder["effective_dimension"], FEWEST_DIMENSIONS if free is None else free["effective_dimension"]
    return None not in dimensions and dimensions[0] < FEWEST_DIMENSIONS <= dimensions[1]


def unused(encoder: Run) -> bool:
    """True if most codes are out of use."""
    return encoder["usage"] is not None and encoder["usage"] < LEAST_USED


def broken(encoder: Run) -> bool:
    """True if the error or the tokens are not finite."""
    return encoder["mse"] is None or encoder["effective_dimension"] is None


def table(results: Results) -> Table:
    """Runs that have collapsed, under every condition."""

    def median(name: str, form: str) -> Any:
        return mean(
            lambda run: sorted(float("inf") if each[name] is None else each[name] for each in run["encoders"])[
                len(run["encoders"]) // 2
            ],
            form,
            deviation=False,
        )

    def counted(fails: Any) -> Any:
        return lambda runs: f"{sum(fails(each) for run in runs for each in run['encoders'])}"

    rows: Table = []
    for condition, (title, _) in CONDITIONS.items():
        cases = results.where(condition=condition)
        free = [run for name in results.where(condition=condition, quantizer="none") for run in results.of(name)]
        reference = {(each["size"], each["bias"], each["norm"]): each for run in free for each in run["encoders"]}
        columns = {
            "runs": lambda runs: f"{sum(len(run['encoders']) for run in runs)}",
            "one direction": counted(lambda each, reference=reference: flat(each, reference)),
            "codes unused": counted(unused),
            "not finite": counted(broken),
            "collapsed": counted(
                lambda each, reference=reference: flat(each, reference) or unused(each) or broken(each)
            ),
            "dimensions, median": median("effective_dimension", ".1f"),
            "used, median": median("usage", ".2f"),
            "MSE, median": median("mse", ".4f"),
        }
        quantized = [name for name in cases if results.configs[name]["quantizer"] != "none"]
        header, *body = results.table("quantizer", quantized, columns)
        rows = rows or [["condition", *header]]
        rows += [[title, *row] for row in body]
    return rows


STUDY = Study(
    "quantizer_stability",
    CASES,
    run,
    {"conditions": table},
    settings={"widths": WIDTHS},
    quick=QUICK,
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
