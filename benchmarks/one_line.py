"""One line against one line: a quantizer in a plain training loop, ``torch.optim.Adam(model.parameters())``, no more.

A small convolutional autoencoder on three sets of images, 64 and 1,024 codes. VectorQuantize of vector-quantize-pytorch
starts by k-means and replaces codes that expire, with the rotation trick or without, with a decay of 0.8 or 0.99, on
the tokens as they are or behind the same scaling as ours; of these eight settings each cell of the table takes the best
of the validation images. Errors are those of hard codes on test images.

    python benchmarks/one_line.py --fashion FOLDER --cifar FILE.npz
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from _autoencoder import Autoencoder, Images, evaluate, load_images, quantizer, train_epoch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, extreme, mean

SEEDS = (0, 1, 2)
RATE, BATCH, DIM = 1e-3, 32, 16
WATCHED = 1_000  # training images that are encoded after every epoch
DATA: dict[str, dict[str, Any]] = {
    "digits": {"images": 1077, "held_out": 360, "epochs": 24, "widths": [32]},
    "fashion": {"images": 2_000, "held_out": 500, "epochs": 6, "widths": [16, 32], "rate": 3e-3},
    "cifar10": {"images": 2_000, "held_out": 500, "epochs": 6, "widths": [16, 32], "rate": 3e-3},
}
CHANNELS = {"digits": 1, "fashion": 1, "cifar10": 3}
NEEDS = {"digits": (), "fashion": ("fashion",), "cifar10": ("cifar",)}
CODES = (64, 1024)
TITLES = {"digits": "digits", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}

BASELINES = {
    f"vq{'-rotation' if rotation else ''}-{decay}{'-scaled' if scale else ''}": (
        f"{'rotation trick' if rotation else 'straight through'}, decay {decay}{', scaled' if scale else ''}",
        {
            "quantizer": "VectorQuantize",
            "arguments": {
                "kmeans_init": True,
                "threshold_ema_dead_code": 2,
                "rotation_trick": rotation,
                "decay": decay,
            },
            "scale": scale,
        },
    )
    for scale in (False, True)
    for rotation in (False, True)
    for decay in (0.8, 0.99)
}
# What its defaults were compared with: scaling of the tokens, strengths of the commitment, and steps of the codes.
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (label, {"quantizer": "candidate", "arguments": arguments})
    for name, label, arguments in (
        *((f"ratio-{ratio}", f"ratio {ratio}", {"commitment_ratio": ratio}) for ratio in (0.7, 1.0, 2.0)),
        *((f"step-{step}", f"codes step by {step}", {"code_update": {"step_size": step}}) for step in (0.02, 0.1, 0.2)),
        *((scale, f"scaled, {scale}", {"embedding_scale": scale}) for scale in ("total", "per_dimension")),
    )
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "continuous": ("no quantizer", {"quantizer": "none"}),
    **BASELINES,
    "ours": ("**ours**", {"quantizer": "ours", "arguments": {}}),
    **CANDIDATES,
}


def case(method: str, data: str, codes: int, **changes: Any) -> Case:
    """A method on a set of images."""
    label, config = METHODS[method]
    return Case(
        label,
        {"data": data, "codes": codes, "dim": DIM, **DATA[data], **config, "method": method, **changes},
        NEEDS[data],
    )


CASES = {
    f"{data}/{codes}/{method}": case(method, data, codes) for data in DATA for codes in CODES for method in METHODS
}
QUICK = {f"tiny/16/{method}": case(method, "digits", 16, images=200, epochs=2, widths=[8]) for method in METHODS}
_images: dict[str, Images] = {}


def run(config: Config, seed: int, options: Options) -> Run:
    """Train, count the codes in use after every epoch, and measure the end on images that were held out."""
    torch.set_flush_denormal(True)
    name = config["data"]
    if name not in _images:
        _images[name] = load_images(name, config["images"], config["held_out"], options)
    images = _images[name]
    torch.manual_seed(seed)
    model = Autoencoder(CHANNELS[name], config["dim"], tuple(config["widths"]), quantizer(dict(config)))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.get("rate", RATE))
    seconds, used = 0.0, []
    for _ in range(config["epochs"]):
        start = time.process_time()
        train_epoch(model, images.train, BATCH, optimizer)
        seconds += time.process_time() - start
        used.append(evaluate(model, images.train[:WATCHED], config["codes"])["usage"])
    return {
        "seconds": round(seconds, 2),
        "used": used,
        "validation": evaluate(model, images.validation, config["codes"]),
        "test": evaluate(model, images.test, config["codes"]),
    }


def best(results: Results, cases: Iterable[str]) -> str | None:
    """The case with the lowest error on the images of validation with the first seed, which all settings have."""
    errors = {name: results.of(name)[0]["validation"]["mse"] for name in cases if results.of(name)}
    return min(errors, key=errors.__getitem__, default=None)


def used(run: Run, pick: Callable[[list[float]], float]) -> float | None:
    """A usage of all epochs; None of a run without a quantizer, whose every token has the one index."""
    return None if run["test"]["perplexity"] == 1 else pick(run["used"])


def cells(results: Results) -> list[tuple[str, int]]:
    """Images and numbers of codes that have runs."""
    return list(dict.fromkeys((config["data"], config["codes"]) for config in results.configs.values()))


def compared(results: Results, data: str, codes: int) -> dict[str, str]:
    """Cases that stand in the table of a cell, with their labels: the best settings of the baseline, and ours."""
    chosen = {}
    for scale, title in ((False, "VectorQuantize"), (True, "VectorQuantize, scaled")):
        name = best(results, results.where(data=data, codes=codes, quantizer="VectorQuantize", scale=scale))
        if name is not None:
            chosen[name] = f"{title} ({results.labels[name].replace(', scaled', '')})"
    others = [
        name for name in results.where(data=data, codes=codes) if results.configs[name]["quantizer"] in ("none", "ours")
    ]
    return {**chosen, **{name: results.labels[name] for name in others}}


def main_table(results: Results) -> Table:
    """Per cell: the baseline at its best setting, and ours."""
    rows: Table = []
    for data, codes in cells(results):
        columns = {
            "test MSE": mean("test.mse", ".5f"),
            "used, epoch 1": extreme(min, lambda run: used(run, lambda usages: usages[0])),
            "least used": extreme(min, lambda run: used(run, min)),
            "used, end": extreme(min, lambda run: used(run, lambda usages: usages[-1])),
            "perplexity / K": mean(
                lambda run, codes=codes: used(run, lambda _: run["test"]["perplexity"] / codes), deviation=False
            ),
            "dimensions": mean("test.effective_dimension", ".1f", deviation=False),
            "CPU seconds": mean("seconds", ".0f", deviation=False),
        }
        chosen = compared(results, data, codes)
        header, *body = results.table("method", chosen, columns)
        rows = rows or [["images", "K", *header]]
        rows += [[TITLES[data], f"{codes:,}", chosen[name], *row[1:]] for name, row in zip(chosen, body, strict=True)]
    return rows


def settings_table(results: Results) -> Table:
    """Error of every setting on the images of validation, with the first seed."""
    places = cells(results)
    rows = [["method", *(f"{TITLES[data]}, {codes:,}" for data, codes in places)]]
    labels = {config["method"]: results.labels[name] for name, config in results.configs.items()}
    for method, label in labels.items():
        cases = [results.where(data=data, codes=codes, method=method) for data, codes in places]
        if any(cases):
            rows.append([label, *(mean("validation.mse", ".5f")(results.of(c[0])[:1]) if c else "" for c in cases)])
    return rows


STUDY = Study(
    "one_line",
    CASES,
    run,
    {"cells": main_table, "settings": settings_table},
    seeds=SEEDS,
    settings={"rate": RATE, "batch": BATCH, "watched": WATCHED, "choice": "seed 0"},
    quick=QUICK,
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
