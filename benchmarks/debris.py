"""Orbital debris: DDCL beside k-means, after the best epoch (the paper's choice) and after the last one.

The recipe ``debris`` (four prototypes on a frozen PCA with four components, 500 epochs) and k-means with 10 restarts,
on the standardized features and on their principal components, over 10 generated data sets and the recipe's own seed
42. The same on a real catalogue of objects in Earth orbit, where its file is given.

    python benchmarks/debris.py [--catalogue FILE.csv.gz]
"""

from typing import Any

import lightning.pytorch as pl
import torch
from _measure import all_samples, quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, mean
from lightning.pytorch.callbacks import Callback
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DebrisDataModule
from ddcl_lightning.functional import separation
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.metrics.probing import clustering_scores
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks import Clustering

RECIPE_SEED = 42
VALIDATE_EVERY = 10
COMPONENTS, REGIMES = 4, 4
METRICS = ("acc", "nmi", "ari")
METHODS = {  # label, and what tells it apart
    "kmeans-features": ("k-means, features", {"method": "kmeans", "features": "standardized"}),
    "kmeans-pca": ("k-means, PCA", {"method": "kmeans", "features": "pca"}),
    "ddcl": ("DDCL", {"method": "ddcl", "features": "pca"}),
}
DATA: dict[str, dict[str, Any]] = {
    "generated": {"data": "generated", "epochs": 500},
    "catalogue": {"data": "catalogue", "epochs": 60},
}
CASES = {
    f"{data}/{method}": Case(
        label,
        {**source, **config},
        needs=("catalogue",) if data == "catalogue" else (),
        seeds=range(3) if data == "catalogue" else (*range(10), RECIPE_SEED),
    )
    for data, source in DATA.items()
    for method, (label, config) in METHODS.items()
}


class History(Callback):
    """Metrics at every validation."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one row."""
        metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in METRICS}
        self.rows.append({"epoch": trainer.current_epoch + 1, **metrics})


def run(config: Config, seed: int, options: Options) -> Run:
    """One method on one data set."""
    pl.seed_everything(seed, verbose=False)
    data = DebrisDataModule(batch_size=400, catalogue=options.catalogue if config["data"] == "catalogue" else None)
    x, y = all_samples(data)
    objects = {"objects": torch.bincount(y, minlength=REGIMES).tolist()}
    if config["method"] == "ddcl":
        return {**objects, **train(data, 2 if options.quick else config["epochs"])}
    features, pca = x.double().numpy(), PCA(COMPONENTS, random_state=seed)
    if config["features"] == "pca":
        features = pca.fit_transform(features)
        objects["variance_kept"] = float(pca.explained_variance_ratio_.sum())
    codes = KMeans(REGIMES, n_init=10, random_state=seed).fit_predict(features)
    scores = clustering_scores(torch.from_numpy(codes).long(), y, REGIMES)
    return {**objects, "last": {name: scores[name] for name in METRICS}}


def train(data: DebrisDataModule, epochs: int) -> Run:
    """The recipe: metrics after the best epoch by accuracy and after the last, and what else it logs."""
    module = DDCLReadoutModule(
        PCABackbone(in_features=data.num_features, num_components=COMPONENTS),
        DDCLReadout(num_prototypes=REGIMES),
        Clustering(num_classes=REGIMES),
        lr_prototypes=0.01,
        rho=0.0,
        gradient_clip_val=1.0,
    )
    history, check = History(), DecompositionCheck(every_n_batches=4)
    callbacks = [TemperatureAnnealing(0.1, 0.005), KMeansInitialization(progress=False), check, history]
    quiet_trainer(epochs, callbacks, check_val_every_n_epoch=min(VALIDATE_EVERY, epochs)).fit(module, datamodule=data)
    (bank,) = find_banks(module).values()
    return {
        "best": max(history.rows, key=lambda row: row["acc"]),
        "last": history.rows[-1],
        "delta": float(separation(bank.prototypes).minimum),
        "checks": check.checks,
        "violations": check.violations,
    }


# Label, method, epoch, and ACC, NMI and ARI of the one seed that the paper gives.
ROWS = (
    ("k-means, features", "kmeans-features", "last", "0.756 / 0.751 / 0.667"),
    ("k-means, PCA", "kmeans-pca", "last", "0.756 / 0.751 / 0.667"),
    ("DDCL, best epoch", "ddcl", "best", "0.772 / 0.752 / 0.669"),
    ("DDCL, last epoch", "ddcl", "last", "-"),
)


def table(results: Results, data: str, seeds: range) -> Table:
    """The methods, DDCL twice: after its best and after its last epoch."""
    rows = [["method", *(name.upper() for name in METRICS)]]
    for label, method, epoch, _ in ROWS:
        runs = [run for run in results.of(f"{data}/{method}") if run["seed"] in seeds]
        rows.append([label, *(mean(f"{epoch}.{name}")(runs) for name in METRICS)])
    return rows


def beside_paper(results: Results) -> Table:
    paper = ("the paper's ACC / NMI / ARI", *(row[-1] for row in ROWS))
    return [[*row, text] for row, text in zip(table(results, "generated", range(10)), paper, strict=True)]


STUDY = Study(
    "debris",
    CASES,
    run,
    {
        "generated": beside_paper,
        "recipe_seed": lambda results: table(results, "generated", range(RECIPE_SEED, RECIPE_SEED + 1)),
        "catalogue": lambda results: table(results, "catalogue", range(3)),
    },
)

if __name__ == "__main__":
    STUDY.main(__doc__)
