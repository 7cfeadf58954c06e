"""Every data module is exported, importable without extras, and constructible from a config."""

import ast
import inspect
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
import pytest

from ddcl_lightning import datamodules

BASES = {"SplitDataModule", "TensorDataModule", "ImageDataModule", "NamedTextDataModule", "TorchvisionDataModule"}
MODULES = [
    value for name in datamodules.__all__ if inspect.isclass(value := getattr(datamodules, name)) and name not in BASES
]
COMMON = ["batch_size", "eval_batch_size", "val_fraction", "evaluate_on", "limit", "seed", "num_workers"]
CONCRETE = [value for value in MODULES if issubclass(value, pl.LightningDataModule)]


def test_all_of_them_are_here() -> None:
    assert len(CONCRETE) == 10


@pytest.mark.parametrize("module", CONCRETE, ids=lambda module: module.__name__)
def test_a_config_can_construct_it(module: type[pl.LightningDataModule]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    options = {"batch_size": 3, "limit": 5, "evaluate_on": "train", "seed": 1}
    needed = {"path": "x"} if "path" in inspect.signature(module).parameters else {}
    config = {"class_path": f"ddcl_lightning.datamodules.{module.__name__}", "init_args": options | needed}
    data = parser.instantiate(parser.parse_object({"data": config})).data
    assert type(data) is module
    assert (data.batch_size, data.limit, data.evaluate_on, data.num_workers) == (3, 5, "train", 0)
    with pytest.raises(jsonargparse.ArgumentError, match="evaluate_on"):
        parser.parse_object({"data": {**config, "init_args": {**needed, "evaluate_on": "never"}}})
    names = [name for name in inspect.signature(module).parameters if name in COMMON]
    assert names == COMMON, "the common arguments, in their order"


@pytest.mark.parametrize("file", sorted(Path(datamodules.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_importing_needs_no_extra(file: Path) -> None:
    # By its source: Lightning imports some of them by itself where they are installed.
    optional = {"torchvision", "datasets", "huggingface_hub", "pyarrow", "PIL"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not optional & {name.partition(".")[0] for name in names}
