"""Table 4 of the paper on real text: every readout on the same frozen encoder, at the same parameter budget.

SST-2 and IMDB: accuracy of logistic regression on CLS and on the mean token, of every rival head and of ours, each
trained by DDCLReadoutModule with the same classifier, batches and epochs. Each head gets the best rate of a ladder,
tried on a part of the training data and judged on 5 % of it that are held out, and is then trained on all of it with
five seeds. 20 Newsgroups: k-means (10
restarts) on CLS and on the mean token, as they are and at unit length, against ours.

    python benchmarks/text_readouts.py --encoder FOLDER --task sst2       # or imdb, newsgroups
    python benchmarks/text_readouts.py --encoder FOLDER --task sst2 --quick

FOLDER is a Hugging Face encoder; the texts are read from ``--data`` (sst2_glue.jsonl.gz, imdb_10k_5k.jsonl.gz,
20newsgroups_bydate_stripped.jsonl.gz). Features are computed once and kept in ``--cache``. Writes
``text_TASK.json`` after every run, and continues where an interrupted one ended.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import ROOT, load, options, plus_minus, quiet_trainer, save

from ddcl_lightning import Classification, Clustering, DDCLReadout, DDCLReadoutModule, Head
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.callbacks import KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.datamodules import IMDBDataModule, NewsgroupsDataModule, SST2DataModule
from ddcl_lightning.datamodules.text import TextDataModule
from ddcl_lightning.heads import (
    AttentionPooling,
    CLSPooling,
    MaxPooling,
    MeanPooling,
    PerceiverPooling,
    PMAPooling,
    SlotAttentionPooling,
    VQPooling,
)
from ddcl_lightning.metrics.probing import Readouts, clustering_scores, collect_readouts, kmeans_scores, linear_probe

BUDGET = 25_600  # parameters of a head: what eight banks of sixteen prototypes take with their projections of 384 to 8
# Rates of heads, prototypes and classifier, as the module's defaults couple them; a projection before prototypes steps
# at a tenth (rho), codes of VQ at ten times as much. The search starts with three neighbours and goes on while the best
# one is at the edge of what was tried.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST = LADDER[3:6]
SEEDS = (0, 1, 2, 3, 4)
HELD_OUT = 0.05
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"file": "sst2_glue.jsonl.gz", "data": SST2DataModule, "max_length": 64, "epochs": 2, "search": 20_000},
    "imdb": {"file": "imdb_10k_5k.jsonl.gz", "data": IMDBDataModule, "max_length": 128, "epochs": 3, "search": 10_000},
    "newsgroups": {
        "file": "20newsgroups_bydate_stripped.jsonl.gz",
        "data": NewsgroupsDataModule,
        "max_length": 64,
        "epochs": 15,
    },
}
# Head, lambda, temperature as a fraction of the critical one.
HEADS: dict[str, tuple[Callable[[], Head], float, float]] = {
    "CLS": (CLSPooling, 0.0, 1.0),
    "CLS, hidden layer": (lambda: CLSPooling(budget=BUDGET), 0.0, 1.0),
    "mean": (MeanPooling, 0.0, 1.0),
    "mean, hidden layer": (lambda: MeanPooling(budget=BUDGET), 0.0, 1.0),
    "max": (MaxPooling, 0.0, 1.0),
    "attention": (lambda: AttentionPooling(budget=BUDGET), 0.0, 1.0),
    "attention, 4 queries": (lambda: AttentionPooling(num_heads=4, budget=BUDGET), 0.0, 1.0),
    "PMA": (lambda: PMAPooling(budget=BUDGET), 0.0, 1.0),
    "PMA, 4 seeds": (lambda: PMAPooling(num_seeds=4, budget=BUDGET), 0.0, 1.0),
    "Perceiver": (lambda: PerceiverPooling(budget=BUDGET), 0.0, 1.0),
    "slot attention": (lambda: SlotAttentionPooling(budget=BUDGET), 0.0, 1.0),
    "VQ (straight-through)": (lambda: VQPooling(num_codes=64, init="kmeans", budget=BUDGET), 0.0, 1.0),
    "ours, all tokens, slots": (lambda: _ours(16, 8, "all", "slots"), 0.0, 1.0),
    "ours, CLS, lambda 0.01": (lambda: _ours(16, 1, "first", "both"), 0.01, 0.1),
    "ours, all tokens, slots, lambda 0.01": (lambda: _ours(16, 8, "all", "slots"), 0.01, 1.0),
    "ours, all tokens, centroid + histogram": (lambda: _ours(16, 8, "all", "both"), 0.0, 0.3),
    "ours, all tokens, token slots": (lambda: _ours(4, 1, "all", "token_slots"), 0.0, 1.0),
}


def _ours(num_prototypes: int, num_heads: int, tokens: Any, pooling: Any) -> Head:
    return DDCLReadout(num_prototypes, num_heads=num_heads, tokens=tokens, pooling=pooling, budget=BUDGET)


def data_module(task: str, args: argparse.Namespace, seed: int, **kwargs: Any) -> TextDataModule:
    """Batches of 64 texts, grouped by length."""
    spec = TASKS[task]
    limit = 1000 if args.quick else kwargs.pop("limit", None)
    kwargs = {"batch_size": 64, "seed": seed, "limit": limit, **kwargs}
    return spec["data"](path=str(args.data / spec["file"]), **kwargs)


def train(
    backbone: TransformersBackbone, data: TextDataModule, name: str, rate: float, seed: int, epochs: int
) -> dict[str, Any]:
    """Accuracy after the last epoch on the evaluation data, and what the head is made of."""
    create, weight, fraction = HEADS[name]
    pl.seed_everything(seed, verbose=False)
    module = DDCLReadoutModule(
        backbone,
        create(),
        Classification(2, quantization_weight=weight),
        lr_prototypes=10 * rate if name.startswith("VQ") else rate,
        rho=0.1,
        lr_task=rate,
        lr_schedule="linear",
    )
    callbacks = [
        TemperatureAnnealing(start=fraction, end=fraction, schedule="linear"),
        KMeansInitialization(num_restarts=1, max_tokens=8192, progress=False),
    ]
    trainer = quiet_trainer(epochs, callbacks, check_val_every_n_epoch=epochs)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "head": name,
        "seed": seed,
        "rate": rate,
        "acc": found["val/acc"],
        "f1": found["val/f1"],
        "parameters": module.head.num_parameters(),
        "classifier": sum(parameter.numel() for parameter in module.task.parameters()),
        "seconds": round(seconds, 1),
    }


def readouts(backbone: TransformersBackbone, data: TextDataModule, batches: Any) -> Readouts:
    """CLS and mean token of every text."""
    module = DDCLReadoutModule(backbone, MeanPooling(), Classification(len(data.class_names), quantization_weight=0.0))
    return collect_readouts(module, batches, max_samples=1 << 30)


def classification(task: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill in what is missing of one classification table."""
    backbone, epochs = _backbone(task, args), 1 if args.quick else TASKS[task]["epochs"]
    data = data_module(task, args, seed=0)
    data.setup()
    backbone.fill_cache(data.train_dataloader())
    backbone.fill_cache(data.val_dataloader())
    if "logistic regression" not in result:
        train_set = readouts(backbone, data, data.train_dataloader())
        test_set = readouts(backbone, data, data.val_dataloader())
        result["logistic regression"] = {
            name: linear_probe(getattr(train_set, key), train_set.labels, getattr(test_set, key), test_set.labels).acc
            for name, key in (("CLS", "first"), ("mean", "mean"))
        }
        result["rows"] = [len(train_set), len(test_set)]
        save(args.output, f"text_{task}", result)
    chosen, runs = result.setdefault("chosen", {}), result.setdefault("runs", [])
    # The held-out part stands in for the evaluation data, which take no part in the choice.
    held_out = data_module(
        task, args, seed=0, val_fraction=HELD_OUT, evaluate_on="held_out", limit=TASKS[task]["search"]
    )
    for name in HEADS:
        tried = chosen.setdefault(name, {"held_out_acc": {}})["held_out_acc"]
        while (rate := next_rate(tried)) is not None:
            tried[str(rate)] = train(backbone, held_out, name, rate, 0, epochs)["acc"]
        best = chosen[name]["rate"] = float(max(tried, key=tried.__getitem__))
        runs[:] = [run for run in runs if run["head"] != name or run["rate"] == best]
        for seed in SEEDS[: 1 if args.quick else None]:
            if any(run["head"] == name and run["seed"] == seed for run in runs):
                continue
            runs.append(train(backbone, data_module(task, args, seed), name, best, seed, epochs))
            save(args.output, f"text_{task}", result)
            print(task, runs[-1], flush=True)


def next_rate(tried: dict[str, float]) -> float | None:
    """The rate to try next, or None where the best one has worse neighbours on both sides (or the ladder ends)."""
    for rate in FIRST:
        if str(rate) not in tried:
            return rate
    place = LADDER.index(float(max(tried, key=tried.__getitem__)))
    for rate in LADDER[max(0, place - 1) : place + 2]:
        if str(rate) not in tried:
            return rate
    return None


def clustering(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill in the clustering table: training posts, all of them for fitting and evaluation."""
    task = "newsgroups"
    backbone = _backbone(task, args)
    data = data_module(task, args, seed=0, evaluate_on="train")
    data.setup()
    backbone.fill_cache(data.val_dataloader())
    found = readouts(backbone, data, data.val_dataloader())
    result["rows"], runs = len(found), result.setdefault("runs", [])
    views = {"CLS": found.first, "mean": found.mean}
    for seed in SEEDS[: 1 if args.quick else None]:
        done = {run["method"] for run in runs if run["seed"] == seed}
        for view, points in views.items():
            unit = torch.nn.functional.normalize(points)
            for method, rows in ((f"k-means, {view}", points), (f"k-means, {view}, unit length", unit)):
                if method not in done:
                    # Ten restarts of this seed, none shared with another.
                    scores = kmeans_scores(rows, found.labels, 20, num_restarts=10, seed=100 * seed)
                    runs.append({"method": method, "seed": seed, **scores})
            for scale in ("none", "unit"):
                method = f"ours, {view}" + (", unit length" if scale == "unit" else "")
                if method not in done:
                    scores = _cluster(backbone, args, "first" if view == "CLS" else "mean", scale, seed)
                    runs.append({"method": method, "seed": seed, **scores})
            save(args.output, f"text_{task}", result)
            print(seed, view, flush=True)


def _cluster(
    backbone: TransformersBackbone, args: argparse.Namespace, tokens: Any, scale: Any, seed: int
) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    data = data_module("newsgroups", args, seed, batch_size=256, evaluate_on="train")
    module = DDCLReadoutModule(
        backbone, DDCLReadout(20, tokens=tokens, embedding_scale=scale), Clustering(20), lr_prototypes=1e-3, rho=0.0
    )
    callbacks = [
        TemperatureAnnealing(start=0.1, end=0.005),
        KMeansInitialization(num_restarts=10, seed=100 * seed, progress=False),
    ]
    epochs = 1 if args.quick else TASKS["newsgroups"]["epochs"]
    trainer = quiet_trainer(epochs, callbacks, check_val_every_n_epoch=epochs)
    trainer.fit(module, datamodule=data)
    found = collect_readouts(module, data.val_dataloader(), max_samples=1 << 30)
    return clustering_scores(found.clusters[:, 0], found.labels, 20)


def _backbone(task: str, args: argparse.Namespace) -> TransformersBackbone:
    return TransformersBackbone(str(args.encoder), max_length=TASKS[task]["max_length"], cache_dir=str(args.cache))


def table(task: str, result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    if task == "newsgroups":
        lines = ["| method | ACC | NMI | ARI |", "|---|---|---|---|"]
        for method in dict.fromkeys(run["method"] for run in result["runs"]):
            runs = [run for run in result["runs"] if run["method"] == method]
            cells = (plus_minus(run[key] for run in runs) for key in ("acc", "nmi", "ari"))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join(lines)
    lines = ["| readout | ACC | head | classifier | rate |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} + logistic regression | {acc:.3f} | 0 | | |" for name, acc in result["logistic regression"].items()
    ]
    for name in HEADS:
        runs = [run for run in result["runs"] if run["head"] == name]
        if runs:
            sizes = f"{runs[0]['parameters']:,} | {runs[0]['classifier']:,} | {runs[0]['rate']:g}"
            lines.append(f"| {name} | {plus_minus(run['acc'] for run in runs)} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    """Run one task, or go on with it."""
    parser = options(__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a Hugging Face encoder")
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    shared = Path(os.environ.get("DDCL_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder of the text files")
    parser.add_argument("--cache", type=Path, default=ROOT / "feature_cache", help="folder of the features")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_flush_denormal(True)
    result = {} if args.quick else load(args.output, f"text_{args.task}")
    result.pop("versions", None)
    config = json.loads((args.encoder / "config.json").read_text(encoding="utf-8"))
    spec = TASKS[args.task]
    result["settings"] = {
        "encoder": {key: config[key] for key in ("architectures", "num_hidden_layers", "hidden_size", "vocab_size")},
        **{key: spec[key] for key in ("epochs", "max_length", "search") if key in spec},
        "budget": BUDGET,
        "held_out": HELD_OUT,
    }
    if args.task == "newsgroups":
        clustering(args, result)
    else:
        classification(args.task, args, result)
    print(table(args.task, result))


if __name__ == "__main__":
    main()
