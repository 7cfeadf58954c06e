"""DDCLClustering against KMeans(n_init=10) on raw data: the inertia it ends with, and what it costs.

All tables that scikit-learn brings along (none is scaled), pixels of its two images, and data that are hard on purpose:
duplicates, heavy tails, a far outlier, constant columns, tiny and huge units, float32, nearly as many clusters as rows.
Default settings, the same seed on both sides; the process's own CPU time, one thread.

    OMP_NUM_THREADS=1 python benchmarks/estimator.py               # 10 minutes
"""

import time
import warnings
from functools import cache
from typing import Any

import numpy as np
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, mean, read
from sklearn import datasets
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from ddcl_lightning import DDCLClustering

SIZES = (2, 3, 5, 8, 12, 20)
PIXELS = 5_000
BOUND = 1.02
DATA = {
    "iris": "iris",
    "wine": "wine",
    "breast_cancer": "breast_cancer",
    "digits": "digits",
    "diabetes": "diabetes",
    "linnerud-data": "linnerud data",
    "linnerud-target": "linnerud target",
    "china": "china pixels",
    "flower": "flower pixels",
    "duplicates-20": "21 distinct rows x 20",
    "duplicates-uneven": "21 distinct rows, 1 to 300 times",
    "rows-18": "18 rows",
    "student-t": "Student's t, 1.2 degrees",
    "log-normal": "log-normal, sigma 2",
    "outlier": "blobs and one outlier at 1e6",
    "outlier-float32": "the same in float32",
    "iris-constant": "iris and 4 constant columns",
    "iris-small": "iris x 1e-6",
    "wine-large": "wine x 1e6",
    "wine-float32": "wine in float32",
    "iris-far": "iris, far from the origin",
}
ROWS = {"rows-18": 18}  # fewer distinct ones than the largest K
CASES = {
    f"{data}/{size}": Case(label, {"data": data, "size": size})
    for data, label in DATA.items()
    for size in SIZES
    if size <= ROWS.get(data, max(SIZES))
}


def load(name: str) -> Any:
    """A data set as it is."""
    return {**tables(), **pixels(), **hard_data()}[name]


@cache
def tables() -> dict[str, Any]:
    """Data sets that come with scikit-learn."""
    linnerud = datasets.load_linnerud()
    loaders = ("iris", "wine", "breast_cancer", "digits", "diabetes")
    return {
        **{name: getattr(datasets, f"load_{name}")().data for name in loaders},
        "linnerud-data": linnerud.data,
        "linnerud-target": linnerud.target,
    }


@cache
def pixels() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = {name: datasets.load_sample_image(f"{name}.jpg").reshape(-1, 3) for name in ("china", "flower")}
    return {
        name: image[generator.choice(len(image), PIXELS, replace=False)].astype(float) for name, image in images.items()
    }


@cache
def hard_data() -> dict[str, Any]:
    """Data on which a temperature scale taken from the whole spread says nothing about the clusters."""
    generator = np.random.default_rng(0)
    iris, wine = datasets.load_iris().data, datasets.load_wine().data
    blobs = datasets.make_blobs(400, n_features=4, centers=10, random_state=0)[0]
    few = generator.normal(size=(21, 3))
    return {
        "duplicates-20": np.repeat(few, 20, axis=0),
        "duplicates-uneven": np.repeat(few, generator.integers(1, 300, 21), axis=0),
        "rows-18": generator.normal(size=(18, 5)),
        "student-t": generator.standard_t(1.2, size=(500, 4)),
        "log-normal": generator.lognormal(0, 2, size=(500, 6)),
        "outlier": np.vstack([blobs, np.full((1, 4), 1e6)]),
        "outlier-float32": np.vstack([blobs, np.full((1, 4), 1e6)]).astype(np.float32),
        "iris-constant": np.hstack([iris, np.full((150, 4), 7.1)]),
        "iris-small": 1e-6 * iris,
        "wine-large": 1e6 * wine,
        "wine-float32": wine.astype(np.float32),
        "iris-far": iris + 1e6,
    }


def run(config: Config, seed: int, options: Options) -> Run:
    """Inertia over that of k-means, and the CPU time of both."""
    x, size = load(config["data"]), config["size"]
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
    return {"shape": x.shape, "ratio": ratio, "kmeans_s": times[1] - times[0], "ours_s": times[2] - times[1]}


def inertia_of(x: Any, labels: Any, size: int) -> float:
    clusters = (x[labels == k].astype(np.float64) for k in range(size))
    return float(sum(np.square(cluster - cluster.mean(0)).sum() for cluster in clusters if len(cluster)))


def cost(runs: list[Run]) -> float:
    """CPU time over that of k-means."""
    return float(sum(run["ours_s"] for run in runs) / sum(run["kmeans_s"] for run in runs))


def inertia(results: Results) -> Table:
    rows = [["data", "rows x columns", *(f"K = {size}" for size in SIZES), "CPU time / k-means"]]
    for data, label in DATA.items():
        by_size = {size: results.of(f"{data}/{size}") for size in SIZES}
        if runs := [run for some in by_size.values() for run in some]:
            count, columns = runs[0]["shape"]
            cells = [f"{max(read(some, 'ratio')):.3f}" if some else "-" for some in by_size.values()]
            rows.append([label, f"{count:,} x {columns}", *cells, f"{cost(runs):.0f}"])
    return rows


def summary(results: Results) -> Table:
    ratios = read(results.runs, "ratio")
    above = sum(ratio > BOUND for ratio in ratios)
    cells = [f"{len(ratios)}", f"{above}", f"{max(ratios):.3f}", mean("ratio", deviation=False)(results.runs)]
    return [
        ["trials", f"above {BOUND}", "largest", "mean", "CPU time / k-means"],
        [*cells, f"{cost(results.runs):.0f}"],
    ]


STUDY = Study(
    "estimator",
    CASES,
    run,
    {"inertia": inertia, "summary": summary},
    seeds=range(5),
    quick={name: CASES[name] for name in ("linnerud-data/2", "linnerud-data/3")},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
