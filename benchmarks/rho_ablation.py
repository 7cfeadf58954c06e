"""What the ratio of the learning rates does, with and without a bound on the scale of the embeddings.

A linear encoder, initialised by PCA, and ten prototypes train on the quantisation loss alone on scikit-learn's 1,797
digits (the recipe ``digits_rho``), for every ratio rho = lr_encoder / lr_prototypes, embedding scale and seed. Frozen
encoders under k-means, and under the same prototypes with rho = 0, are the baselines.

    python benchmarks/rho_ablation.py             # 120 runs of 15 s in two processes; goes on where it was stopped
    python benchmarks/rho_ablation.py --quick

Writes ``rho_ablation.json`` and the picture ``rho_ablation.png``.
"""

import logging
import multiprocessing
import re
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import torch
from _common import load, mean_and_deviation, options, plus_minus, save
from lightning.pytorch.callbacks import Callback
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from tqdm import tqdm

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import CollapseWarning, DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.functional import separation
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.metrics.clustering_metrics import count_matrix, hungarian_accuracy, normalized_mutual_info
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from ddcl_lightning.monitoring.signals import read_signals
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks import Clustering

Case = tuple[str, float, int]  # embedding scale, rho, seed

SCALES = ("none", "per_dimension", "whiten", "total")
RATIOS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)  # 0 freezes the encoder
SEEDS = tuple(range(5))
EPOCHS, VALIDATE_EVERY = 300, 25
COMPONENTS, PROTOTYPES = 16, 10
PROCESSES = 2


class History(Callback):
    """Metrics and separation at every validation."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one row."""
        (bank,) = find_banks(pl_module).values()
        metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("acc", "nmi", "usage")}
        delta = float(separation(bank.prototypes).minimum)
        self.rows.append({"epoch": trainer.current_epoch + 1, **metrics, "delta": delta})


def train(case: Case, epochs: int) -> dict[str, Any]:
    """One run, as plain numbers."""
    scale, rho, seed = case
    pl.seed_everything(seed, verbose=False)
    data = DigitsDataModule(batch_size=256)
    module = DDCLReadoutModule(
        PCABackbone(in_features=64, num_components=COMPONENTS, trainable=True),
        DDCLReadout(num_prototypes=PROTOTYPES, embedding_scale=scale),
        Clustering(num_classes=10),
        lr_prototypes=0.01,
        rho=rho,
        allow_unstable=rho >= 1,
    )
    history, check, watch = History(), DecompositionCheck(), CollapseWarning()
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
        callbacks=[TemperatureAnnealing(start=0.1, end=0.005), initialization, check, watch, history],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the collapses are what is measured
        trainer.fit(module, datamodule=data)
    last = history.rows[-1]
    best = max(history.rows, key=lambda row: row["acc"])
    first = re.match(r"(\w+) in .* at step (\d+)", watch.reported[0]) if watch.reported else None
    return {
        "scale": scale,
        "rho": rho,
        "seed": seed,
        "acc": last["acc"],
        "nmi": last["nmi"],
        "usage": last["usage"],
        "best_acc": best["acc"],
        "best_nmi": best["nmi"],
        **state_at_end(module, data),
        "first_warning_step": int(first[2]) if first else None,
        "first_warning_sign": first[1] if first else None,
        "decomposition_checks": check.checks,
        "decomposition_violations": check.violations,
        "history": history.rows,
    }


@torch.no_grad()
def state_at_end(module: DDCLReadoutModule, data: DigitsDataModule) -> dict[str, float]:
    """Separation, spread, temperature and effective dimension of the embeddings over the whole data set."""
    module.eval()
    seen: list[CodebookRecord] = []
    batch = {"x": torch.cat([part["x"] for part in data.predict_dataloader()])}
    with record_codebooks(find_banks(module), lambda _, one: seen.append(one)):
        module(batch)
    (signals,) = read_signals(seen[0], False, seen[0].valid_tokens())
    shares = torch.linalg.eigvalsh(seen[0].tokens[0].double().T.cov()).clamp(min=1e-300)
    shares = shares / shares.sum()
    return {
        "delta": signals.delta_min,
        "spread": signals.scale,
        "relative_delta": signals.relative_separation,
        "temperature_ratio": signals.temperature_ratio,
        "entropy_ratio": signals.entropy_ratio,
        "effective_dimension": float(torch.special.entr(shares).sum().exp()),
    }


def baselines(seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """Accuracy and NMI of k-means (10 restarts) per seed on fixed features."""
    data = DigitsDataModule(seed=0)
    data.setup()
    parts = list(data.predict_dataloader())
    x, y = (torch.cat([part[key] for part in parts]) for key in ("x", "y"))
    pixels = x.double().numpy()
    features = {
        "pixels": pixels,
        "pca": PCA(COMPONENTS, random_state=0).fit_transform(pixels),
        "whitened_pca": PCA(COMPONENTS, random_state=0, whiten=True).fit_transform(pixels),
    }
    found: dict[str, list[float]] = {}
    for name, values in features.items():
        for seed in seeds:
            codes = KMeans(PROTOTYPES, n_init=10, random_state=seed).fit_predict(values)
            counts = count_matrix(torch.from_numpy(codes), y, PROTOTYPES, 10)
            found.setdefault(f"{name}_acc", []).append(float(hungarian_accuracy(counts)))
            found.setdefault(f"{name}_nmi", []).append(float(normalized_mutual_info(counts)))
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy and relative separation against rho, a line per embedding scale."""
    names = {
        "whiten": "embeddings whitened (default)",
        "per_dimension": "unit variance per dimension",
        "total": "unit total variance",
        "none": "scale not bounded",
    }
    panels = (
        ("acc", "accuracy after the last epoch", "Clustering accuracy"),
        ("delta", r"$\Delta$ after the last epoch (log scale)", "Smallest distance between prototypes"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, (key, label, title) in zip(axes, panels, strict=True):
        for place, (scale, name) in enumerate(names.items()):
            groups = [
                [row[key] for row in result["runs"] if (row["scale"], row["rho"]) == (scale, rho)] for rho in RATIOS
            ]
            found = [(x, values) for x, values in enumerate(groups) if values]
            means = [mean_and_deviation(values)[0] for _, values in found]
            # From the lowest to the highest seed: a deviation would reach below zero on the logarithmic axis.
            below = [mean - min(values) for mean, (_, values) in zip(means, found, strict=True)]
            above = [max(values) - mean for mean, (_, values) in zip(means, found, strict=True)]
            shifted = [x + 0.06 * (place - 1.5) for x, _ in found]
            axis.errorbar(shifted, means, yerr=[below, above], marker="o", capsize=3, label=name)
        edge = RATIOS.index(1.0)
        axis.axvspan(edge - 0.5, edge + 1.5, color="grey", alpha=0.12, lw=0)
        axis.set_xlim(-0.4, edge + 1.4)
        axis.set(xlabel=r"$\rho$ = learning rate of the encoder / of the prototypes", ylabel=label, title=title)
        axis.set_xticks(range(len(RATIOS)), ["0\n(frozen)", *(f"{ratio:g}" for ratio in RATIOS[1:])])
        axis.grid(alpha=0.25)
    for features, style, name in (("pca", "--", "frozen PCA"), ("whitened_pca", ":", "frozen whitened PCA")):
        level = mean_and_deviation(result["baselines"][f"{features}_acc"])[0]
        axes[0].axhline(level, color="black", ls=style, lw=1, label=f"no training: {name}, k-means ({level:.3f})")
    axes[0].set_ylim(0, 1)
    axes[0].text(edge - 0.45, 0.96, "refused by default", fontsize="small", va="top")
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    seeds = len({row["seed"] for row in result["runs"]})
    figure.suptitle(
        f"scikit-learn digits, linear encoder trained on the quantisation loss alone "
        f"(mean, lowest and highest of {seeds} seeds)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(result: dict[str, Any]) -> None:
    """The table of ``docs/measurements.md``."""
    columns = ("scale", "rho", "ACC, last", "ACC, best", "NMI", "Delta", "Delta / spread", "dim.", "T / T_c", "usage")
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["runs"]:
        groups.setdefault((row["scale"], row["rho"]), []).append(row)
    keys = (("acc", 3), ("best_acc", 3), ("nmi", 3), ("delta", 3), ("relative_delta", 3))
    keys += (("effective_dimension", 1), ("temperature_ratio", 4), ("usage", 2))
    for (scale, rho), rows in sorted(groups.items(), key=lambda item: (SCALES.index(item[0][0]), item[0][1])):
        cells = " | ".join(plus_minus((row[key] for row in rows), digits) for key, digits in keys)
        print(f"| {scale} | {rho:g} | {cells} |")
        signs = [(row["first_warning_step"], row["first_warning_sign"]) for row in rows]
        print(f"  first warning (step, sign) per seed: {signs}")
    for name, values in result["baselines"].items():
        print(name, plus_minus(values))


def prepare() -> None:
    """One thread per process, and no chatter."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def train_job(job: tuple[Case, int]) -> dict[str, Any]:
    """For the pool, which passes one argument."""
    return train(*job)


def main() -> None:
    arguments = options(__doc__).parse_args()
    matplotlib.use("Agg")
    prepare()
    epochs, seeds = (2, (0,)) if arguments.quick else (EPOCHS, SEEDS)
    cases = [(scale, rho, seed) for scale, seed, rho in product(SCALES, seeds, RATIOS)]
    if arguments.quick:
        cases = [("none", 0.0, 0), ("whiten", 2.0, 0)]
    result: dict[str, Any] = {"epochs": epochs, **load(arguments.output, "rho_ablation")}
    result.setdefault("runs", [])
    result.setdefault("baselines", baselines(seeds))
    done = {(row["scale"], row["rho"], row["seed"]) for row in result["runs"]}
    jobs = [(case, epochs) for case in cases if case not in done]
    with ExitStack() as stack:
        results: Iterable[dict[str, Any]] = map(train_job, jobs)
        if not arguments.quick:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(PROCESSES, prepare))
            results = pool.imap_unordered(train_job, jobs)
        for row in tqdm(results, total=len(jobs), desc="runs", mininterval=10):
            result["runs"].append(row)
            result["runs"].sort(key=lambda one: (SCALES.index(one["scale"]), one["rho"], one["seed"]))
            save(arguments.output, "rho_ablation", result)
    draw(result, arguments.figures / "rho_ablation.png")
    report(result)


if __name__ == "__main__":
    main()
