"""Words after ``ddcl fit --config NAME`` under which every shipped recipe runs on a machine without a network."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from ddcl_lightning.heads import PoolingHead
from ddcl_lightning.recipes import recipe_paths
from tests.tiny_data import idx_folder, jpeg_file, text_file
from tests.tiny_models import tiny_bert


def text_words(folder: Path, classes: int, test_name: str = "test") -> list[str]:
    """Options that put a tiny BERT and a tiny file in the place of what a hub would give."""
    model, file = tiny_bert(folder / "bert"), text_file(folder / "texts.jsonl", classes, test_name=test_name)
    words = [f"--model.backbone.init_args.model={model}", f"--data.init_args.path={file}"]
    return [*words, "--model.backbone.init_args.max_length=32", "--data.init_args.batch_size=40"]


def tiny_vit(folder: Path) -> Path:
    """Weights of timm's smallest ViT, as a checkpoint file."""
    import timm

    path = folder / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


# What a recipe needs that a fresh machine without a network does not have.
LOCAL: dict[str, Callable[[Path], list[str]]] = {
    "bert_imdb": lambda folder: text_words(folder, 2),
    "bert_newsgroups": lambda folder: text_words(folder, 20),
    # The tiny file has fewer different words than the recipe has prototypes.
    "bert_newsgroups_hierarchical": lambda folder: [
        *text_words(folder, 20),
        "--model.head.init_args.num_prototypes=[6,20]",
    ],
    "bert_sst2": lambda folder: text_words(folder, 2, "validation"),
    "cluster_texts": lambda folder: [f"--data.path={text_file(folder / 'texts.jsonl')}"],
    "cnn_fashion_mnist": lambda folder: [f"--data.init_args.path={idx_folder(folder / 'images')}"],
    "cifar10_soft_vq": lambda folder: [f"--data.init_args.path={jpeg_file(folder / 'images.npz')}"],
    "fashion_mnist_soft_vq": lambda folder: [f"--data.init_args.path={idx_folder(folder / 'images')}"],
    "vit_cifar10": lambda folder: [
        "--model.backbone.init_args.model=test_vit",
        f"--model.backbone.init_args.checkpoint={tiny_vit(folder)}",
        f"--data.init_args.path={jpeg_file(folder / 'images.npz')}",
    ],
}


# Fewer rows, where the runs of a recipe would take long. Of SHORT_ROWS all are items.
SHORT_ROWS = 320
SHORT = {
    name: [f"--data.init_args.limit={SHORT_ROWS}"]
    for name in ("digits_hierarchical", "digits_soft_vq", "digits_vqvae", "semantic_ids", "vit_digits")
}


def short_words(recipe: str, folder: Path) -> list[str]:
    """Words with which a recipe runs without a network, and soon ends."""
    return [*local_words(recipe, folder), *SHORT.get(recipe, [])]


def local_words(recipe: str, folder: Path) -> list[str]:
    """The words for a recipe, and the files that they name, in ``folder``; none where the recipe needs none."""
    return LOCAL[recipe](folder) if recipe in LOCAL else []


def has_prototypes(recipe: str) -> bool:
    """True if the head of a recipe has prototypes or codes, of which a fit prints a table."""
    config = yaml.safe_load(recipe_paths()[recipe].read_text(encoding="utf-8"))
    module, _, name = config["model"]["head"]["class_path"].rpartition(".")
    return not issubclass(getattr(importlib.import_module(module), name), PoolingHead)
