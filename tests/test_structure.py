"""A newcomer finds things by the tree alone: names that are unique, folders that say what they are for."""

import ast
import importlib
import inspect
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from registry import classes, module_names, needed
from torchmetrics import Metric

import ddcl_lightning
from ddcl_lightning import Backbone, Decoder, Head, Quantizer, SplitDataModule, Task
from ddcl_lightning.monitoring import Signal

ROOT = Path(__file__).parents[1]
MODULES = [name for name in module_names(ddcl_lightning) if "." in name]
OWNERS_FOLDERS = ("callbacks", "datamodules", "recipes")
FILES = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".gitignore"}
FOLDERS = {"ddcl_lightning", *OWNERS_FOLDERS, "tests", "docs", "benchmarks", "examples"}
TOP_LEVEL = FILES | FOLDERS | {".ci", ".pre-commit-config.yaml"}
# The thin Lightning file is what the package is about; everything else has a folder.
LOOSE_MODULES = {"module"}
TEST_FILES = sorted(path.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("*/test_*.py"))
PACKAGES = {"callbacks": "callbacks", "datamodules": "datamodules", "utils": "ddcl_lightning/_utils"}
TESTS_OF_SEVERAL_MODULES = {
    "backbones/test_offline.py": "loading without a network",
    "callbacks/test_beside_lightning.py": "our callbacks beside Lightning's",
    "callbacks/test_foreign_codebooks.py": "codebooks of others under a CollapseWarning",
    "callbacks/test_watched_runs.py": "runs with and without a CollapseWarning, resumed, in several processes",
    "callbacks/test_row_numbers.py": "rows of files from data modules to predictions",
    "cli/test_killed.py": "commands that are ended or killed in the middle",
    "cli/test_own_data.py": "clustering of a user's own data, from a file to predictions",
    "cli/test_cli.py": "commands as a user runs them",
    "cli/test_cli_configs.py": "what commands write and read again",
    "cli/test_cli_refusals.py": "commands that are refused",
    "datamodules/test_wrong_inputs.py": "a user's own data in every form, and what cannot be used",
    "explain/test_cli_explain.py": "the command `ddcl explain`",
    "heads/test_contributions.py": "what tokens and prototypes add to logits, for every head",
    "heads/test_ddcl_tokens.py": "a readout of pooled tokens",
    "heads/test_token_order.py": "heads under permuted tokens",
    "nn/test_frozen.py": "frozen prototypes in modules, optimizers and callbacks",
}
CODE_FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("ddcl_lightning", *OWNERS_FOLDERS, "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
LONG: dict[str, list[str]] = {}  # a file, and its functions of more than 60 lines
# First lines that say nothing without their context.
UNNAMED = re.compile(r"(Whether|What|Why|How|Where|Likewise|See|The same|Those|Restore (it|them))\b")
# Names that fit any test.
VAGUE = re.compile("^(refusals?|refuses|arguments|errors?|it_works|works|bad_arguments_are_refused)$|^refuses_what")


def test_the_package_root_holds_no_loose_modules() -> None:
    loose = {path.stem for path in (ROOT / "ddcl_lightning").glob("*.py")} - {"__init__", "__main__"}
    assert loose == LOOSE_MODULES


def test_the_top_level_holds_what_the_readme_names_and_nothing_else() -> None:
    command = ["git", "ls-tree", "--name-only", "HEAD"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a checkout")
    assert set(listing.stdout.split()) <= TOP_LEVEL


def test_no_two_modules_have_one_name() -> None:
    """But ``base``, which is the protocol of every plug-in point."""
    paths = [path for folder in ("ddcl_lightning", *OWNERS_FOLDERS) for path in (ROOT / folder).rglob("*.py")]
    counts = Counter(
        path.stem.strip("_") for path in paths if path.stem not in ("__init__", "__main__", "base", "_base")
    )
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["ddcl_lightning", *OWNERS_FOLDERS])
def test_every_file_of_code_is_a_module_that_the_tests_know(folder: str) -> None:
    """Also those of the mapped folders, which lie beside the package."""
    package = "ddcl_lightning" if folder == "ddcl_lightning" else f"ddcl_lightning.{folder}"
    files = (path.relative_to(ROOT / folder).with_suffix("") for path in (ROOT / folder).rglob("*.py"))
    names = {".".join([package, *path.parts]).removesuffix(".__init__") for path in files}
    assert names - {"ddcl_lightning", "ddcl_lightning.__main__"} <= set(MODULES)


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


@pytest.mark.parametrize("path", TEST_FILES, ids=str)
def test_test_files_are_named_after_the_module_that_they_test(path: Path) -> None:
    """Those of several modules together are listed, with what they are about."""
    package = PACKAGES.get(path.parts[0], f"ddcl_lightning/{path.parts[0]}")
    modules = {module.stem.strip("_") for module in (ROOT / package).glob("*.py")}
    contract = path.stem.endswith("_contract")  # that of every class of a folder
    assert path.stem.removeprefix("test_") in modules or contract or str(path) in TESTS_OF_SEVERAL_MODULES


def test_files_that_test_several_modules_are_there() -> None:
    assert set(TESTS_OF_SEVERAL_MODULES) <= set(map(str, TEST_FILES))


@pytest.mark.parametrize("path", [*(ROOT / "tests").rglob("test_*.py")], ids=lambda path: path.stem)
def test_names_of_tests_say_subject_and_behaviour(path: Path) -> None:
    names = re.findall(r"^def test_(\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in names if len(name.split("_")) < 3 or VAGUE.search(name)] == []


@pytest.mark.parametrize("path", CODE_FILES, ids=str)
def test_files_and_functions_are_short_enough_to_read(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 350 or str(path) in LONG
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert long == LONG.get(str(path), [])


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


def test_every_callback_is_exported_from_its_folder() -> None:
    package = importlib.import_module("ddcl_lightning.callbacks")
    ours = [kind for kind in classes(Callback) if kind.__module__.startswith(package.__name__)]
    assert ours
    assert [kind.__name__ for kind in ours if kind.__name__ not in package.__all__] == []


@pytest.mark.parametrize(("base", "folder"), [(Metric, "metrics"), (Signal, "monitoring")])
def test_every_metric_and_signal_is_exported_from_its_folder(base: type, folder: str) -> None:
    package = importlib.import_module(f"ddcl_lightning.{folder}")
    ours = [kind.__name__ for kind in classes(base) if kind.__module__.startswith(f"{package.__name__}.")]
    assert [name for name in ours if name not in package.__all__] == []


def test_a_class_that_the_tests_cannot_make_says_where_to_say_how() -> None:
    class Odd(Backbone):
        def __init__(self, number_of_horns: int) -> None:
            super().__init__()

    with pytest.raises(LookupError, match=r"Odd needs 'number_of_horns'.*add what Odd needs to NEEDED"):
        needed(Odd)


@pytest.mark.parametrize("path", CODE_FILES, ids=str)
def test_first_lines_of_docstrings_name_their_object(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    documented = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    lines = {node.name: (ast.get_docstring(node) or "").splitlines()[:1] for node in documented}
    assert {name: line for name, line in lines.items() if line and UNNAMED.match(line[0])} == {}
