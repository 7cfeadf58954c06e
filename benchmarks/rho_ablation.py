"""What the ratio of the learning rates does, with and without a bound on the scale of the embeddings.

A linear encoder, initialized by PCA, and ten prototypes train on the quantization loss alone on scikit-learn's 1,797
digits (the recipe ``digits_rho``), for every ratio rho = lr_encoder / lr_prototypes, embedding scale and seed. Frozen
encoders under k-means, and under the same prototypes with rho = 0, are the baselines.

    python benchmarks/rho_ablation.py             # 120 runs of 15 s

Draws ``docs/rho_ablation.png``.
"""

import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from _measure import all_samples, quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, mean, read
from lightning.pytorch.callbacks import Callback
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import CollapseWarning, DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.functional import separation
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.metrics.probing import clustering_scores
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks
from ddcl_lightning.monitoring.signals import read_signals
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.temperature import Temperature
from ddcl_lightning.tasks import Clustering

SCALES = {  # labels of the picture
    "none": "scale not bounded",
    "per_dimension": "unit variance per dimension",
    "whiten": "embeddings whitened (default)",
    "total": "unit total variance",
}
RATIOS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)  # 0 freezes the encoder
EPOCHS, VALIDATE_EVERY = 300, 25
COMPONENTS, PROTOTYPES = 16, 10
FEATURES = {"pixels": "pixels", "pca": "PCA", "whitened-pca": "whitened PCA"}
CASES = {
    f"{scale}/{rho:g}": Case(scale, {"method": "ddcl", "scale": scale, "rho": rho})
    for scale in SCALES
    for rho in RATIOS
} | {f"kmeans/{name}": Case(label, {"method": "kmeans", "features": name}) for name, label in FEATURES.items()}


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


def run(config: Config, seed: int, options: Options) -> Run:
    """Metrics after the last and the best epoch, and the state of the bank."""
    if config["method"] == "kmeans":
        return kmeans(config["features"], seed)
    pl.seed_everything(seed, verbose=False)
    data = DigitsDataModule(batch_size=256)
    module = DDCLReadoutModule(
        PCABackbone(in_features=64, num_components=COMPONENTS, trainable=True),
        DDCLReadout(
            num_prototypes=PROTOTYPES,
            temperature=Temperature(0.1, unit="initial"),  # a shrinking encoder comes closer to T_c
            embedding_scale=config["scale"],
        ),
        Clustering(num_classes=10),
        lr_prototypes=0.01,
        rho=config["rho"],
        allow_unstable=config["rho"] >= 1,
    )
    history, check, watch = History(), DecompositionCheck(), CollapseWarning()
    callbacks = [TemperatureAnnealing(0.1, 0.005), KMeansInitialization(progress=False), check, watch, history]
    epochs = 2 if options.quick else EPOCHS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the collapses are what is measured
        quiet_trainer(epochs, callbacks, check_val_every_n_epoch=min(VALIDATE_EVERY, epochs)).fit(
            module, datamodule=data
        )
    last, best = history.rows[-1], max(history.rows, key=lambda row: row["acc"])
    first = re.match(r"(\w+) in .* at step (\d+)", str(watch.findings[0])) if watch.findings else None
    return {
        **{name: last[name] for name in ("acc", "nmi", "usage")},
        **{f"best_{name}": best[name] for name in ("acc", "nmi")},
        **state_at_end(module, data),
        "first_warning_step": int(first[2]) if first else None,
        "first_warning_sign": first[1] if first else None,
        "checks": check.checks,
        "violations": check.violations,
        "history": history.rows,
    }


@torch.no_grad()
def state_at_end(module: DDCLReadoutModule, data: DigitsDataModule) -> dict[str, float]:
    """Separation, spread, temperature and effective dimension of the embeddings over the whole data set."""
    module.eval()
    observed: list[BankRecord] = []
    with record_codebooks(find_banks(module), lambda _, observation: observed.append(observation)):
        module({"x": all_samples(data)[0]})
    (signals,) = read_signals(observed[0], observed[0].valid_tokens())
    energy = torch.linalg.eigvalsh(observed[0].tokens[0].double().T.cov()).clamp(min=1e-300)
    return {
        "delta": signals.delta_min,
        "spread": signals.scale,
        "relative_delta": signals.relative_separation,
        "temperature_ratio": signals.temperature_ratio,
        "entropy_ratio": signals.entropy_ratio,
        "effective_dimension": float(torch.special.entr(energy / energy.sum()).sum().exp()),
    }


def kmeans(features: str, seed: int) -> Run:
    """k-means (10 restarts) on fixed features."""
    x, y = all_samples(DigitsDataModule(seed=0))
    rows = x.double().numpy()
    if features != "pixels":
        rows = PCA(COMPONENTS, random_state=0, whiten=features == "whitened-pca").fit_transform(rows)
    codes = KMeans(PROTOTYPES, n_init=10, random_state=seed).fit_predict(rows)
    scores = clustering_scores(torch.from_numpy(codes).long(), y, PROTOTYPES)
    return {name: scores[name] for name in ("acc", "nmi")}


def warning(runs: list[Run]) -> str:
    """Number of runs with a warning, and the step of the first one."""
    steps = read(runs, "first_warning_step")
    if not steps:
        return "none"
    ends = " to ".join(dict.fromkeys(f"{step}" for step in (min(steps), max(steps))))
    return f"{len(steps)} of {len(runs)}, step {ends}"


def ablation(results: Results) -> Table:
    return results.table(
        "embedding scale",
        results.where(method="ddcl"),
        {
            "rho": lambda runs: f"{results.configs[runs[0]['case']]['rho']:g}",
            "ACC, last epoch": mean("acc"),
            "ACC, best epoch": mean("best_acc"),
            "NMI, last": mean("nmi"),
            "Delta": mean("delta", ".2g", deviation=False),
            "Delta / spread": mean("relative_delta", ".2g", deviation=False),
            "dim.": mean("effective_dimension", ".3g", deviation=False),
            "T / T_c": mean("temperature_ratio", ".2g", deviation=False),
            "usage": mean("usage", ".2g", deviation=False),
            "first warning": warning,
        },
    )


def baselines(results: Results) -> Table:
    return results.table("features", results.where(method="kmeans"), {"ACC": mean("acc"), "NMI": mean("nmi")})


def draw(results: Results, folder: Path) -> None:
    """Accuracy and separation against rho, a line per embedding scale."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("acc", "accuracy after the last epoch", "Clustering accuracy"),
        ("delta", r"$\Delta$ after the last epoch (log scale)", "Smallest distance between prototypes"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, (key, label, title) in zip(axes, panels, strict=True):
        for place, (scale, name) in enumerate(SCALES.items()):
            groups = [read(results.of(f"{scale}/{rho:g}"), key) for rho in RATIOS]
            points = [(x + 0.06 * (place - 1.5), sum(ys) / len(ys), ys) for x, ys in enumerate(groups) if ys]
            # From the lowest to the highest seed: a deviation would reach below zero on the logarithmic axis.
            errors = [[y - min(ys) for _, y, ys in points], [max(ys) - y for _, y, ys in points]]
            xs, means = [x for x, *_ in points], [y for _, y, _ in points]
            axis.errorbar(xs, means, yerr=errors, marker="o", capsize=3, label=name)
        edge = RATIOS.index(1.0)
        axis.axvspan(edge - 0.5, edge + 1.5, color="grey", alpha=0.12, lw=0)
        axis.set_xlim(-0.4, edge + 1.4)
        axis.set(xlabel=r"$\rho$ = learning rate of the encoder / of the prototypes", ylabel=label, title=title)
        axis.set_xticks(range(len(RATIOS)), ["0\n(frozen)", *(f"{ratio:g}" for ratio in RATIOS[1:])])
        axis.grid(alpha=0.25)
    for features, style in (("pca", "--"), ("whitened-pca", ":")):
        if scores := read(results.of(f"kmeans/{features}"), "acc"):
            level = sum(scores) / len(scores)
            label = f"no training: frozen {FEATURES[features]}, k-means ({level:.3f})"
            axes[0].axhline(level, color="black", ls=style, lw=1, label=label)
    axes[0].set_ylim(0, 1)
    axes[0].text(edge - 0.45, 0.96, "refused by default", fontsize="small", va="top")
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    seeds = len({run["seed"] for run in results.runs})
    figure.suptitle(
        "scikit-learn digits, linear encoder trained on the quantization loss alone "
        f"(mean, lowest and highest of {seeds} seeds)"
    )
    figure.savefig(folder / "rho_ablation.png", dpi=130)
    plt.close(figure)


STUDY = Study(
    "rho_ablation",
    CASES,
    run,
    {"ablation": ablation, "baselines": baselines},
    seeds=range(5),
    settings={"epochs": EPOCHS, "components": COMPONENTS, "prototypes": PROTOTYPES, "lr_prototypes": 0.01},
    quick={name: CASES[name] for name in ("none/0", "whiten/2", "kmeans/pca")},
    picture=draw,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
