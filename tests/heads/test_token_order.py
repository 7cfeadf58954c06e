"""Tokens are a set to the heads that pool them all, and a sequence to those that read the first."""

from typing import Any

import pytest
import torch
from registry import DIM, classes, make

from ddcl_lightning import Head

READ_THE_FIRST: list[tuple[str, dict[str, Any]]] = [
    ("CLSPooling", {}),
    ("CLSPooling", {"hidden_dim": 5}),
    ("DDCLReadout", {"tokens": "first", "prototype_dim": 3, "residual": True}),
    ("HierarchicalReadout", {"tokens": ["first", "all"]}),
]
READ_ALL: list[tuple[str, dict[str, Any]]] = [
    ("AttentionPooling", {}),
    ("DDCLReadout", {"pooling": "both"}),
    ("DDCLReadout", {"pooling": "slots"}),
    ("DDCLReadout", {"tokens": "mean"}),
    ("HierarchicalReadout", {"tokens": ["all", "idf_mean"]}),
    ("LibraryVQ", {}),
    ("MaxPooling", {}),
    ("MeanPooling", {}),
    ("PMAPooling", {}),
    ("PerceiverPooling", {}),
    ("SlotAttentionPooling", {}),
    ("SoftVQ", {}),
    ("VQPooling", {}),
]


@pytest.mark.parametrize(("name", "options"), READ_THE_FIRST + READ_ALL)
def test_order_of_tokens(name: str, options: dict[str, Any]) -> None:
    kind = {kind.__name__: kind for kind in classes(Head)}.get(name)
    if kind is None:
        pytest.skip("its library is missing")
    head = make(kind, **options, embed_dim=DIM).eval()
    tokens, mask = torch.randn(4, 6, DIM), torch.rand(4, 6) < 0.6
    mask[:, 0] = True
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    same = torch.allclose(head(tokens, mask).pooled, head(tokens[:, order], mask[:, order]).pooled, atol=1e-5)
    assert same == ((name, options) in READ_ALL)
