"""The image recipes on real images, each as the command line runs it.

``vit_digits`` as it is; ``cnn_fashion_mnist`` on the four idx files; ``vit_cifar10`` on the JPEG version of CIFAR-10
with an ImageNet CNN in the ViT's place (a checkpoint of tf_efficientnet_lite0). The summary that ``fit`` prints is
kept: the classifier's accuracy, and linear probes on the pooled readout and on the mean token.

    python benchmarks/image_recipes.py --fashion FOLDER --cifar FILE.npz --checkpoint FILE.pth
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, interval, mean

CNN = "tf_efficientnet_lite0"
CASES = {
    "vit_digits": Case("vit_digits", {"recipe": "vit_digits"}),
    "cnn_fashion_mnist": Case("cnn_fashion_mnist", {"recipe": "cnn_fashion_mnist"}, needs=("fashion",)),
    "vit_cifar10": Case(
        "vit_cifar10",
        {"recipe": "vit_cifar10", "model": CNN, "image_size": 128, "limit": 5000, "limit_val_batches": 32},
        needs=("cifar", "checkpoint"),
    ),
}
QUICK = ["--trainer.enable_checkpointing=false", "--trainer.callbacks=[]"]
QUICK += ["--trainer.max_epochs=1", "--data.init_args.limit=240"]


def run(config: Config, seed: int, options: Options) -> Run:
    """Fit one recipe and return the numbers that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "--config", config["recipe"], f"--seed_everything={seed}", "--trainer.accelerator=cpu"]
        words += ["--trainer.enable_progress_bar=false", "--trainer.logger=false", *(QUICK if options.quick else [])]
        words += files(config, options, Path(folder))
        command = [sys.executable, "-m", "ddcl_lightning", *words]
        start = time.perf_counter()
        process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if process.returncode:
        raise RuntimeError(f"{config['recipe']} ended with {process.returncode}: {process.stderr[-2000:]}")
    output = process.stdout
    probes = re.findall(r"^(pooled readout|mean token|first token) +(\d\.\d+) +\d\.\d+$", output, re.MULTILINE)
    accuracy = re.search(r"^classifier val/acc: (\d\.\d+)$", output, re.MULTILINE)
    violations = re.search(r"decomposition: (\d+) violations in (\d+) checks", output)
    return {
        "classifier": float(accuracy[1]) if accuracy else None,
        "probes": {label: float(value) for label, value in probes},
        "violations": int(violations[1]) if violations else None,
        "checks": int(violations[2]) if violations else None,
        "seconds": round(time.perf_counter() - start),
    }


def files(config: Config, options: Options, folder: Path) -> list[str]:
    """Options that say where the recipe's files are."""
    if config["recipe"] == "cnn_fashion_mnist":
        return [f"--data.init_args.path={options.fashion}"]
    if config["recipe"] == "vit_cifar10":
        return [
            f"--model.backbone.init_args.model={config['model']}",
            f"--model.backbone.init_args.checkpoint={renamed(options.checkpoint, folder)}",
            f"--model.backbone.init_args.image_size={config['image_size']}",
            f"--model.backbone.init_args.cache_dir={folder / 'cache'}",
            f"--data.init_args.path={options.cifar}",
            f"--data.init_args.limit={config['limit']}",
            f"--trainer.limit_val_batches={config['limit_val_batches']}",
        ]
    return []


def renamed(checkpoint: Path, folder: Path) -> Path:
    """The weights under timm's own names: this file has the same tensors in the same order under others."""
    import timm

    own = timm.create_model(CNN).state_dict()
    given = torch.load(checkpoint, map_location="cpu", weights_only=True)
    counters = "num_batches_tracked"
    values = [value for name, value in given.items() if not name.endswith(counters)]
    for name, value in zip((name for name in own if not name.endswith(counters)), values, strict=True):
        if own[name].shape != value.shape:
            raise ValueError(f"{checkpoint.name} does not fit {CNN}: {name} has shape {tuple(value.shape)}.")
        own[name] = value
    path = folder / "renamed.pth"
    torch.save(own, path)
    return path


def table(results: Results) -> Table:
    columns = {
        "classifier": mean("classifier"),
        "probe on the readout": mean("probes.pooled readout"),
        "probe on the mean token": mean("probes.mean token"),
        "seconds": interval("seconds", ".0f"),
    }
    return results.table("recipe", CASES, columns)


STUDY = Study(
    "image_recipes", CASES, run, {"recipes": table}, seeds=(42, 43, 44), quick={"vit_digits": CASES["vit_digits"]}
)

if __name__ == "__main__":
    STUDY.main(__doc__)
