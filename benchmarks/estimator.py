"""DDCLClustering against KMeans(n_init=10) on raw data: the inertia it ends with, and what it costs.

All tables that scikit-learn brings along (none is scaled), pixels of its two images, and data that are hard on purpose:
duplicates, heavy tails, a far outlier, constant columns, tiny and huge units, float32, nearly as many clusters as rows.
Default settings, the same seed on both sides; the process's own CPU time, one thread.

    python benchmarks/estimator.py               # 10 minutes
    python benchmarks/estimator.py --quick

Writes ``estimator.json``.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
from _common import options, save
from sklearn import datasets
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from ddcl_lightning import DDCLClustering

SIZES = (2, 3, 5, 8, 12, 20)
SEEDS = range(5)
PIXELS = 5_000
BOUND = 1.02


def tables() -> dict[str, Any]:
    """What scikit-learn brings along, as it is."""
    linnerud = datasets.load_linnerud()
    loaders = ("iris", "wine", "breast_cancer", "digits", "diabetes")
    return {
        **{name: getattr(datasets, f"load_{name}")().data for name in loaders},
        "linnerud data": linnerud.data,
        "linnerud target": linnerud.target,
    }


def pixels() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = {name: datasets.load_sample_image(f"{name}.jpg").reshape(-1, 3) for name in ("china", "flower")}
    return {
        f"{name} pixels": image[generator.choice(len(image), PIXELS, replace=False)].astype(float)
        for name, image in images.items()
    }


def hard_data() -> dict[str, Any]:
    """Data on which a temperature scale taken from the whole spread says nothing about the clusters."""
    generator = np.random.default_rng(0)
    iris, wine = datasets.load_iris().data, datasets.load_wine().data
    blobs = datasets.make_blobs(400, n_features=4, centers=10, random_state=0)[0]
    few = generator.normal(size=(21, 3))
    return {
        "21 distinct rows x 20": np.repeat(few, 20, axis=0),
        "21 distinct rows, 1 to 300 times": np.repeat(few, generator.integers(1, 300, 21), axis=0),
        "18 rows": generator.normal(size=(18, 5)),
        "Student's t, 1.2 degrees": generator.standard_t(1.2, size=(500, 4)),
        "log-normal, sigma 2": generator.lognormal(0, 2, size=(500, 6)),
        "blobs and one outlier at 1e6": np.vstack([blobs, np.full((1, 4), 1e6)]),
        "the same in float32": np.vstack([blobs, np.full((1, 4), 1e6)]).astype(np.float32),
        "iris and 4 constant columns": np.hstack([iris, np.full((150, 4), 7.1)]),
        "iris x 1e-6": 1e-6 * iris,
        "wine x 1e6": 1e6 * wine,
        "wine in float32": wine.astype(np.float32),
        "iris, far from the origin": iris + 1e6,
    }


def compare(x: Any, size: int, seed: int) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        times = [time.process_time()]
        reference = KMeans(size, n_init=10, random_state=seed).fit(x)
        times.append(time.process_time())
        ours = DDCLClustering(size, random_state=seed).fit(x)
        times.append(time.process_time())
    # Both from the labels, in float64: k-means sums in the precision of the data.
    lowest, inertia = (inertia_of(x, model.labels_, size) for model in (reference, ours))
    exact = 1e-12 * float(np.square(x - x.mean(0)).sum())
    ratio = inertia / lowest if lowest > exact else 1.0 if inertia <= exact else float("inf")
    return {"seed": seed, "ratio": ratio, "kmeans_s": times[1] - times[0], "ours_s": times[2] - times[1]}


def inertia_of(x: Any, labels: Any, size: int) -> float:
    cells = (x[labels == k].astype(np.float64) for k in range(size))
    return float(sum(np.square(cell - cell.mean(0)).sum() for cell in cells if len(cell)))


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(1)
    data, sizes, seeds = {**tables(), **pixels(), **hard_data()}, SIZES, SEEDS
    if arguments.quick:
        data, sizes, seeds = {"linnerud data": datasets.load_linnerud().data}, (2, 3), range(1)
    rows = []
    print(f"| data | rows x columns | {' | '.join(f'K = {k}' for k in sizes)} | CPU time / k-means |")
    print("|---|---|" + "---|" * (len(sizes) + 1))
    for name, x in data.items():
        distinct = len(np.unique(x, axis=0))
        cells = []
        for size in sizes:
            if size > distinct:
                cells.append("-")
                continue
            runs = [compare(x, size, seed) for seed in seeds]
            rows.append({"data": name, "shape": list(x.shape), "size": size, "runs": runs})
            cells.append(f"{max(run['ratio'] for run in runs):.3f}")
        own = [run for row in rows if row["data"] == name for run in row["runs"]]
        cost = sum(run["ours_s"] for run in own) / sum(run["kmeans_s"] for run in own)
        print(f"| {name} | {x.shape[0]:,} x {x.shape[1]} | {' | '.join(cells)} | {cost:.0f} |", flush=True)
    runs = [run for row in rows for run in row["runs"]]
    ratios = [run["ratio"] for run in runs]
    summary = {
        "trials": len(ratios),
        "above_bound": sum(ratio > BOUND for ratio in ratios),
        "largest": max(ratios),
        "mean": statistics.fmean(ratios),
        "cpu_ratio": sum(run["ours_s"] for run in runs) / sum(run["kmeans_s"] for run in runs),
    }
    save(arguments.output, "estimator", {"bound": BOUND, "seeds": list(seeds), "summary": summary, "cells": rows})
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
