"""What is stable, what descends, and what a margin tells, on small problems in float64.

- ``inertia``: signs of the eigenvalues of the linearised flow of an encoder and a bank for rho from 1e-3 to 1e3, its
  fastest growth, and the largest stable rate of the prototypes;
- ``rate``: largest stable rate of plain gradient steps on prototypes, by bisection, times their largest mass;
- ``descent``: steps of 150 in which L_q and F = L_q - T H rise;
- ``split``: splits in an annealing that the smallest margin named before;
- ``repulsion``: where a prototype without mass goes, and the separation that an energy certifies;
- ``check``: what ``DescentCheck`` sees on scikit-learn's digits, by optimizer and rate.

    python benchmarks/stability.py    # about 10 minutes on one core
"""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from _coupled import inertia
from _dynamics import (
    annealed_splits,
    both,
    clusters,
    equilibrium,
    gradient,
    measured_limit,
    start,
)
from _measure import quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, extreme, interval, mean, read
from torch import Tensor

from ddcl_lightning.backbones import PCABackbone
from ddcl_lightning.callbacks import DescentCheck, KMeansInitialization
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.functional import (
    assignment_statistics,
    critical_temperature,
    largest_stable_rate,
    repulsion_energy,
    separation,
    total_variance,
)
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.optim import OptimizerConfig
from ddcl_lightning.tasks import Clustering

POINTS = {
    "collapsed-above": ("prototypes in one point, T = 1.2 T_c", {"place": "collapsed", "fraction": 1.2}),
    "collapsed-below": ("prototypes in one point, T = 0.8 T_c", {"place": "collapsed", "fraction": 0.8}),
    "random": ("random prototypes, T = 0.2 T_c", {"place": "random", "fraction": 0.2}),
    "trained": ("trained, T = 0.2 T_c", {"place": "trained", "fraction": 0.2}),
    "trained-warm": ("trained, T = 0.6 T_c", {"place": "trained", "fraction": 0.6}),
}
FORMS = {"full": ("full gradient", {"detach": False}), "detached": ("detached", {"detach": True})}
CHECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd-0.5": ("SGD, 0.5", {"optimizer": "SGD", "lr": 0.5, "arguments": {}}),
    "sgd-2": ("SGD, 2", {"optimizer": "SGD", "lr": 2.0, "arguments": {}}),
    "sgd-16": ("SGD, 16", {"optimizer": "SGD", "lr": 16.0, "arguments": {}}),
    "momentum-0.5": ("SGD with momentum 0.9, 0.5", {"optimizer": "SGD", "lr": 0.5, "arguments": {"momentum": 0.9}}),
    "adam-0.01": ("Adam, 0.01", {"optimizer": "Adam", "lr": 0.01, "arguments": {}}),
    "adam-0.1": ("Adam, 0.1", {"optimizer": "Adam", "lr": 0.1, "arguments": {}}),
    "adam-1": ("Adam, 1", {"optimizer": "Adam", "lr": 1.0, "arguments": {}}),
    "normalized-0.05": ("`TokenNormalized`, 0.05", {"optimizer": "TokenNormalized", "lr": 0.05, "arguments": {}}),
    "normalized-1": ("`TokenNormalized`, 1", {"optimizer": "TokenNormalized", "lr": 1.0, "arguments": {}}),
}
REPULSIONS = {"barrier": "-ln d²", "bounded": "ln(1 + s² / d²)"}
CASES: dict[str, Case] = {
    **{
        f"inertia/{form}/{point}": Case(f"{label}, {text}", {"question": "inertia", **place, **config}, seeds=(0, 1))
        for form, (text, config) in FORMS.items()
        for point, (label, place) in POINTS.items()
    },
    **{
        f"rate/{form}/{fraction:g}": Case(f"{fraction:g}", {"question": "rate", "fraction": fraction, **config})
        for form, (_, config) in FORMS.items()
        for fraction in (0.05, 0.2, 0.5, 0.8, 0.95)
    },
    **{
        f"descent/{form}/{fraction:g}": Case(
            f"{text}, {fraction:g} T_c", {"question": "descent", "fraction": fraction, **config}
        )
        for form, (text, config) in FORMS.items()
        for fraction in (0.1, 0.3, 0.6, 0.9)
    },
    **{f"split/{form}": Case(text, {"question": "split", **config}) for form, (text, config) in FORMS.items()},
    **{
        f"repulsion/{name}/{optimizer}": Case(
            f"{label}, {optimizer}", {"question": "repulsion", "energy": name, "optimizer": optimizer, "weight": 0.1}
        )
        for optimizer in ("SGD", "Adam")
        for name, label in REPULSIONS.items()
    },
    **{
        f"check/{name}": Case(label, {"question": "check", **config}, seeds=(0, 1, 2))
        for name, (label, config) in CHECKS.items()
    },
}
QUICK = (
    "inertia/full/trained",
    "rate/detached/0.2",
    "descent/full/0.6",
    "split/detached",
    "repulsion/bounded/SGD",
    "check/sgd-2",
)


def run(config: Config, seed: int, options: Options) -> Run:
    """Numbers of one question."""
    torch.set_default_dtype(torch.float64)
    try:
        return QUESTIONS[config["question"]](config, seed, options.quick)
    finally:
        torch.set_default_dtype(torch.float32)


def rate(config: Config, seed: int, quick: bool) -> Run:
    """The measured limit over the bound."""
    tokens = clusters(seed)
    prototypes, temperature = equilibrium(tokens, 5, config["fraction"], config["detach"], seed)
    bound = float(largest_stable_rate(assignment_statistics(tokens, prototypes, temperature).mass))
    steps = 40 if quick else 400
    limit = measured_limit(tokens, prototypes, temperature, config["detach"], 2 * bound, steps)
    return {"ratio": None if limit is None else limit / bound}


def descent(config: Config, seed: int, quick: bool) -> Run:
    """Steps of 150 at half of the largest stable rate in which each function rises."""
    tokens = clusters(seed)
    temperature = config["fraction"] * float(critical_temperature(tokens, detach_assignments=config["detach"]))
    p, rises, before = start(tokens, 6, seed), [0, 0], None
    for _ in range(10 if quick else 151):
        now = both(tokens, p, temperature)
        if before is not None:
            rises = [count + (new > old + 1e-12) for count, new, old in zip(rises, now, before, strict=True)]
        before = now
        mass = assignment_statistics(tokens, p, temperature).mass
        p = p - 0.5 * float(largest_stable_rate(mass)) * gradient(tokens, p, temperature, config["detach"])
    return {"loss": rises[0], "free_energy": rises[1]}


def split(config: Config, seed: int, quick: bool) -> Run:
    """Splits of sixteen prototypes on eight clusters."""
    tokens = clusters(seed, size=180, number=8)
    splits = annealed_splits(tokens, 16, config["detach"], seed, 0.5 if quick else 0.02, 0.9 if quick else 0.97)
    several = [each for each in splits if each.candidates > 1]
    margins = [each.margin for each in splits]
    return {
        "splits": len(several),
        "named": sum(each.named for each in several),
        "chance": sum(1 / each.candidates for each in several),
        "lowest": min(margins),
        "highest": max(margins),
    }


def repulsion(config: Config, seed: int, quick: bool) -> Run:
    """Four prototypes among the tokens, and one twenty scales away that has none."""
    tokens = clusters(seed, size=200, dim=2)
    scale, weight = float(total_variance(tokens).sqrt()), config["weight"]
    temperature = 0.05 * float(critical_temperature(tokens))
    away = tokens.mean(0, keepdim=True) + torch.tensor([20 * scale, 0.0])
    p = torch.cat([start(tokens, 4, seed), away]).requires_grad_()

    def energy() -> Tensor:
        if config["energy"] == "bounded":
            return repulsion_energy(p, scale)
        return -2 * (torch.pdist(p) / scale).log().mean()

    def loss() -> Tensor:
        distances = (tokens.unsqueeze(1) - p).square().sum(-1)
        return ((-distances / temperature).softmax(-1) * distances).sum(-1).mean() + weight * energy()

    optimizer = getattr(torch.optim, config["optimizer"])([p], lr=0.5 if config["optimizer"] == "SGD" else 0.05)
    start_energy = float(loss().detach())
    for _ in range(20 if quick else 5000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    certified = scale / math.sqrt(math.expm1(min(10 * start_energy / weight, 700.0)))
    return {
        "distance": float((p.detach()[4] - tokens.mean(0)).norm()) / scale,
        "energy": float(energy().detach()),
        "loss": float(loss().detach()),
        "certified": certified / float(separation(p.detach()).minimum),
    }


class Rises(DescentCheck):
    """Keeps every rise."""

    def __init__(self) -> None:
        super().__init__(every_n_batches=1, tolerance=0.0)
        self.rises: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Take the value that was logged."""
        super().on_train_batch_end(trainer, *arguments)
        self.rises += [float(value) for name, value in trainer.callback_metrics.items() if name.startswith("ddcl/desc")]


def check(config: Config, seed: int, quick: bool) -> Run:
    """Ten prototypes on a frozen PCA of the digits, at 0.1 T_c."""
    torch.set_default_dtype(torch.float32)
    pl.seed_everything(seed, verbose=False)
    module = DDCLReadoutModule(
        PCABackbone(64, 16),
        DDCLReadout(10),
        Clustering(10),
        rho=0.0,
        lr_prototypes=config["lr"],
        prototype_optimizer=OptimizerConfig(config["optimizer"], dict(config["arguments"])),
    )
    rises = Rises()
    trainer = quiet_trainer(1 if quick else 10, [KMeansInitialization(progress=False, seed=seed), rises])
    try:
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=256))
    except ValueError as error:  # the bank's own, at prototypes that have become infinite
        if "infinite" not in str(error) and "overflow" not in str(error):
            raise
    finite = [rise for rise in rises.rises if math.isfinite(rise)]
    return {"steps": len(finite), "rises": sum(rise > 1e-9 for rise in finite), "largest": max(finite)}


QUESTIONS: dict[str, Callable[[Config, int, bool], Run]] = {
    "inertia": inertia,
    "rate": rate,
    "descent": descent,
    "split": split,
    "repulsion": repulsion,
    "check": check,
}


def questions(results: Results, question: str) -> list[str]:
    """Cases of a question that have been run."""
    return results.where(question=question)


def inertia_table(results: Results) -> Table:
    shown = ("0.001", "1", "1000")
    return results.table(
        "point",
        questions(results, "inertia"),
        {
            "eigenvalues > 0, = 0, < 0, by seed": lambda runs: "; ".join(run["signs"] for run in runs),
            "fastest growth, rho 0.001, 1, 1000": listed("growth", shown),
            "largest stable rate of the prototypes": listed("rate", shown),
        },
    )


def listed(name: str, ratios: tuple[str, ...]) -> Callable[[list[Run]], str]:
    """Means of a value at several ratios."""
    return lambda runs: ", ".join(f"{sum(read(runs, lambda run, r=r: run[name][r])) / len(runs):.2g}" for r in ratios)


def rate_table(results: Results) -> Table:
    rows = [["T / T_c", *(text for text, _ in FORMS.values())]]
    fractions = {results.configs[name]["fraction"] for name in questions(results, "rate")}
    for fraction in sorted(fractions):
        cases = [results.where(question="rate", fraction=fraction, **config) for _, config in FORMS.values()]
        cells = [interval("ratio", ".2f")(results.of(names[0])) if names else "" for names in cases]
        rows.append([f"{fraction:g}", *cells])
    return rows


def descent_table(results: Results) -> Table:
    columns = {"steps in which L_q rises": interval("loss"), "F rises": interval("free_energy")}
    return results.table("assignments, T", questions(results, "descent"), columns)


def split_table(results: Results) -> Table:
    columns = {
        "splits": extreme(sum, "splits", "d"),
        "named before": extreme(sum, "named", "d"),
        "by chance": extreme(sum, "chance", ".1f"),
        "margin before a split": lambda runs: f"{min(read(runs, 'lowest')):.2f} to {max(read(runs, 'highest')):.2f}",
    }
    return results.table("assignments", questions(results, "split"), columns)


def repulsion_table(results: Results) -> Table:
    columns = {
        "distance at the end": mean("distance", ".1f"),
        "energy at the end": mean("energy", ".3f"),
        "certified / real separation": lambda runs: (
            extreme(max, "certified", ".1e")(runs) if "bounded" in runs[0]["case"] else ""
        ),
    }
    return results.table("repulsion, optimizer", questions(results, "repulsion"), columns)


def check_table(results: Results) -> Table:
    columns = {
        "steps": interval("steps"),
        "raise L_q": lambda runs: f"{100 * sum(read(runs, 'rises')) / sum(read(runs, 'steps')):.0f} %",
        "largest rise": lambda runs: f"{100 * max(read(runs, 'largest')):.2g} %",
    }
    return results.table("optimizer of the prototypes, rate", questions(results, "check"), columns)


STUDY = Study(
    "stability",
    CASES,
    run,
    {
        "inertia": inertia_table,
        "rate": rate_table,
        "descent": descent_table,
        "split": split_table,
        "repulsion": repulsion_table,
        "check": check_table,
    },
    seeds=range(5),
    quick={name: CASES[name] for name in QUICK},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
