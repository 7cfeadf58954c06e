"""How many prototypes does a bank find that starts with two? Beside silhouette and BIC, on digits and on debris.

``AdaptiveBankSize`` at two levels of its test, and without it (deterministic annealing alone: the last temperature sets
K, up to 30), against k-means at the K of the largest silhouette and at that of the smallest BIC of a Gaussian mixture
(full covariances), both out of 2 to 30, and at the number of classes. Five seeds, which draw the debris; digits are the
same for all. Metrics are those of the last epoch, on the training data.

    python benchmarks/adaptive_size.py    # about 10 minutes on one core; goes on where it was stopped
    python benchmarks/adaptive_size.py --quick

Writes ``adaptive_size.json``.
"""

import logging
import warnings
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from _common import load, options, plus_minus, quiet_trainer, save
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import AdaptiveBankSize, CollapseWarning, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DebrisDataModule, DigitsDataModule
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.metrics.clustering_metrics import (
    adjusted_rand_index,
    count_matrix,
    hungarian_accuracy,
    normalized_mutual_info,
)
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.tasks import Clustering

SEEDS = tuple(range(5))
LARGEST = 30
METRICS = ("acc", "nmi", "ari")
SIGNIFICANCE = {"adaptive, 0.01": 0.01, "adaptive, 0.001": 0.001, "annealing alone": None}


class Case(NamedTuple):
    """One data set as one recipe reads it."""

    data: str
    components: int
    classes: int
    rho: float
    epochs: int
    whiten: bool


CASES = {
    "digits, whitened (recipe digits_adaptive)": Case("digits", 16, 10, 0.01, 60, True),
    "digits, PCA, frozen": Case("digits", 16, 10, 0.0, 60, False),
    "debris (recipe debris, 100 epochs)": Case("debris", 4, 4, 0.0, 100, False),
}


def data_of(case: Case) -> DigitsDataModule | DebrisDataModule:
    """The recipe's data; generated ones by the seed of the process."""
    return DigitsDataModule() if case.data == "digits" else DebrisDataModule(batch_size=400, noise=0.5)


def train(case: Case, seed: int, significance: float | None, epochs: int) -> dict[str, Any]:
    """K found from two prototypes, its course, and the metrics after the last epoch."""
    pl.seed_everything(seed, verbose=False)
    data = data_of(case)
    module = DDCLReadoutModule(
        PCABackbone(data.num_features, case.components, trainable=case.rho > 0),
        DDCLReadout(num_prototypes=2),
        Clustering(case.classes),
        lr_prototypes=0.01,
        rho=case.rho,
        gradient_clip_val=1.0 if case.data == "debris" else None,
    )
    adaptive, watch = AdaptiveBankSize(max_prototypes=LARGEST, significance=significance), CollapseWarning()
    callbacks = [TemperatureAnnealing(), KMeansInitialization(progress=False), adaptive, watch]
    trainer = quiet_trainer(epochs, callbacks, check_val_every_n_epoch=epochs)
    trainer.fit(module, datamodule=data)
    (course,) = adaptive.history.values()
    metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in METRICS}
    return {"K": course[-1][1], "course": course, "warnings": len(watch.reported), **metrics}


def baselines(case: Case, seed: int, sizes: range) -> dict[str, dict[str, Any]]:
    """k-means at the choices of scikit-learn, on the features that the bank starts from."""
    pl.seed_everything(seed, verbose=False)
    data = data_of(case)
    data.setup()
    parts = list(data.predict_dataloader())
    x, y = (torch.cat([part[key] for part in parts]) for key in ("x", "y"))
    features = PCA(case.components, whiten=case.whiten, random_state=seed).fit_transform(x.double().numpy())
    codes = {size: KMeans(size, n_init=10, random_state=seed).fit_predict(features) for size in {*sizes, case.classes}}
    silhouette = {size: silhouette_score(features, codes[size]) for size in sizes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        bic = {s: GaussianMixture(s, random_state=seed, reg_covar=1e-3).fit(features).bic(features) for s in sizes}
    chosen = {
        "k-means, silhouette": max(silhouette, key=lambda size: silhouette[size]),
        "k-means, BIC": min(bic, key=lambda size: bic[size]),
        "k-means, classes": case.classes,
    }
    return {name: {"K": size, **score(codes[size], y, size)} for name, size in chosen.items()}


def score(codes: "np.ndarray[Any, Any]", y: torch.Tensor, size: int) -> dict[str, float]:
    """Metrics of hard codes."""
    counts = count_matrix(torch.from_numpy(codes), y, size, int(y.max()) + 1)
    figures = (hungarian_accuracy(counts), normalized_mutual_info(counts), adjusted_rand_index(counts))
    return dict(zip(METRICS, map(float, figures), strict=True))


def report(name: str, case: Case, runs: dict[str, dict[str, Any]]) -> None:
    """One table of ``docs/measurements.md``."""
    print(f"\n{name}: {case.classes} classes, {len(runs)} seeds")
    print("| method | K, by seed | ACC | NMI | ARI |")
    print("|---|---|---|---|---|")
    for method in next(iter(runs.values())):
        rows = [run[method] for run in runs.values()]
        cells = (plus_minus(row[metric] for row in rows) for metric in METRICS)
        print(f"| {method} | {', '.join(str(row['K']) for row in rows)} | {' | '.join(cells)} |")


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")
    warnings.filterwarnings("ignore", message="CollapseWarning: ")
    seeds, sizes = (SEEDS[:1], range(2, 5)) if arguments.quick else (SEEDS, range(2, LARGEST + 1))
    result = {} if arguments.quick else load(arguments.output, "adaptive_size")
    done: dict[str, dict[str, dict[str, Any]]] = result.setdefault("runs", {})
    result["epochs"] = {name: 2 if arguments.quick else case.epochs for name, case in CASES.items()}
    with tqdm(total=len(CASES) * len(seeds) * (len(SIGNIFICANCE) + 1), mininterval=10) as bar:
        for name, case in CASES.items():
            for seed in seeds:
                methods = done.setdefault(name, {}).setdefault(str(seed), {})
                for method, significance in SIGNIFICANCE.items():
                    if method not in methods:
                        methods[method] = train(case, seed, significance, result["epochs"][name])
                        save(arguments.output, "adaptive_size", result)
                    bar.update()
                if "k-means, classes" not in methods:
                    methods.update(baselines(case, seed, sizes))
                    save(arguments.output, "adaptive_size", result)
                bar.update()
    for name, case in CASES.items():
        report(name, case, done[name])


if __name__ == "__main__":
    main()
