"""The page of a tree of IDs: complete, harmless, reproducible."""

import dataclasses
from html import escape
from pathlib import Path

import pytest
from test_report import Page

from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.explain.explanation import Neighbour, Sample
from ddcl_lightning.explain.id_report import render_tree
from ddcl_lightning.explain.id_tree import IDTree, collect_tree
from tests.tiny_ids import digit_module, item_data, item_module


@pytest.fixture
def tree(tmp_path: Path) -> IDTree:
    return collect_tree(item_module(), item_data(tmp_path))


def test_the_page_is_whole_and_says_what_was_collected(tree: IDTree) -> None:
    page = Page(render_tree(tree))
    assert page.tags[:3] == ["html", "head", "meta"]
    assert len(set(page.ids)) == len(page.ids)
    for words in ("Features: 4 IDs of 6 items", "50 % of the items share their ID", "3 items of one ID"):
        assert words in page.text
    links = {value.removeprefix("#") for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert links <= set(page.ids)
    assert "67 % of the items (4), 2 IDs" in page.text
    assert render_tree(tree) == render_tree(tree)


def test_levels_are_a_row_each(tree: IDTree) -> None:
    page = render_tree(tree)
    assert page.count("<tr>") == 1 + 2
    assert "<td>1</td><td>3 of 3</td>" in page
    assert "<td>2</td><td>2 of 3</td>" in page


def test_words_of_items_are_never_markup(tree: IDTree) -> None:
    evil = "<script>alert('x')</script> & \u202e"
    sample = Sample(7, evil, evil)
    branch = dataclasses.replace(tree.branches[1], examples=[Neighbour(sample, 1.0, 1.0)])
    branch = dataclasses.replace(branch, children=[dataclasses.replace(branch, codes=(1, 2), children=[])])
    item = dataclasses.replace(tree.items[0], sample=sample)
    page = render_tree(dataclasses.replace(tree, branches=[branch], items=[item], data=evil, checkpoint=evil))
    assert "<script>alert" not in page
    assert escape("<script>alert('x')</script>") in page
    assert "\u202e" not in page
    Page(page)


def test_images_are_shown_in_branches_and_items() -> None:
    tree = collect_tree(digit_module(), DigitsDataModule(seed=0, limit=200), examples=2, inputs=3)
    page = Page(render_tree(tree))
    children = sum(min(2, len(child.examples)) for branch in tree.branches for child in branch.children[:6])
    examples = sum(len(branch.examples) for branch in tree.branches)
    assert page.tags.count("img") == examples + children + 3
    assert "mostly class" in page.text


def test_dead_codes_are_listed_and_have_no_branch(tree: IDTree) -> None:
    dead = dataclasses.replace(tree.branches[0], items=0, share=0.0, examples=[], children=[])
    page = Page(render_tree(dataclasses.replace(tree, branches=[dead, *tree.branches[1:]])))
    assert "Dead, first code of no item: 0." in page.text
    assert "p0" not in page.ids
