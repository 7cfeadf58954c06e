"""Sentence embeddings of texts as items: the mean of a frozen encoder's last hidden states, computed once and kept."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILES = {"newsgroups": "20newsgroups_bydate_stripped.jsonl.gz", "sst2": "sst2_glue.jsonl.gz"}
MAX_LENGTH = {"newsgroups": 96, "sst2": 64}  # tokens
NUM_ITEMS = 20_000  # of SST-2, half of them held out; 20 Newsgroups has its own split, by date
BATCH = 64


def items(name: str, folder: Path) -> dict[str, list[str]]:
    """Distinct texts to train on, and distinct others that are held out."""
    with gzip.open(folder / FILES[name], "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    rows = list({row["text"].strip(): row for row in rows if row["text"].strip()}.values())
    if name == "newsgroups":
        return {
            split: [row["text"] for row in rows if (row["split"] == "train") == (split == "train")]
            for split in ("train", "test")
        }
    phrases = [row["text"] for row in rows if row["split"] == "train"]
    order = np.random.default_rng(0).permutation(len(phrases))[:NUM_ITEMS]
    chosen, half = [phrases[place] for place in order], len(order) // 2
    return {"train": chosen[:half], "test": chosen[half:]}


@torch.no_grad()
def embed(texts: list[str], encoder: Path, max_length: int) -> np.ndarray[Any, Any]:
    """Embeddings ``(N, D)`` in float32, by an encoder that computes in bfloat16; texts of like length go together."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(encoder))
    model = AutoModel.from_pretrained(str(encoder), dtype=torch.bfloat16).eval()
    tokens = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
    embedded = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [tokens[place] for place in places]}, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        hidden = model(**inputs).last_hidden_state.float()
        embedded[places] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return embedded


def embeddings(name: str, encoder: Path, texts: Path, cache: Path) -> dict[str, Tensor]:
    """Embeddings of the items of both splits, from ``cache`` where they have been computed."""
    result = {}
    splits: dict[str, list[str]] = {}
    for split in ("train", "test"):
        path = cache / f"items-{name}-{split}.npy"
        if not path.is_file():
            splits = splits or items(name, texts)
            cache.mkdir(parents=True, exist_ok=True)
            np.save(path, embed(splits[split], encoder, MAX_LENGTH[name]))
        result[split] = torch.from_numpy(np.load(path))
    return result
