"""The project's own promises: packaging, recipes, README."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from ddcl_lightning.cli import main
from ddcl_lightning.recipes import recipe_paths

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
else:
    PROJECT = {}
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [
    pytest.param(snippet, id=f"{page}-{number}")
    for page in ("monitoring", "codebooks", "semantic-ids", "your-own-data")
    for number, snippet in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.skipif(not PROJECT, reason="needs tomllib (Python 3.11)")
def test_package_list_matches_the_folders() -> None:
    setup = PROJECT["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("ddcl_lightning", "callbacks", "datamodules", "recipes")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    mapped = {folder: package for package, folder in setup["package-dir"].items()}
    shipped = {mapped.get(name, name) for name in folders}
    assert shipped == set(setup["packages"])


@pytest.mark.skipif(not PROJECT, reason="needs tomllib (Python 3.11)")
def test_every_file_of_a_package_that_is_no_code_is_shipped() -> None:
    setup = PROJECT["tool"]["setuptools"]
    folders = {package: ROOT / folder for package, folder in setup["package-dir"].items()}
    listed, unlisted = set(), set()
    for package in setup["packages"]:
        folder = folders.get(package, ROOT / package.replace(".", "/"))
        listed |= {path for pattern in setup["package-data"].get(package, []) for path in folder.glob(pattern)}
        unlisted |= {path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc", ".md")}
    assert sorted(unlisted - listed) == []


def test_recipes_name_shipped_classes() -> None:
    """``class_path: callbacks.X`` works in the checkout and nowhere else."""
    assert recipe_paths()
    for path in recipe_paths().values():
        text = path.read_text(encoding="utf-8")
        paths = re.findall(r"class_path: (\S+)", text)
        assert all(name.startswith(("ddcl_lightning.", "lightning.")) for name in paths), path.name
        assert text.startswith("# "), f"{path.name} needs a first line that says what it does"
        assert yaml.safe_load(text)["seed_everything"] == 42


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The first snippet's imports are not repeated in the others, so each runs on its own: it must import what it uses.
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("snippet", PAGES)
def test_snippets_of_the_pages_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "save_codebooks" in snippet:
        pytest.importorskip("safetensors")
    if "vector_quantize_pytorch" in snippet:
        pytest.importorskip("vector_quantize_pytorch")
    exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


def test_readme_names_every_recipe_and_callback() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    import ddcl_lightning.callbacks as callbacks

    base = {"BankCallback"}  # to write one of your own
    ready = {name for name in callbacks.__all__ if name[0].isupper() and not name.endswith("Error")} - base
    names = [*recipe_paths(), *sorted(ready)]
    assert [name for name in names if name not in readme] == []


def test_readme_predicts_on_files_with_words_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in README.splitlines() if line.startswith("ddcl predict") and "TextDataModule" in line]
    assert len(lines) == 2
    for line in lines:
        words = line.replace(" --ckpt_path ...", "").split()[1:]
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["data"]["class_path"] == "ddcl_lightning.TextDataModule"
        assert printed["data"]["init_args"]["path"] == "new.csv"
