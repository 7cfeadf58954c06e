"""Small models and data whose explanation is known beforehand."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddcl_lightning import Backbone, Clustering, DDCLReadout, DDCLReadoutModule, IdentityBackbone, Tokens
from ddcl_lightning.tasks import Task
from tests.tiny import absolute

ANIMALS = ("cat", "dog", "cow")
FRUITS = ("fig", "plum", "pear")
TEXTS = [
    "the cat saw the dog",
    "a plum and a pear",
    "the <b>cow</b> and the cat & the dog",
    "the fig and the plum",
    "a dog <script>alert('pwned')</script> saw a cow",
    "pear, plum: a fig",
] * 4


class Words(Backbone):
    """Whitespace words as tokens: animals left, fruits right, everything else below; a special token first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 2

    def spans(self, batch: Any) -> list[list[tuple[int, int]]]:
        rows = []
        for text in batch["text"]:
            at, row = 0, [(0, 0)]
            for word in text.split():
                at = text.index(word, at)
                row.append((at, at + len(word)))
                at += len(word)
            rows.append(row)
        return rows

    def forward(self, batch: Any) -> Tokens:
        spans = self.spans(batch)
        length = max(map(len, spans))
        values = torch.full((len(spans), length, 2), 99.0)  # padding must not count
        mask = torch.zeros(len(spans), length, dtype=torch.bool)
        for row, (text, places) in enumerate(zip(batch["text"], spans, strict=True)):
            for at, (start, end) in enumerate(places):
                values[row, at] = torch.tensor(_place(text[start:end]))
                mask[row, at] = True
        return Tokens(values, mask)


def _place(word: str) -> tuple[float, float]:
    if any(animal in word for animal in ANIMALS):
        return -1.0, 0.01 * len(word)
    return (1.0, 0.01 * len(word)) if any(fruit in word for fruit in FRUITS) else (0.0, -1.0)


class MeanWords(Words):
    """The same, one token per text."""

    spans = None  # type: ignore[assignment]

    def forward(self, batch: Any) -> Tokens:
        tokens = [torch.tensor([_place(word) for word in text.split()]).mean(0) for text in batch["text"]]
        return Tokens(torch.stack(tokens).unsqueeze(1))


class Rows(Dataset[dict[str, Any]]):
    def __init__(self, content: Sequence[Any], labels: Sequence[int], key: str) -> None:
        self.content, self.labels, self.key = content, labels, key

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {self.key: self.content[row], "y": torch.tensor(self.labels[row]), "index": torch.tensor(row)}


class ToyDataModule(pl.LightningDataModule):
    """Rows, shuffled for training and in order for prediction."""

    def __init__(self, content: Sequence[Any], labels: Sequence[int], key: str = "x", batch_size: int = 5) -> None:
        super().__init__()
        self.rows, self.batch_size = Rows(content, labels, key), batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.rows, batch_size=self.batch_size)


class PointsDataModule(ToyDataModule):
    """Twelve points of two classes on a line, at 0 to 5 and at 100 to 105, which look like small pictures."""

    class_names = ("low", "<i>high</i>")

    def __init__(self, batch_size: int = 5) -> None:
        points = torch.tensor([[float(i), 0.0] for i in (*range(6), *range(100, 106))])
        super().__init__(points, [0] * 6 + [1] * 6, batch_size=batch_size)

    def example(self, index: int) -> "np.ndarray[Any, Any]":
        return np.full((4, 4), 20 * index, dtype=np.uint8)


def texts_module(tokens: bool = True) -> DDCLReadoutModule:
    """Prototypes 0: animals, 1: fruits, 2: the rest, 3: far from everything."""
    module = DDCLReadoutModule(
        Words() if tokens else MeanWords(), DDCLReadout(4, temperature=absolute(0.1)), Clustering(2), rho=0.0
    )
    return with_prototypes(module, [[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [50.0, 50.0]])


def points_module(task: Task | None = None, heads: int = 1) -> DDCLReadoutModule:
    """Prototypes 0 at 1 and 1 at 104; with two heads, one looks at each coordinate."""
    head = DDCLReadout(2, num_heads=heads, temperature=absolute(1.0))
    module = DDCLReadoutModule(IdentityBackbone(2), head, task or Clustering(2), rho=0.0)
    if heads == 1:
        return with_prototypes(module, [[1.0, 0.0], [104.0, 0.0]])
    with torch.no_grad():
        module.head.attention.input_projection.weight.copy_(torch.eye(2))  # type: ignore[union-attr,operator]
        module.head.attention.bank.set_prototypes(torch.tensor([[[1.0], [104.0]], [[0.0], [9.0]]]))  # type: ignore[union-attr,operator]
    return module


def with_prototypes(module: DDCLReadoutModule, values: list[list[float]]) -> DDCLReadoutModule:
    bank = module.head.attention.bank  # type: ignore[union-attr]
    bank.set_prototypes(torch.tensor([values]))  # type: ignore[operator]
    return module


def text_data(**kwargs: Any) -> ToyDataModule:
    return ToyDataModule(TEXTS, [0, 1] * (len(TEXTS) // 2), key="text", **kwargs)


def images(count: int = 6, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 8, 8)
