"""The image recipes on real images, each as the command line runs it.

``vit_digits`` as it is; ``cnn_fashion_mnist`` on the four idx files; ``vit_cifar10`` on the JPEG version of CIFAR-10
with an ImageNet CNN in the ViT's place (a checkpoint of tf_efficientnet_lite0). The summary that ``fit`` prints is
kept: the classifier's accuracy, and linear probes on the pooled readout and on the mean token.

    python benchmarks/image_recipes.py --fashion FOLDER --cifar FILE.npz --checkpoint FILE.pth
    python benchmarks/image_recipes.py --quick

Recipes whose files are not given are left out. Writes ``image_recipes.json``.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import options, plus_minus, save

SEEDS = (42, 43, 44)
CNN = "tf_efficientnet_lite0"


def run(recipe: str, seed: int, words: list[str], quick: bool) -> dict[str, Any]:
    """Fit one recipe and return the figures that it printed."""
    command = [sys.executable, "-m", "ddcl_lightning", "fit", "--config", recipe, f"--seed_everything={seed}", *words]
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    command += ["--trainer.enable_checkpointing=false", "--trainer.callbacks=[]"] if quick else []
    command += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3"] if quick else []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{recipe} ended with {done.returncode}: {done.stderr[-2000:]}")
    probes = re.findall(r"^(pooled readout|mean token|first token) +(\d\.\d+) +\d\.\d+$", done.stdout, re.MULTILINE)
    accuracy = re.search(r"^classifier val/acc: (\d\.\d+)$", done.stdout, re.MULTILINE)
    violations = re.search(r"decomposition: (\d+) violations in (\d+) checks", done.stdout)
    return {
        "recipe": recipe,
        "seed": seed,
        "classifier": float(accuracy.group(1)) if accuracy else None,
        "probes": {label: float(value) for label, value in probes},
        "violations": [int(number) for number in violations.groups()] if violations else None,
        "seconds": round(time.perf_counter() - start),
    }


def renamed(checkpoint: Path, folder: Path) -> Path:
    """The weights under timm's own names: this file has the same tensors in the same order under others."""
    import timm

    mine = timm.create_model(CNN).state_dict()
    given = torch.load(checkpoint, map_location="cpu", weights_only=True)
    names = [name for name in given if not name.endswith("num_batches_tracked")]
    wanted = [name for name in mine if not name.endswith("num_batches_tracked")]
    for name, value in zip(wanted, (given[name] for name in names), strict=True):
        if mine[name].shape != value.shape:
            raise ValueError(f"{checkpoint.name} does not fit {CNN}: {name} has shape {tuple(value.shape)}.")
        mine[name] = value
    path = folder / "renamed.pth"
    torch.save(mine, path)
    return path


def recipes(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Recipes that have their files, and the options that say where these are."""
    found: dict[str, list[str]] = {"vit_digits": []}
    if args.fashion:
        found["cnn_fashion_mnist"] = [f"--data.init_args.path={args.fashion.resolve()}"]
    if args.cifar and args.checkpoint:
        found["vit_cifar10"] = [
            f"--model.backbone.init_args.model={CNN}",
            f"--model.backbone.init_args.checkpoint={renamed(args.checkpoint, folder)}",
            "--model.backbone.init_args.image_size=128",
            f"--model.backbone.init_args.cache_dir={folder / 'cache'}",
            f"--data.init_args.path={args.cifar.resolve()}",
            "--data.init_args.limit=5000",
            "--trainer.limit_val_batches=32",
        ]
    return found


def main() -> None:
    """Run what has its files."""
    parser = options(__doc__)
    parser.add_argument("--fashion", type=Path, help="folder of the four idx files of Fashion-MNIST")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as JPEG bytes in one .npz")
    parser.add_argument("--checkpoint", type=Path, help=f"ImageNet weights of {CNN}")
    args = parser.parse_args()
    result: dict[str, Any] = {"runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for recipe, words in recipes(args, Path(folder)).items():
            for seed in SEEDS[: 1 if args.quick else None]:
                result["runs"].append(run(recipe, seed, words, args.quick))
                save(args.output, "image_recipes", result)
    print("| recipe | classifier | probe on the readout | probe on the mean token |\n|---|---|---|---|")
    for recipe in dict.fromkeys(row["recipe"] for row in result["runs"]):
        runs = [row for row in result["runs"] if row["recipe"] == recipe]
        cells = [plus_minus(row["classifier"] for row in runs)]
        cells += [plus_minus(row["probes"][label] for row in runs) for label in ("pooled readout", "mean token")]
        print(f"| {recipe} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
