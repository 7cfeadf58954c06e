"""Vectors of a user's own files: arrays and tables, what is known of their rows, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ddcl_lightning.datamodules import FeaturesDataModule
from tests.datamodules.runs import indices

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
TITLES = [f"item {row}" for row in range(6)]


def array(folder: Path, values: Any = X) -> Path:
    np.save(folder / "x.npy", values)
    return folder / "x.npy"


def lines(folder: Path, rows: list[dict[str, Any]], name: str = "items.jsonl") -> Path:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / name


def ready(path: Path, **options: Any) -> FeaturesDataModule:
    data = FeaturesDataModule(path, seed=0, **options)
    data.setup()
    return data


def rows_of(data: FeaturesDataModule) -> torch.Tensor:
    return torch.cat([batch["x"] for batch in data.predict_dataloader()])


def test_an_array_gives_its_rows_without_labels(tmp_path: Path) -> None:
    data = ready(array(tmp_path))
    assert torch.equal(rows_of(data), torch.from_numpy(X))
    (batch,) = data.predict_dataloader()
    assert batch["y"].tolist() == [-1] * 6
    assert batch["index"].tolist() == [*range(6)]
    assert (data.class_names, data.num_classes) == ((), 0)
    assert data.example(0).startswith(f"{X[0, 0]:.3g}, ")


def test_columns_of_items_are_known_by_row(tmp_path: Path) -> None:
    table = lines(tmp_path, [{"id": f"B{row}", "title": title, "kind": row % 2} for row, title in enumerate(TITLES)])
    data = ready(array(tmp_path), items=table, label="kind")
    assert data.example(4) == "item 4"
    assert data.describe_rows([5, 1], ["id", "label"]) == {"id": ["B5", "B1"], "label": ["1", "1"]}
    assert data.class_names == ("0", "1")
    assert ready(array(tmp_path), items=table, title="id").example(3) == "B3"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_column_of_lists_is_the_vectors(form: str, tmp_path: Path) -> None:
    rows = [{"features": vector.tolist(), "name": title} for vector, title in zip(X, TITLES, strict=True)]
    path = lines(tmp_path, rows)
    if form == "parquet":
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        path = tmp_path / "items.parquet"
        pandas.DataFrame(rows).to_parquet(path)
    data = ready(path)
    torch.testing.assert_close(rows_of(data), torch.from_numpy(X))
    assert data.row_names == ("name", "label", "split")
    assert data.example(2) == "item 2"


def test_several_columns_are_one_feature_each(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,a,b\nk,1.5,2\nl,-1,0\n")
    data = ready(tmp_path / "x.csv", features=["b", "a"])
    assert rows_of(data).tolist() == [[2.0, 1.5], [0.0, -1.0]]
    assert data.describe_rows([1], ["id"]) == {"id": ["l"]}


def test_statistics_of_standardized_features_are_those_of_the_training_rows(tmp_path: Path) -> None:
    values = np.concatenate([X, np.full((6, 1), 7.0)], 1)  # one of them is constant
    data = ready(array(tmp_path, values), standardize=True, val_fraction=0.34)
    train = indices(data.train_dataloader())
    assert len(train) == 4
    scaled = rows_of(data)[train]
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 1.0, 1.0, 0.0]))


def text(folder: Path) -> Path:
    (folder / "x.npy").write_text("0.1,0.2\n")
    return folder / "x.npy"


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a missing file": (lambda folder: ready(folder / "no.npy"), FileNotFoundError, "path must be an existing file"),
    "a flat array": (
        lambda folder: ready(array(folder, X[0])),
        ValueError,
        r"shape \(N, F\).* float32 of shape \(3,\)",
    ),
    "words": (lambda folder: ready(array(folder, np.array([["a"]]))), ValueError, r"must hold numbers of shape \(N, F"),
    "objects": (
        lambda folder: ready(array(folder, np.array([{}]))),
        ValueError,
        r"path must be an array that numpy.save wrote; .* \(it holds Python objects, not numbers\). Save it anew",
    ),
    "text by that name": (
        lambda folder: ready(text(folder)),
        ValueError,
        r"path must be an array that numpy.save wrote; .* \(it is a file of another kind under that name\). Save",
    ),
    "infinity": (
        lambda folder: ready(array(folder, X / 0)),
        ValueError,
        "must be finite numbers.*; row 0, column 0 of .* has inf",
    ),
    "other rows": (
        lambda folder: ready(array(folder), items=lines(folder, [{"id": 1}])),
        ValueError,
        r"items must have one row for each of the 6 rows of .*; .*items.jsonl has 1\. Drop or add",
    ),
    "items of a table": (
        lambda folder: ready(lines(folder, [{"features": [1]}]), items=folder / "x"),
        ValueError,
        "items must be None where path is a table",
    ),
    "an unknown column": (
        lambda folder: ready(lines(folder, [{"feature": [1]}]), features="features"),
        ValueError,
        "features must name a column of .*Did you mean 'feature'.*list those of numbers, as features",
    ),
    "ragged lists": (
        lambda folder: ready(lines(folder, [{"features": [1]}, {"features": [1, 2]}])),
        ValueError,
        "features must hold numbers, equally many in each row",
    ),
    "words in a table": (lambda folder: ready(lines(folder, [{"features": ["a"]}])), ValueError, "must hold numbers"),
    "no label": (
        lambda folder: ready(array(folder), label="kind"),
        ValueError,
        r"items must be a table for label 'kind', since .*x.npy has no columns",
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_features_that_cannot_be_used_are_refused_at_setup(name: str, tmp_path: Path) -> None:
    action, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        action(tmp_path)
    assert "\n" not in str(caught.value)


def test_lists_that_a_csv_holds_as_text_are_vectors(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 3)).round(3)
    path = tmp_path / "items.csv"
    pd.DataFrame({"features": [row.tolist() for row in vectors], "id": range(20)}).to_csv(path, index=False)
    data = FeaturesDataModule(path)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    torch.testing.assert_close(batch["x"], torch.tensor(vectors, dtype=torch.float32))
    path.write_text('features\n"[0.1, 0.2]"\n"[0.1]"\n')
    with pytest.raises(ValueError, match=r"features must hold numbers, equally many in each row; row 1 \(from 0\)"):
        FeaturesDataModule(path).setup("fit")
