"""Orbital debris: DDCL beside k-means, after the best epoch (the paper's choice) and after the last one.

The recipe ``debris`` (four prototypes on a frozen PCA with four components, 500 epochs) and k-means with 10 restarts,
on the standardised features and on their principal components, over 10 generated data sets and the recipe's own seed
42. The same on a real catalogue of objects in Earth orbit, where its file is given or found.

    python benchmarks/debris.py [--catalogue FILE.csv.gz]
    python benchmarks/debris.py --quick

Writes ``debris.json``.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from _common import ROOT, options, plus_minus, save
from lightning.pytorch.callbacks import Callback
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from tqdm import tqdm

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DebrisDataModule
from ddcl_lightning.functional import separation
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.metrics.clustering_metrics import (
    adjusted_rand_index,
    count_matrix,
    hungarian_accuracy,
    normalized_mutual_info,
)
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks import Clustering

CATALOGUE = ROOT.parent / "shared" / "data" / "orbital_catalog_2017-04_16k.csv.gz"
SEEDS, RECIPE_SEED, CATALOGUE_SEEDS = tuple(range(10)), 42, (0, 1, 2)
EPOCHS, CATALOGUE_EPOCHS, VALIDATE_EVERY = 500, 60, 10
COMPONENTS, REGIMES = 4, 4
METRICS = ("acc", "nmi", "ari")
PAPER = {
    "DDCL, best epoch": {"acc": 0.772, "nmi": 0.752, "ari": 0.669},
    "k-means, features": {"acc": 0.756, "nmi": 0.751, "ari": 0.667},
    "k-means, PCA": {"acc": 0.756, "nmi": 0.751, "ari": 0.667},
}


class History(Callback):
    """Metrics at every validation."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one row."""
        metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in METRICS}
        self.rows.append({"epoch": trainer.current_epoch + 1, **metrics})


def train(data: DebrisDataModule, epochs: int) -> dict[str, Any]:
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
    initialization = KMeansInitialization(progress=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        check_val_every_n_epoch=min(VALIDATE_EVERY, epochs),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TemperatureAnnealing(start=0.1, end=0.005), initialization, check, history],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*")
        trainer.fit(module, datamodule=data)
    (bank,) = find_banks(module).values()
    return {
        "DDCL, best epoch": max(history.rows, key=lambda row: row["acc"]),
        "DDCL, last epoch": history.rows[-1],
        "delta": float(separation(bank.prototypes).minimum),
        "decomposition_checks": check.checks,
        "decomposition_violations": check.violations,
    }


def kmeans(x: "np.ndarray[Any, Any]", y: torch.Tensor, seed: int) -> dict[str, float]:
    """Metrics of k-means with 10 restarts."""
    codes = KMeans(REGIMES, n_init=10, random_state=seed).fit_predict(x)
    counts = count_matrix(torch.from_numpy(codes), y, REGIMES, REGIMES)
    figures = (hungarian_accuracy(counts), normalized_mutual_info(counts), adjusted_rand_index(counts))
    return dict(zip(METRICS, map(float, figures), strict=True))


def compare(seed: int, epochs: int, catalogue: Path | None = None) -> dict[str, Any]:
    """All methods on one data set."""
    pl.seed_everything(seed, verbose=False)
    data = DebrisDataModule(batch_size=400, catalogue=catalogue)
    data.setup()
    parts = list(data.predict_dataloader())
    x, y = (torch.cat([part[key] for part in parts]) for key in ("x", "y"))
    features = x.double().numpy()
    pca = PCA(COMPONENTS, random_state=seed)
    return {
        "seed": seed,
        "objects": torch.bincount(y, minlength=REGIMES).tolist(),
        "k-means, features": kmeans(features, y, seed),
        "k-means, PCA": kmeans(pca.fit_transform(features), y, seed),
        "variance_kept": float(pca.explained_variance_ratio_.sum()),
        **train(data, epochs),
    }


def report(title: str, runs: list[dict[str, Any]], paper: dict[str, dict[str, float]]) -> None:
    """One table of ``docs/measurements.md``."""
    print(f"\n{title}: {len(runs)} seeds, objects per regime in the first {runs[0]['objects']}")
    print("| method | ACC | NMI | ARI |")
    print("|---|---|---|---|")
    for method in ("k-means, features", "k-means, PCA", "DDCL, best epoch", "DDCL, last epoch"):
        print(f"| {method} | {' | '.join(plus_minus(run[method][name] for run in runs) for name in METRICS)} |")
        if method in paper:
            print(f"| the paper's, one seed | {' | '.join(f'{paper[method][name]:.3f}' for name in METRICS)} |")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE, help="a real catalogue; left out where absent")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seeds, epochs = ((0,), 2) if arguments.quick else ((*SEEDS, RECIPE_SEED), EPOCHS)
    result: dict[str, Any] = {"epochs": epochs, "paper": PAPER}
    result["generated"] = [compare(seed, epochs) for seed in tqdm(seeds, desc="generated", mininterval=10)]
    save(arguments.output, "debris", result)
    report("generated", [run for run in result["generated"] if run["seed"] in SEEDS], PAPER)
    if not arguments.quick:
        report("generated, the recipe's seed", result["generated"][-1:], PAPER)
        if arguments.catalogue.is_file():
            result["catalogue_epochs"] = CATALOGUE_EPOCHS
            result["catalogue"] = [
                compare(seed, CATALOGUE_EPOCHS, arguments.catalogue) for seed in tqdm(CATALOGUE_SEEDS, desc="catalogue")
            ]
            save(arguments.output, "debris", result)
            report("catalogue", result["catalogue"], {})


if __name__ == "__main__":
    main()
