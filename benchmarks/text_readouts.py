"""Table 4 of the paper on real text: every readout on the same frozen encoder, at the same number of parameters.

SST-2, IMDB and 20 Newsgroups with its labels: accuracy of logistic regression on CLS and on the mean token, of every
baseline head and of ours, each trained by DDCLReadoutModule with the same classifier, batches and epochs. Each head
gets the best rate of a ladder, tried on a part of the training data and judged on 5 % of it that are held out, and is
then trained on all of it with five seeds. 20 Newsgroups without labels: k-means (10 restarts) on CLS and on the mean
token, as they are and at unit length, against ours.

    python benchmarks/text_readouts.py --encoder FOLDER --texts FOLDER [--cases 'sst2/*']

Features are computed once and kept in ``--cache``.
"""

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _measure import quiet_trainer
from _study import ROOT, Case, Options, Study
from _tables import Config, Results, Run, Table, mean, same

from ddcl_lightning import Classification, Clustering, DDCLReadout, DDCLReadoutModule, heads
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import IMDBDataModule, NewsgroupsDataModule, SST2DataModule
from ddcl_lightning.datamodules.text import TextDataModule
from ddcl_lightning.heads import MeanPooling
from ddcl_lightning.metrics.probing import Readouts, clustering_scores, collect_readouts, kmeans_scores, linear_probe

PARAMETERS = 25_600  # of a head: what eight banks of sixteen prototypes take with their projections of 384 to 8
SIZE = {"max_parameters": PARAMETERS}
# Rates of heads, prototypes and classifier, as the module's defaults couple them; a projection before prototypes steps
# at a tenth (rho), codes of VQ at ten times as much. The search starts with three neighbours and goes on while the best
# one is at the edge of what was tried.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST = LADDER[3:6]
SEARCHED = "CLSPooling"  # under --quick, which takes one rate for all other heads
HELD_OUT = 0.05
DATA: dict[str, tuple[str, type[TextDataModule]]] = {
    "sst2": ("sst2_glue.jsonl.gz", SST2DataModule),
    "imdb": ("imdb_10k_5k.jsonl.gz", IMDBDataModule),
    "newsgroups": ("20newsgroups_bydate_stripped.jsonl.gz", NewsgroupsDataModule),
}
TASKS: dict[str, dict[str, Any]] = {  # ``search`` is the number of texts that rates are tried on
    "sst2": {"data": "sst2", "max_length": 64, "epochs": 2, "search": 20_000},
    "imdb": {"data": "imdb", "max_length": 128, "epochs": 3, "search": 10_000},
    "topics": {"data": "newsgroups", "max_length": 64, "epochs": 6, "search": 20_000},
}
TITLES = {"sst2": "SST-2", "imdb": "IMDB", "topics": "20 Newsgroups"}
NEWSGROUPS = {"data": "newsgroups", "max_length": 64, "epochs": 15}


def head(label: str, kind: str, weight: float = 0.0, temperature: float = 1.0, **arguments: Any) -> tuple[str, Config]:
    """A head with lambda and the fraction of the critical temperature."""
    config = {"head": kind, "arguments": arguments, "lambda": weight, "temperature": temperature}
    return label, {"method": "head", **config, "prototype_rate": 10 if kind == "VQPooling" else 1}


def ours(
    label: str, prototypes: int, num_heads: int, tokens: str, pooling: str, *schedule: float, **arguments: Any
) -> tuple[str, Config]:
    arguments |= {"num_prototypes": prototypes, "num_heads": num_heads, "tokens": tokens, "pooling": pooling}
    return head(label, "DDCLReadout", *schedule, **arguments, **SIZE)


COLD = (0.0, 0.15)  # lambda, and the fraction of the critical temperature, chosen on the held-out phrases of SST-2
READOUTS: dict[str, tuple[str, Config]] = {
    "logistic-cls": ("CLS + logistic regression", {"method": "logistic regression", "vector": "first"}),
    "logistic-mean": ("mean + logistic regression", {"method": "logistic regression", "vector": "mean"}),
    "cls": head("CLS", "CLSPooling"),
    "cls-hidden": head("CLS, hidden layer", "CLSPooling", **SIZE),
    "mean": head("mean", "MeanPooling"),
    "mean-hidden": head("mean, hidden layer", "MeanPooling", **SIZE),
    "max": head("max", "MaxPooling"),
    "attention": head("attention", "AttentionPooling", **SIZE),
    "attention-4": head("attention, 4 queries", "AttentionPooling", num_heads=4, **SIZE),
    "pma": head("PMA", "PMAPooling", **SIZE),
    "pma-4": head("PMA, 4 seeds", "PMAPooling", num_seeds=4, **SIZE),
    "perceiver": head("Perceiver", "PerceiverPooling", **SIZE),
    "slot-attention": head("slot attention", "SlotAttentionPooling", **SIZE),
    "vq": head("VQ (straight-through)", "VQPooling", num_codes=64, init="kmeans", **SIZE),
    "ours-slots": ours("ours, all tokens, slots", 16, 8, "all", "slots"),
    "ours-cls": ours("ours, CLS, lambda 0.01", 16, 1, "first", "both", 0.01, 0.1),
    "ours-slots-lambda": ours("ours, all tokens, slots, lambda 0.01", 16, 8, "all", "slots", 0.01),
    "ours-both": ours("ours, all tokens, centroid + histogram", 16, 8, "all", "both", 0.0, 0.3),
    "ours-salience": ours("ours, histogram, salience", 14, 8, "all", "histogram", *COLD, token_weights="salience"),
    "ours-mass": ours("ours, tokens + histogram, mass", 14, 8, "all", "tokens_histogram", *COLD, token_weights="mass"),
}
CLUSTERINGS: dict[str, tuple[str, Config]] = {
    f"{method}-{short}{'-unit' if scale == 'unit' else ''}": (
        f"{label}, {name}" + (", unit length" if scale == "unit" else ""),
        {"method": method, "vector": vector, "scale": scale},
    )
    for vector, short, name in (("first", "cls", "CLS"), ("mean", "mean", "mean"))
    for method, label in (("kmeans", "k-means"), ("ours", "ours"))
    for scale in ("none", "unit")
}
NEEDS = ("encoder", "texts")
CASES = {
    **{
        f"{task}/{name}": Case(
            label, {**TASKS[task], **config}, NEEDS, (0,) if config["method"] == "logistic regression" else None
        )
        for task in TASKS
        for name, (label, config) in READOUTS.items()
    },
    **{
        f"newsgroups/{name}": Case(label, {**NEWSGROUPS, **config}, NEEDS)
        for name, (label, config) in CLUSTERINGS.items()
    },
}
QUICK = {  # every head and clustering once, and one of each kind on the second data
    name: case
    for name, case in CASES.items()
    if not name.startswith(("imdb/", "topics/")) or name.endswith("/logistic-mean") or name == "imdb/ours-salience"
}


def data_module(name: str, options: Options, seed: int, **kwargs: Any) -> TextDataModule:
    """Batches of 64 texts, grouped by length."""
    file, kind = DATA[name]
    if options.quick:
        kwargs["limit"] = 1000
    data = kind(path=str(options.texts / file), **{"batch_size": 64, "seed": seed, **kwargs})
    data.setup()
    return data


def create_backbone(config: Config, options: Options) -> TransformersBackbone:
    folder = str(options.cache or ROOT / "feature_cache")
    return TransformersBackbone(str(options.encoder), max_length=config["max_length"], cache_dir=folder)


def encoder_settings(options: Options) -> Config:
    """Settings of the encoder."""
    config = json.loads((Path(options.encoder) / "config.json").read_text(encoding="utf-8"))
    return {key: config[key] for key in ("architectures", "num_hidden_layers", "hidden_size", "vocab_size")}


def run(config: Config, seed: int, options: Options) -> Run:
    """One readout."""
    torch.set_flush_denormal(True)
    backbone = create_backbone(config, options)
    if config["method"] not in ("head", "logistic regression"):
        return cluster(backbone, config, seed, options)
    if config["method"] == "logistic regression":
        place = (config["data"], config["max_length"], options)
        train, test = vectors(*place, "train"), vectors(*place, "evaluated")
        x, test_x = (getattr(readouts, config["vector"]) for readouts in (train, test))
        accuracy = linear_probe(x, train.labels, test_x, test.labels).acc
        return {
            "acc": accuracy,
            "rows": [len(train), len(test)],
            "parameters": 0,
            "classifier": len(set(train.labels.tolist())) * (x.shape[1] + 1),
        }
    data = data_module(config["data"], options, seed)
    backbone.fill_cache(data.train_dataloader())
    backbone.fill_cache(data.val_dataloader())
    rate, tried = search(json.dumps(config), options)
    scores = train_head(backbone, data, config, rate, seed, options)
    return {
        "rate": rate,
        "held_out_acc": tried[rate],
        "tried": {str(key): value for key, value in tried.items()},
        **scores,
    }


@cache
def search(case: str, options: Options) -> tuple[float, dict[float, float]]:
    """The best rate of a case on the held-out part, which stands in for the evaluation data, and accuracy by rate."""
    config, tried = json.loads(case), {}
    held_out = {"val_fraction": HELD_OUT, "evaluate_on": "held_out", "limit": config["search"]}
    data, backbone = data_module(config["data"], options, 0, **held_out), create_backbone(config, options)
    only_one = options.quick and config["head"] != SEARCHED
    while not (only_one and tried) and (rate := next_rate(tried)) is not None:
        tried[rate] = train_head(backbone, data, config, rate, 0, options)["acc"]
    return max(tried, key=tried.__getitem__), tried


def next_rate(tried: dict[float, float]) -> float | None:
    """The rate to try next, or None where the best one has worse neighbours on both sides (or the ladder ends)."""
    place = LADDER.index(max(tried, key=tried.__getitem__)) if tried else 0
    around = LADDER[max(0, place - 1) : place + 2] if len(tried) >= len(FIRST) else FIRST
    return next((rate for rate in around if rate not in tried), None)


def train_head(
    backbone: TransformersBackbone,
    data: TextDataModule,
    config: Config,
    rate: float,
    seed: int,
    options: Options,
) -> Run:
    """Accuracy after the last epoch on the evaluation data, and what the head is made of."""
    module, scores = fit_head(backbone, data, config, rate, seed, 1 if options.quick else config["epochs"])
    return {
        **{name: scores[f"val/{name}"] for name in ("acc", "f1")},
        "parameters": module.head.num_parameters(),
        "classifier": sum(parameter.numel() for parameter in module.task.parameters()),
    }


def fit_head(
    backbone: TransformersBackbone, data: TextDataModule, config: Config, rate: float, seed: int, epochs: int
) -> tuple[DDCLReadoutModule, dict[str, float]]:
    """The trained head with its classifier, and its metrics after the last epoch on the evaluation data."""
    pl.seed_everything(seed, verbose=False)
    module = DDCLReadoutModule(
        backbone,
        getattr(heads, config["head"])(**config["arguments"]),
        Classification(len(data.class_names), quantization_weight=config["lambda"]),
        lr_prototypes=config["prototype_rate"] * rate,
        rho=0.1,
        lr_task=rate,
        lr_schedule="linear",
    )
    callbacks = [
        TemperatureAnnealing(start=config["temperature"], end=config["temperature"], schedule="linear"),
        KMeansInitialization(num_restarts=1, max_tokens=8192, progress=False),
    ]
    trainer = quiet_trainer(epochs, callbacks, check_val_every_n_epoch=epochs)
    trainer.fit(module, datamodule=data)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


@cache
def vectors(name: str, max_length: int, options: Options, split: str) -> Readouts:
    """CLS and mean token of every text."""
    backbone = create_backbone({"max_length": max_length}, options)
    data = data_module(name, options, 0, **({"evaluate_on": "train"} if name == "newsgroups" else {}))
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    backbone.fill_cache(loader)
    module = DDCLReadoutModule(backbone, MeanPooling(), Classification(len(data.class_names), quantization_weight=0.0))
    return collect_readouts(module, loader, max_samples=1 << 30)


def cluster(backbone: TransformersBackbone, config: Config, seed: int, options: Options) -> Run:
    """Scores on the training posts, all of them for fitting and evaluation."""
    if config["method"] == "kmeans":
        readouts = vectors("newsgroups", config["max_length"], options, "evaluated")
        rows = getattr(readouts, config["vector"])
        rows = torch.nn.functional.normalize(rows) if config["scale"] == "unit" else rows
        # Ten restarts of this seed, none shared with another.
        return kmeans_scores(rows, readouts.labels, 20, num_restarts=10, seed=100 * seed)
    data = data_module("newsgroups", options, seed, batch_size=256, evaluate_on="train")
    backbone.fill_cache(data.val_dataloader())
    pl.seed_everything(seed, verbose=False)
    readout: Any = DDCLReadout(20, tokens=config["vector"], embedding_scale=config["scale"])
    module = DDCLReadoutModule(backbone, readout, Clustering(20), lr_prototypes=1e-3, rho=0.0)
    callbacks = [
        TemperatureAnnealing(start=0.1, end=0.005),
        KMeansInitialization(num_restarts=10, seed=100 * seed, progress=False),
    ]
    epochs = 1 if options.quick else config["epochs"]
    quiet_trainer(epochs, callbacks, check_val_every_n_epoch=epochs).fit(module, datamodule=data)
    readouts = collect_readouts(module, data.val_dataloader(), max_samples=1 << 30)
    return clustering_scores(readouts.clusters[:, 0], readouts.labels, 20)


def classification_table(results: Results) -> Table:
    """A row per readout, all tasks side by side."""
    rows = [["readout", "parameters: head, classifier"]]
    columns = {"": mean("acc"), " rate": same("rate", "g"), " held out": mean("held_out_acc", deviation=False)}
    tasks = measured(results)
    rows[0] += [f"{TITLES[task]}{column}" for task in tasks for column in columns]
    for name, (label, _) in READOUTS.items():
        runs = [results.of(f"{task}/{name}") for task in tasks]
        if not any(runs):
            continue
        size = next(filter(None, runs), [])
        cells = [cell(some) for some in runs for cell in columns.values()]
        rows.append([label, ", ".join(same(key, ",")(size) for key in ("parameters", "classifier")), *cells])
    return rows


def comparison_table(results: Results) -> Table:
    """Our heads less the best baseline of each task, and less the mean of the best two, with paired standard errors."""
    tasks = measured(results)
    kinds = ("the best baseline", "the best two")
    rows = [["readout", *(f"{TITLES[task]}, against {kind}" for task in tasks for kind in kinds)]]
    baselines = [name for name, (_, config) in READOUTS.items() if config["method"] == "head" and "ours" not in name]
    best: dict[str, list[dict[int, float]]] = {}
    for task in tasks:
        scores = {name: accuracies(results, f"{task}/{name}") for name in baselines}
        ranked = sorted(filter(None, scores.values()), key=lambda runs: -statistics.fmean(runs.values()))
        best[task] = ranked[:2]
    for name, (label, _) in READOUTS.items():
        if "ours" not in name or not any(results.of(f"{task}/{name}") for task in tasks):
            continue
        cells = []
        for task in tasks:
            runs = accuracies(results, f"{task}/{name}")
            cells += [difference(runs, best[task][:1]), difference(runs, best[task])]
        rows.append([label, *cells])
    return rows


def measured(results: Results) -> list[str]:
    """Tasks of which a readout has been run."""
    return [task for task in TASKS if any(results.of(f"{task}/{name}") for name in READOUTS)]


def accuracies(results: Results, case: str) -> dict[int, float]:
    """Accuracy by seed."""
    return {run["seed"]: run["acc"] for run in results.of(case)}


def difference(runs: dict[int, float], baselines: list[dict[int, float]]) -> str:
    """Mean difference of the seeds that all have, and its standard error."""
    seeds = [seed for seed in runs if all(seed in baseline for baseline in baselines)]
    if len(seeds) < 2 or not baselines:
        return ""
    values = [runs[seed] - statistics.fmean(baseline[seed] for baseline in baselines) for seed in seeds]
    return f"{statistics.fmean(values):+.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def clustering_table(results: Results) -> Table:
    columns = {name.upper(): mean(name) for name in ("acc", "nmi", "ari")}
    return results.table("method", [f"newsgroups/{name}" for name in CLUSTERINGS], columns)


STUDY = Study(
    "text_readouts",
    CASES,
    run,
    {"classification": classification_table, "comparison": comparison_table, "newsgroups": clustering_table},
    seeds=range(5),
    settings=lambda options: {"encoder": encoder_settings(options), "parameters": PARAMETERS, "held_out": HELD_OUT},
    packages=("transformers",),
    quick=QUICK,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
