"""Every recipe at its defaults, as the command line runs it: what CollapseWarning notices, and of what it gives alarm.

The recipes are in order, so that every alarm would be a false one. Texts go through an encoder that is given, and where
the data are many, fewer of them and fewer epochs are taken; the table says which.

    python benchmarks/recipe_alarms.py --fashion FOLDER --cifar FILE.npz --encoder FOLDER --texts FOLDER --cache FOLDER
"""

import contextlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
from _study import Case, Options, Study
from _tables import Cell, Config, Results, Run, Table, read
from lightning.pytorch.callbacks import Callback

from ddcl_lightning import cli
from ddcl_lightning._utils.compat import callbacks_of
from ddcl_lightning.callbacks import CollapseWarning

LOCAL = (
    *("digits", "digits_adaptive", "digits_hierarchical", "digits_rho", "digits_soft_vq", "digits_vqvae"),
    *("debris", "semantic_ids", "vit_digits"),
)
# Option with the files, and what makes a run short.
IMAGES = {
    "cnn_fashion_mnist": ("fashion", {"limit": 8000, "max_epochs": 5}),
    "fashion_mnist_soft_vq": ("fashion", {"limit": 2000, "max_epochs": 5}),
    "cifar10_soft_vq": ("cifar", {"limit": 2000, "max_epochs": 5}),
}
TEXTS = {
    "bert_sst2": "sst2_glue",
    "bert_imdb": "imdb_10k_5k",
    "bert_newsgroups": "20newsgroups_bydate_stripped",
    "bert_newsgroups_hierarchical": "20newsgroups_bydate_stripped",
}
FEW_TEXTS = {"limit": 1000, "max_epochs": 15}


def _label(name: str, short: Config) -> str:
    return f"{name}, {short['limit']:,} samples, {short['max_epochs']} epochs"


CASES = {
    **{name: Case(name, {"recipe": name}) for name in LOCAL},
    **{
        name: Case(_label(name, short), {"recipe": name, **short}, needs=(files,))
        for name, (files, short) in IMAGES.items()
    },
    **{
        name: Case(
            _label(name, FEW_TEXTS), {"recipe": name, "texts": texts, **FEW_TEXTS}, ("encoder", "texts", "cache")
        )
        for name, texts in TEXTS.items()
    },
}
QUICK = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2"]


class Findings(Callback):
    """Writes the findings of a run's CollapseWarning to ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them."""
        (watch,) = (callback for callback in callbacks_of(trainer) if isinstance(callback, CollapseWarning))
        outcome = {
            "findings": [vars(finding) for finding in watch.findings],
            "explained": {name: row.scalars().get("explained") for name, row in watch.report.items()},
            "steps": trainer.global_step,
        }
        Path(self.path).write_text(json.dumps(outcome), encoding="utf-8")


def run(config: Config, seed: int, options: Options) -> Run:
    """Fit one recipe, and count its findings."""
    name = config["recipe"]
    words = ["fit", "--config", name, f"--seed_everything={seed}", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    words += ["--summary.enabled=false"]
    if "limit" in config:
        words += [f"--data.init_args.limit={config['limit']}", f"--trainer.max_epochs={config['max_epochs']}"]
    if "texts" in config:
        words += [f"--data.init_args.path={options.texts}/{config['texts']}.jsonl.gz"]
        words += [f"--model.backbone.init_args.{key}={getattr(options, option)}" for key, option in BACKBONE.items()]
    elif name in IMAGES:
        words += [f"--data.init_args.path={getattr(options, IMAGES[name][0])}"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words += [f"--trainer.default_root_dir={folder}"]
        words += ["--trainer.callbacks+=recipe_alarms.Findings", f"--trainer.callbacks.path={folder}/findings.json"]
        cli.main(words + (QUICK if options.quick else []))
        outcome = json.loads(Path(folder, "findings.json").read_text(encoding="utf-8"))
    levels = Counter(finding["level"] for finding in outcome["findings"])
    return {**outcome, "alarms": levels["alarm"], "notices": levels["notice"]}


BACKBONE = {"model": "encoder", "cache_dir": "cache"}


def _signs(level: str) -> Cell:
    """Number of findings of a level, and their signs."""

    def cell(runs: list[Run]) -> str:
        signs = Counter(
            finding["sign"] for findings in read(runs, "findings") for finding in findings if finding["level"] == level
        )
        return ", ".join(f"{number} {sign}" for sign, number in sorted(signs.items())) or "0"

    return cell


def table(results: Results) -> Table:
    columns = {"runs": lambda runs: str(len(runs)), "alarms": _signs("alarm"), "notices": _signs("notice")}
    return results.table("recipe", CASES, columns)


STUDY = Study(
    "recipe_alarms",
    CASES,
    run,
    {"recipes": table},
    seeds=(0, 1, 2),
    quick={"digits": CASES["digits"]},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
