"""The recipes that ship with the package: YAML files for ``ddcl fit --config NAME``."""

import difflib
import shutil
from importlib import resources
from pathlib import Path

from ddcl_lightning._utils.files import whole_file


def recipe_paths() -> dict[str, Path]:
    """Shipped recipes by name, sorted."""
    folder = Path(str(resources.files(__name__)))
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Path of a shipped recipe, with or without ``.yaml``.

    Raises:
        ValueError: If there is none of that name; the message names the nearest.
    """
    paths = recipe_paths()
    stem = name.removesuffix(".yaml")
    if stem in paths:
        return paths[stem]
    close = difflib.get_close_matches(stem, paths, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else " Correct the name; `ddcl recipes` says what each does."
    raise ValueError(f"{name!r} is neither a file nor a shipped recipe ({', '.join(paths)}).{hint}")


def describe(path: Path) -> str:
    """First comment line of a recipe: what it does."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip()


def copy_recipe(name: str, folder: str | Path = ".") -> Path:
    """Copy a shipped recipe into a folder and return the copy's path.

    Raises:
        ValueError: If the recipe is unknown.
        FileExistsError: If a file of that name is there already.
    """
    source = find_recipe(name)
    target = Path(folder) / source.name
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it or copy into another folder.")
    with whole_file(target) as draft:
        shutil.copyfile(source, draft)
    return target
