"""What holds for every backbone: tokens with a mask, each sample by itself, copies, states, and a run in the module."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import DIM, classes, make
from tiny import quiet_trainer
from torch.utils.data import DataLoader

from ddcl_lightning import Backbone, Clustering, DDCLReadout, DDCLReadoutModule
from ddcl_lightning._utils.batch import Batch

BACKBONES = {kind.__name__: kind for kind in classes(Backbone)}
each_backbone = pytest.mark.parametrize("name", BACKBONES)
TEXTS = ["the film was wonderful", "a very boring story, not good", "bad"]


def samples(kind: str) -> list[dict[str, Any]]:
    """Six samples that a backbone may be for; it takes the first kind that it does not refuse."""
    generator = torch.Generator().manual_seed(0)
    make_one: dict[str, Callable[[int], dict[str, Any]]] = {
        "features": lambda number: {"x": torch.randn(DIM, generator=generator)},
        "flat images": lambda number: {"x": torch.rand(64, generator=generator)},
        "images": lambda number: {"x": torch.rand(1, 8, 8, generator=generator)},
        "photographs": lambda number: {"x": torch.rand(3, 40, 40, generator=generator)},
        "texts": lambda number: {"text": TEXTS[number % 3]},
    }
    return [make_one[kind](number) for number in range(6)]


def loader(rows: list[dict[str, Any]], size: int = 3) -> Any:
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]


def prepared(name: str) -> tuple[Backbone, list[dict[str, Any]]]:
    """A backbone in evaluation mode that is ready, and samples for it.

    Raises:
        LookupError: If it takes none of them.
    """
    refusals = []
    for kind in ("features", "flat images", "images", "photographs", "texts"):
        backbone: Backbone = make(BACKBONES[name]).eval()
        rows = samples(kind)
        try:
            backbone.prepare(loader(rows))
            backbone(next(iter(loader(rows))))
        except Exception as error:
            refusals.append(f"{kind}: {error}")
        else:
            return backbone, rows
    raise LookupError(
        f"{name} takes none of the samples that the tests know; add a kind to samples() in tests/backbones/"
        f"test_backbone_contract.py. Refused were {refusals}"
    )


def batch_of(rows: list[dict[str, Any]]) -> Batch:
    return next(iter(loader(rows, len(rows))))


@each_backbone
def test_tokens_and_mask(name: str) -> None:
    backbone, rows = prepared(name)
    values, mask = backbone(batch_of(rows))
    assert values.dim() == 3
    assert values.shape[::2] == (6, backbone.embed_dim)
    assert values.is_floating_point()
    if mask is not None:
        assert mask.shape == values.shape[:2]
        assert mask.dtype == torch.bool
        assert bool(mask.any(1).all())
        values = values[mask]
    assert bool(values.isfinite().all())


@each_backbone
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    backbone, rows = prepared(name)
    values, mask = backbone(batch_of(rows))
    for number, row in enumerate(rows):
        alone, alone_mask = backbone(batch_of([row]))
        together = values[number] if mask is None else values[number, mask[number]]
        torch.testing.assert_close(
            alone[0] if alone_mask is None else alone[0, alone_mask[0]], together, rtol=1e-4, atol=1e-5
        )


@each_backbone
def test_evaluation_is_deterministic_and_copies_agree(name: str) -> None:
    backbone, rows = prepared(name)
    expected = backbone(batch_of(rows)).values
    again = make(BACKBONES[name]).eval()
    again.load_state_dict(backbone.state_dict())  # also of what was prepared
    for twin in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), again):
        torch.manual_seed(7)
        assert torch.equal(twin(batch_of(rows)).values, expected)


@each_backbone
def test_getting_ready_needs_no_gradients_and_can_be_done_again(name: str) -> None:
    backbone, rows = prepared(name)
    expected = backbone(batch_of(rows)).values
    backbone.prepare(loader(rows))
    assert torch.equal(backbone(batch_of(rows)).values, expected)
    assert all(parameter.grad is None for parameter in backbone.parameters())


@each_backbone
def test_runs_in_the_module(name: str) -> None:
    _, rows = prepared(name)
    backbone = make(BACKBONES[name])
    trains = any(parameter.requires_grad for parameter in backbone.parameters())
    rows = [{**row, "y": torch.tensor(number % 2), "index": number} for number, row in enumerate(rows)]
    module = DDCLReadoutModule(
        backbone, DDCLReadout(2, embedding_scale="none"), Clustering(2), rho=0.1 if trains else 0.0
    )
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(rows), loader(rows))
    assert "val/acc" in trainer.callback_metrics
    assert sum(len(output["assignments"]) for output in trainer.predict(module, loader(rows))) == 6
