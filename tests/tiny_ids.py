"""A residual quantizer of given codes, and items whose IDs are known."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddcl_lightning import (
    DDCLReadoutModule,
    IdentityBackbone,
    MLPDecoder,
    Quantizer,
    QuantizerOutput,
    QuantizerReadout,
    SemanticIDs,
)
from ddcl_lightning.datamodules import FeaturesDataModule
from ddcl_lightning.functional._common import mark_padding, zero_padding


class GivenCodes(Quantizer):
    """Nearest code of what the levels before have left, from codebooks ``(L, K, d)`` that never move."""

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.num_codebooks = self.num_levels = len(codebook)
        self.num_codes, self.dim = codebook.shape[1:]

    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        rest, indices = z, []
        for codes in self.codebook:
            indices.append(torch.cdist(rest, codes.expand(*rest.shape[:-2], *codes.shape)).argmin(-1))
            rest = rest - codes[indices[-1]]
        return mark_padding(torch.stack(indices, -1), mask)

    def decode(self, indices: Tensor) -> Tensor:
        levels = zip(self.codebook, indices.unbind(-1), strict=False)
        vectors = torch.stack([codes[index.clamp(min=0)] for codes, index in levels]).sum(0)
        return zero_padding(vectors, (indices >= 0).all(-1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        indices = self.encode(tokens, mask)
        return QuantizerOutput(tokens + (self.decode(indices) - tokens).detach(), indices)


# Two levels of three codes of two dimensions: tens and ones.
CODEBOOK = torch.tensor([[[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
ITEMS = torch.tensor([[10.1, 0.9], [0.2, 10.0], [9.9, 1.1], [10.2, 0.0], [0.1, 0.1], [10.0, 1.0]])
IDS = [[1, 2], [2, 0], [1, 2], [1, 0], [0, 0], [1, 2]]


class Items(torch.utils.data.Dataset[dict[str, Any]]):
    """The items as dict batches."""

    def __len__(self) -> int:
        return len(ITEMS)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": ITEMS[row], "index": torch.tensor(row)}


def item_module(**kwargs: Any) -> DDCLReadoutModule:
    """Items through the given codes."""
    torch.manual_seed(0)
    task = SemanticIDs(MLPDecoder(2, widths=(8,)))
    return DDCLReadoutModule(IdentityBackbone(2), QuantizerReadout(GivenCodes(CODEBOOK)), task, **kwargs)


def item_data(folder: Path, **options: Any) -> FeaturesDataModule:
    """The items in files, with an id, a title and a kind each."""
    np.save(folder / "x.npy", ITEMS.numpy())
    rows = [f"B{row},item {row},{row % 2}" for row in range(len(ITEMS))]
    (folder / "items.csv").write_text("\n".join(["asin,title,kind", *rows]), encoding="utf-8")
    return FeaturesDataModule(folder / "x.npy", items=folder / "items.csv", batch_size=2, seed=0, **options)


def digit_module() -> DDCLReadoutModule:
    """Digits of 64 pixels through two levels of four random codes."""
    torch.manual_seed(0)
    codebook = torch.stack([torch.rand(4, 64), torch.rand(4, 64) - 0.5])
    return DDCLReadoutModule(IdentityBackbone(64), QuantizerReadout(GivenCodes(codebook)), SemanticIDs(MLPDecoder(64)))
