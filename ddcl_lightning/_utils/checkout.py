"""The mapped folders of a checkout belong to the package beside them, and to no other copy of it."""

from importlib.util import find_spec
from pathlib import Path

MAPPED_FOLDERS = ("callbacks", "datamodules", "recipes")


def refuse_mixed_copies(folder: Path) -> None:
    """Refuse to import a package whose mapped folders come from another copy of it, or from nowhere.

    In a checkout these folders lie beside the package and are found through its installation. A checkout that is on
    ``sys.path`` while another one is installed would take its callbacks from there without a word.

    Args:
        folder: The package's own.

    Raises:
        ImportError: If so; says which copies.
    """
    name = folder.name
    for mapped in MAPPED_FOLDERS:
        spec = find_spec(f"{name}.{mapped}")
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
        if origin is None:
            raise ImportError(
                f"{name} was imported from {folder.parent}, where {name}.{mapped} is not installed. Install this copy: "
                f"pip install -e {folder.parent}"
            )
        if origin not in (folder / mapped, folder.parent / mapped):
            raise ImportError(
                f"{name} was imported from {folder.parent}, but {name}.{mapped} is that of another copy, {origin}. "
                f"Leave the folder {folder.parent}, or install this copy: pip install -e {folder.parent}"
            )


refuse_mixed_copies(Path(__file__).resolve().parents[1])
