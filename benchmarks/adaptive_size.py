"""How many prototypes does a bank end with that starts with two? Beside silhouette and BIC, on digits and on debris.

``AdaptiveBankSize`` at two levels of its test, and without it (deterministic annealing alone: the last temperature sets
K, up to 30), against k-means at the K of the largest silhouette and at that of the smallest BIC of a Gaussian mixture
(full covariances), both out of 2 to 30, and at the number of classes. Five seeds, which draw the debris; digits are the
same for all. Metrics are those of the last epoch, on the training data. With two seeds of the digits also one split per
check, the most significant or that of the smallest split margin.

    python benchmarks/adaptive_size.py    # about 10 minutes on one core
"""

import warnings
from functools import cache
from typing import Any

import lightning.pytorch as pl
from _measure import all_samples, quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, mean
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor, from_numpy

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import AdaptiveBankSize, CollapseWarning, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import DebrisDataModule, DigitsDataModule
from ddcl_lightning.functional import split_margins
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.metrics.probing import clustering_scores
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.monitoring.token_sampling import collect_tokens
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.optim import SizeRules
from ddcl_lightning.optim.resizing import Resize
from ddcl_lightning.tasks import Clustering

LARGEST = 30
METRICS = ("acc", "nmi", "ari")
DATA: dict[str, dict[str, Any]] = {  # as one recipe reads them
    "digits-whitened": {"data": "digits", "components": 16, "classes": 10, "rho": 0.01, "epochs": 60, "whiten": True},
    "digits-pca": {"data": "digits", "components": 16, "classes": 10, "rho": 0.0, "epochs": 60, "whiten": False},
    "debris": {"data": "debris", "components": 4, "classes": 4, "rho": 0.0, "epochs": 100, "whiten": False},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adaptive-0.01": ("adaptive, 0.01 (the default)", {"method": "adaptive", "significance": 0.01}),
    "adaptive-0.001": ("adaptive, 0.001", {"method": "adaptive", "significance": 0.001}),
    "annealing": ("annealing alone, at most 30", {"method": "adaptive", "significance": None}),
    "kmeans-silhouette": ("k-means, silhouette", {"method": "kmeans", "size": "silhouette"}),
    "kmeans-bic": ("k-means, BIC", {"method": "kmeans", "size": "bic"}),
    "kmeans-classes": ("k-means, classes", {"method": "kmeans", "size": "classes"}),
}
# One split per check, of those that the test finds: the most significant, or that of the smallest split margin.
ORDERS = {
    "one-score": ("adaptive, one at a time by the test", "score"),
    "one-margin": ("adaptive, one at a time by the margin", "margin"),
}
CASES = {
    f"{data}/{method}": Case(label, {**source, **config})
    for data, source in DATA.items()
    for method, (label, config) in METHODS.items()
} | {
    f"{data}/adaptive-{name}": Case(
        label, {**DATA[data], "method": "adaptive", "significance": 0.01, "order": order}, seeds=(0, 1)
    )
    for data in ("digits-whitened", "digits-pca")
    for name, (label, order) in ORDERS.items()
}


class OneAtATime(AdaptiveBankSize):
    """Keeps one of the splits of a check."""

    def __init__(self, rules: SizeRules, order: str) -> None:
        super().__init__(rules)
        self.order = order

    def _plan(self, trainer: pl.Trainer, module: pl.LightningModule, name: str, bank: PrototypeBank) -> Resize:
        plan = super()._plan(trainer, module, name, bank)
        number = sum(change.startswith("split") for change in plan.changes)
        if number < 2:
            return plan
        chosen, rest = len(plan.parents) - number, len(plan.parents) - number
        if self.order == "margin":
            tokens = collect_tokens(trainer, module, name, bank, max_tokens=self.max_tokens, seed=self.seed)
            margins = split_margins(tokens, bank.prototypes.detach(), bank.temperature)[0]
            chosen += int(margins[plan.parents[rest:]].argmin())
        prototypes = plan.prototypes.clone()
        for row in range(rest, len(plan.parents)):  # the first half of one that is not to be split is it again
            first = plan.parents[:rest].tolist().index(int(plan.parents[row]))
            if row != chosen:
                prototypes[first] = bank.prototypes[0, plan.parents[row]].detach().to(prototypes)
        keep = [*range(rest), chosen]
        return Resize(prototypes[keep], plan.parents[keep], [plan.idle[row] for row in keep], plan.changes)


def data_of(config: Config, seed: int) -> DigitsDataModule | DebrisDataModule:
    """The recipe's data; generated ones by the seed of the process."""
    pl.seed_everything(seed, verbose=False)
    return DigitsDataModule() if config["data"] == "digits" else DebrisDataModule(batch_size=400, noise=0.5)


def run(config: Config, seed: int, options: Options) -> Run:
    """K and the metrics after the last epoch."""
    if config["method"] == "adaptive":
        return train(config, seed, 2 if options.quick else config["epochs"])
    sizes = range(2, 5 if options.quick else LARGEST + 1)
    features, y, codes, chosen = baseline(*(config[key] for key in ("data", "components", "whiten")), seed, sizes)
    size = chosen.get(config["size"], config["classes"])
    if size not in codes:
        codes[size] = KMeans(size, n_init=10, random_state=seed).fit_predict(features)
    return {"K": size, **score(codes[size], y, size)}


def train(config: Config, seed: int, epochs: int) -> Run:
    """From two prototypes on; also the steps at which their number changed."""
    data = data_of(config, seed)
    module = DDCLReadoutModule(
        PCABackbone(data.num_features, config["components"], trainable=config["rho"] > 0),
        DDCLReadout(num_prototypes=2),
        Clustering(config["classes"]),
        lr_prototypes=0.01,
        rho=config["rho"],
        gradient_clip_val=1.0 if config["data"] == "debris" else None,
    )
    rules = SizeRules(max_prototypes=LARGEST, significance=config["significance"])
    adaptive = OneAtATime(rules, config["order"]) if "order" in config else AdaptiveBankSize(rules)
    watch = CollapseWarning()
    callbacks = [TemperatureAnnealing(), KMeansInitialization(progress=False), adaptive, watch]
    trainer = quiet_trainer(epochs, callbacks, check_val_every_n_epoch=epochs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CollapseWarning: ")
        trainer.fit(module, datamodule=data)
    (course,) = adaptive.history.values()
    metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in METRICS}
    return {
        "K": course[-1][1],
        "course": course,
        "warnings": sum(finding.level == "alarm" for finding in watch.findings),
        **metrics,
    }


@cache
def baseline(
    data: str, components: int, whiten: bool, seed: int, sizes: range
) -> tuple[Any, Tensor, dict[int, Any], dict[str, int]]:
    """The features that the bank starts from, labels, codes of k-means per size, and the sizes that are chosen."""
    x, y = all_samples(data_of({"data": data}, seed))
    features = PCA(components, whiten=whiten, random_state=seed).fit_transform(x.double().numpy())
    codes = {size: KMeans(size, n_init=10, random_state=seed).fit_predict(features) for size in sizes}
    silhouette = {size: silhouette_score(features, codes[size]) for size in sizes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        bic = {s: GaussianMixture(s, random_state=seed, reg_covar=1e-3).fit(features).bic(features) for s in sizes}
    chosen = {"silhouette": max(silhouette, key=silhouette.__getitem__), "bic": min(bic, key=bic.__getitem__)}
    return features, y, codes, chosen


def score(codes: Any, y: Tensor, size: int) -> dict[str, float]:
    """Metrics of hard codes."""
    scores = clustering_scores(from_numpy(codes).long(), y, size)
    return {name: scores[name] for name in METRICS}


def table(results: Results, data: str) -> Table:
    columns = {
        "K, by seed": lambda runs: ", ".join(str(run["K"]) for run in runs),
        **{name.upper(): mean(name) for name in METRICS},
    }
    return results.table("method", [f"{data}/{method}" for method in METHODS], columns)


def order_table(results: Results) -> Table:
    """Of the seeds of the cases with an order; the default splits all at once."""
    cases = [name for name in results.labels if name.startswith("digits") and "/adaptive-" in name]
    cases = [name for name in cases if "-one-" in name or name.endswith("-0.01")]
    columns = {
        "data": lambda runs: runs[0]["case"].partition("/")[0],
        **{name: lambda runs, name=name: ", ".join(f"{run[name]:.3f}" for run in runs[:2]) for name in ("ari", "nmi")},
        "K": lambda runs: ", ".join(str(run["K"]) for run in runs[:2]),
    }
    return results.table("what a check splits", sorted(cases, reverse=True), columns)


STUDY = Study(
    "adaptive_size",
    CASES,
    run,
    {**{data: lambda results, data=data: table(results, data) for data in DATA}, "order": order_table},
    seeds=range(5),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
