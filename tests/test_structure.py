"""A newcomer finds things by the tree alone: names that are unique, folders that say what they are for."""

import importlib
import inspect
import pkgutil
from collections import Counter
from pathlib import Path

import pytest
from registry import classes, needed

import ddcl_lightning
from ddcl_lightning import Backbone, Decoder, Head, Quantizer, SplitDataModule, Task

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ddcl_lightning.__path__, "ddcl_lightning.")
    if "__main__" not in module.name
)
OWNERS_FOLDERS = ("callbacks", "datamodules", "recipes")
# The thin Lightning file is what the package is about; everything else has a folder.
LOOSE_MODULES = {"module"}


def test_the_package_root_holds_no_loose_modules() -> None:
    loose = {path.stem for path in (ROOT / "ddcl_lightning").glob("*.py")} - {"__init__", "__main__"}
    assert loose == LOOSE_MODULES


def test_no_two_modules_have_one_name() -> None:
    """But ``base``, which is the protocol of every plug-in point."""
    paths = [path for folder in ("ddcl_lightning", *OWNERS_FOLDERS) for path in (ROOT / folder).rglob("*.py")]
    counts = Counter(
        path.stem.strip("_") for path in paths if path.stem not in ("__init__", "__main__", "base", "_base")
    )
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", MODULES)
def test_no_function_shadows_its_module(name: str) -> None:
    package, _, stem = name.rpartition(".")
    assert not inspect.isroutine(vars(importlib.import_module(package)).get(stem))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert inspect.getdoc(importlib.import_module(name))


@pytest.mark.parametrize("folder", OWNERS_FOLDERS)
def test_the_top_level_folders_explain_themselves(folder: str) -> None:
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert f"`ddcl_lightning.{folder}`" in readme
    assert "To add one" in readme


@pytest.mark.parametrize("base", [Backbone, Decoder, Head, Quantizer, SplitDataModule, Task])
def test_every_class_that_plugs_in_is_exported(base: type) -> None:
    """From its folder and from the package; those that need a library of their own are in ``integrations``."""
    for kind in classes(base):
        _, folder, *_ = kind.__module__.split(".")
        if kind.__module__.startswith("ddcl_lightning.") and folder != "integrations":
            package = importlib.import_module(f"ddcl_lightning.{folder}")
            assert kind.__name__ in package.__all__
            assert getattr(ddcl_lightning, kind.__name__) is kind
            assert kind.__name__ in ddcl_lightning.__all__


def test_a_class_that_the_tests_cannot_make_says_where_to_say_how() -> None:
    class Odd(Backbone):
        def __init__(self, number_of_horns: int) -> None:
            super().__init__()

    with pytest.raises(LookupError, match=r"Odd needs 'number_of_horns'.*add what Odd needs to NEEDED"):
        needed(Odd)
