"""What is collected of IDs that are known beforehand, in one pass."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from ddcl_lightning import DDCLReadoutModule, IdentityBackbone, MLPDecoder, SemanticIDs
from ddcl_lightning.explain.id_tree import collect_tree
from ddcl_lightning.heads import MeanPooling
from tests.tiny_ids import IDS, ITEMS, item_data, item_module


def test_branches_hold_the_items_of_their_prefix(tmp_path: Path) -> None:
    tree = collect_tree(item_module(), item_data(tmp_path), examples=2)
    assert [(branch.codes, branch.items, branch.distinct) for branch in tree.branches] == [
        ((0,), 1, 1),
        ((1,), 4, 2),
        ((2,), 1, 1),
    ]
    first, second = tree.branches[1].children
    assert (first.codes, first.items, first.distinct) == ((1, 2), 3, 1)
    assert (second.codes, second.items) == ((1, 0), 1)
    assert tree.branches[1].share == pytest.approx(4 / 6)
    assert (tree.num_levels, tree.num_codes, tree.complete) == (2, 3, True)


def test_examples_are_the_items_nearest_to_what_the_prefix_decodes_to(tmp_path: Path) -> None:
    branch = collect_tree(item_module(), item_data(tmp_path), examples=2).branches[1]
    distances = (ITEMS - torch.tensor([10.0, 0.0])).norm(dim=1)
    nearest = sorted((row for row, codes in enumerate(IDS) if codes[0] == 1), key=lambda row: float(distances[row]))
    assert [near.sample.index for near in branch.examples] == nearest[:2]
    assert [near.distance for near in branch.examples] == pytest.approx(distances[nearest[:2]].tolist())
    # One level below it is both codes that count: (10, 1).
    assert branch.children[0].examples[0].sample.index == 5


def test_metrics_and_classes_are_those_of_the_items(tmp_path: Path) -> None:
    tree = collect_tree(item_module(), item_data(tmp_path, label="kind"), inputs=0)
    assert tree.metrics["collisions"] == pytest.approx(3 / 6)
    assert tree.metrics["distinct_ids"] == 4
    shares = {share.name: share.share for share in tree.branches[1].classes}
    counts = Counter(row % 2 for row, codes in enumerate(IDS) if codes[0] == 1)
    assert shares == pytest.approx({str(kind): count / 4 for kind, count in counts.items()})
    assert [share.base for share in tree.branches[1].classes] == pytest.approx([0.5, 0.5])
    assert tree.items == []


def test_items_have_their_id_and_who_shares_it(tmp_path: Path) -> None:
    tree = collect_tree(item_module(), item_data(tmp_path), indices=[5, 4])
    assert [(view.sample.index, view.codes, view.same) for view in tree.items] == [(5, (1, 2), 3), (4, (0, 0), 1)]
    assert [view.sample.content for view in tree.items] == ["item 5", "item 4"]


def test_the_module_is_as_it_was_before(tmp_path: Path) -> None:
    module = item_module().train()
    before, state = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    data = item_data(tmp_path)
    first = collect_tree(module, data)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert collect_tree(module, data) == first


def test_a_part_of_the_items_is_called_one(tmp_path: Path) -> None:
    tree = collect_tree(item_module(), item_data(tmp_path), max_samples=2)
    assert not tree.complete
    assert sum(branch.items for branch in tree.branches) == 2


def test_a_head_without_levels_has_no_tree(tmp_path: Path) -> None:
    plain = DDCLReadoutModule(IdentityBackbone(2), MeanPooling(), SemanticIDs(MLPDecoder(2, widths=(8,))))
    with pytest.raises(ValueError, match="codebooks are of a residual quantizer; DDCLReadoutModule has none"):
        collect_tree(plain, item_data(tmp_path))
    with pytest.raises(ValueError, match="examples must be at least 1; got 0"):
        collect_tree(item_module(), item_data(tmp_path), examples=0)
