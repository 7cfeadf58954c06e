"""Data of one's own that cannot be used: one sentence each, with the argument, the rule, the value and the way out."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ddcl_lightning.datamodules import FeaturesDataModule, ImageFolderDataModule, TextDataModule

X = np.arange(12.0).reshape(4, 3)


def features(path: Any, **options: Any) -> None:
    FeaturesDataModule(path, **options).setup()


def texts(path: Any, **options: Any) -> None:
    TextDataModule(path, label=None, **options).setup()


def images(path: Any, **options: Any) -> None:
    data = ImageFolderDataModule(path, image_size=8, **options)
    data.setup()
    for _ in data.predict_dataloader():
        pass


def file(folder: Path, name: str, content: str | bytes = "") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def npy(folder: Path, values: Any) -> Path:
    np.save(folder / "x.npy", values)
    return folder / "x.npy"


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def parquet(folder: Path, **columns: Any) -> Path:
    pytest.importorskip("pyarrow")
    pd.DataFrame(columns).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def picture(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 12)).save(folder / name)
    return folder


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    # Vectors
    "no such vectors": (lambda f: features(f / "x.npy"), r"path must be an existing file; got .*x\.npy\. Correct"),
    "an empty array": (
        lambda f: features(npy(f, X[:0])),
        r"numbers of shape \(N, F\).* has float64 of shape \(0, 3\)\. ",
    ),
    "an empty array file": (
        lambda f: features(file(f, "x.npy")),
        "path must be an array that numpy.save wrote; .* Save",
    ),
    "a flat array": (
        lambda f: features(npy(f, X[0])),
        r"of shape \(3,\)\. Reshape it to \(N, 1\) if it is one feature",
    ),
    "a flat tensor": (lambda f: features(torch.ones(3)), r"the array has float32 of shape \(3,\)\. Reshape it"),
    "three dimensions": (lambda f: features(X[None]), r"the array has float64 of shape \(1, 4, 3\)\. Convert"),
    "nan": (
        lambda f: features(npy(f, np.where(X == 5, np.nan, X))),
        r"must be finite numbers in float32; row 1, column 2 of .*x\.npy \(from 0\) has nan\. Correct or remove",
    ),
    "infinity": (lambda f: features(np.where(X == 3, np.inf, X)), "row 1, column 0 of the array .* has inf"),
    "beyond float32": (lambda f: features(X * 1e40), r"row 0, column 1 of the array .* has 1e\+40\. Correct"),
    "pickled objects": (
        lambda f: features(npy(f, np.array([[{}]]))),
        r"cannot be read \(it holds Python objects, not numbers\)\. Save it anew, as numbers",
    ),
    "objects in memory": (lambda f: features(np.array([[{}]])), r"has object of shape \(1, 1\)\. Convert"),
    "pickled arrays of a npz": (lambda f: features(npz(f, x=np.array([[{}]]))), "holds Python objects, not numbers"),
    "several arrays": (
        lambda f: features(npz(f, a=X, b=X)),
        r"features must name an array of .*x\.npz, which has a, b; got 'features'\. Name the array",
    ),
    "another array": (lambda f: features(npz(f, a=X), features="b"), r"which has a; got 'b'\. Name the array"),
    "ragged rows": (
        lambda f: features(file(f, "x.csv", "a,b\n1,2\n3\n")),
        r"line 3 of .*x\.csv has 1 fields between ',' and the header 2\. Quote",
    ),
    "ragged vectors": (
        lambda f: features(parquet(f, v=[[1.0, 2.0], [3.0, 4.0], [5.0]])),
        r"row 2 .* of .*x\.parquet has 1 numbers, and row 0 2 as 'v'\. Correct or remove",
    ),
    "words among numbers": (
        lambda f: features(file(f, "x.csv", "a,b\n1,2\n3,many\n")),
        r"must hold numbers, .*; row 1 \(from 0\) of .*x\.csv has 'many' as 'b'\. .* list those of numbers",
    ),
    "gaps": (lambda f: features(file(f, "x.csv", "a,b\n1,2\n3,\n")), "row 1 .* of .*x.csv has nothing as 'b'"),
    "gaps in parquet": (lambda f: features(parquet(f, a=[1.0, None])), "row 1 .* has nothing"),
    "gaps in a frame": (
        lambda f: features(pd.DataFrame({"a": [1.0, None]})),
        "row 1 .* of the DataFrame has nothing as 'a'",
    ),
    "no numbers at all": (
        lambda f: features(file(f, "x.csv", "a,b\nx,y\n")),
        r"features must be columns of numbers, or one of vectors; .*x\.csv has none among a, b\. Name the column",
    ),
    "several columns of vectors": (
        lambda f: features(parquet(f, u=[[1.0]], v=[[2.0]])),
        r"features must name the column of vectors of .*, which has u, v; got None\. Name one",
    ),
    "ids twice": (
        lambda f: features(file(f, "x.csv", "key,a\nk,1\nl,2\nk,3\n"), id="key"),
        r"id must tell rows apart; rows 0 and 2 .* of .*x\.csv both have 'k' as 'key'\. Correct one, or name another",
    ),
    "ids missing": (
        lambda f: features(file(f, "x.csv", "key,a\nk,1\n,2\n"), id="key"),
        r"id must name every row; row 1 .* has '' as 'key'\. Fill it",
    ),
    "another suffix": (
        lambda f: features(file(f, "x.pt", "x")),
        r"path must be a file in \.csv, .* or \.parquet; got .*x\.pt\. Convert or rename it",
    ),
    # Texts
    "no such texts": (lambda f: texts(f / "a.csv"), r"path must be an existing file in \.csv.*one text per line; got"),
    "an empty table": (lambda f: texts(file(f, "a.csv")), "path must hold at least one row; .*a.csv has none. Name a"),
    "an empty file of lines": (
        lambda f: texts(file(f, "a.txt")),
        r"at least one line; .*a\.txt is empty\. Name a file",
    ),
    "white lines": (
        lambda f: texts(file(f, "a.txt", "\n \n")),
        "texts must hold more than white space; .* Name another",
    ),
    "no column of texts": (
        lambda f: texts(file(f, "a.csv", "a,b\n1,2\n")),
        r"text must name the column of .*a\.csv that holds the texts; got None, and none of a, b does\. Name one",
    ),
    "several columns of texts": (
        lambda f: texts(file(f, "a.csv", "title,body\nx,y\n")),
        r"text must name the column .*; got None, and title, body do\. Name one",
    ),
    "another column": (
        lambda f: texts(file(f, "a.csv", "title,body\nx,y\n"), text="titel"),
        r"text must name a column of .*a\.csv, which has title, body; got 'titel'\. Did you mean 'title'",
    ),
    "a frame without texts": (
        lambda f: texts(pd.DataFrame({"a": [1, 2]})),
        "text must name the column of the DataFrame that holds the texts; got None, and none of a does",
    ),
    "an empty frame": (lambda f: texts(pd.DataFrame({"text": []})), r"a DataFrame of shape \(0, 1\)\. Fill it"),
    "an empty list": (lambda f: texts([]), "path must hold at least one text; got an empty list. Fill it"),
    "a list with a gap": (
        lambda f: texts(["a", None, "b"]),
        r"texts must be strings; row 2 of the list has None as 'text'\. Correct or remove",
    ),
    "a list of numbers": (lambda f: texts([1, 2]), "texts must be strings; row 1 of the list has 1 as 'text'"),
    "a gap in a frame": (
        lambda f: texts(pd.DataFrame({"text": ["a", None]})),
        r"texts must be strings; row 2 of the DataFrame has None as 'text'",
    ),
    "latin-1": (
        lambda f: texts(file(f, "a.csv", "text\nümlaut\n".encode("latin-1"))),
        r"path must be a \.csv file in UTF-8; .* cannot be read in line 2 .*Save it as UTF-8",
    ),
    "lines of latin-1": (
        lambda f: texts(file(f, "a.txt", "a\nümlaut\n".encode("latin-1"))),
        r"path must be a text file in UTF-8; .* cannot be read in line 2 .*Save it as UTF-8",
    ),
    "lines cut in the middle": (
        lambda f: texts(file(f, "a.txt.gz", gzip.compress(b"one\n" * 1000)[:-9])),
        "path must be a text file in UTF-8; .* Write the file once more",
    ),
    "a cell without end": (
        lambda f: texts(["a" * 1001]),
        r"texts must be at most 1,000 characters long; row 1 of the list has 1,001 as 'text'\. Cut it into several",
    ),
    "text ids twice": (
        lambda f: texts(pd.DataFrame({"text": ["a", "b"], "key": [7, 7]}), id="key"),
        "rows 0 and 1 .* of the DataFrame both have 7 as 'key'",
    ),
    # Images
    "no such folder": (
        lambda f: images(f / "photos"),
        r"path must be a folder of images or .*; got .*photos\. Correct",
    ),
    "a file for a folder": (lambda f: images(file(f, "a.jpg")), r"path must be a folder of images or .*; got .*a\.jpg"),
    "a folder without images": (
        lambda f: images(file(f, "a.txt", "x").parent, labelled=False),
        r"path must hold images \(\.jpg, .*\); .* has 1 others \(a\.txt\)\. Name the folder that has them",
    ),
    "an empty folder": (lambda f: images(f, labelled=False), "has nothing. Name the folder"),
    "images beside folders": (
        lambda f: images(picture(picture(f, "a.png"), "2020/b.png")),
        r"path must hold images, or a folder for each class; .* has both \('2020' is a folder\)\. Pass labelled=False",
    ),
    "an unreadable image": (
        lambda f: images(file(picture(f, "a.png"), "b.png", "no image").parent),
        r"images must be readable; .*b\.png is not \(.*\)\. Repair or remove it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddcl_lightning.datamodules.text.LONGEST_TEXT", 1000)
    action, message = WRONG[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        action(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert str(caught.value).count(". ") <= 3


def test_images_of_mixed_sizes_and_below_other_folders_are_taken(tmp_path: Path) -> None:
    picture(picture(tmp_path, "a.png"), "2020/may/b.png")
    Image.new("L", (30, 10)).save(tmp_path / "2020" / "c.jpg")
    picture(tmp_path, ".hidden/d.png")
    data = ImageFolderDataModule(tmp_path, labelled=False, image_size=8)
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch["x"].shape == (3, 3, 8, 8)
    assert batch["y"].tolist() == [-1] * 3
    assert data.describe_rows([0, 1, 2], ["file"])["file"] == ["2020/c.jpg", "2020/may/b.png", "a.png"]


@pytest.mark.parametrize("form", ["array", "tensor", "frame", "named", "npz", "csv"])
def test_vectors_come_in_many_forms(form: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    frame.insert(0, "id", range(4))
    frame["name"] = [f"n{row}" for row in range(4)]
    frame.to_csv(tmp_path / "x.csv", index=False)
    sources = {
        "array": X,
        "tensor": torch.from_numpy(X),
        "frame": frame,
        "named": frame.rename(columns={"id": "key"}),
        "npz": npz(tmp_path, features=X, others=X[:, :1]),
        "csv": tmp_path / "x.csv",
    }
    data = FeaturesDataModule(sources[form], id="key" if form == "named" else None)
    data.setup()
    (batch,) = data.predict_dataloader()
    np.testing.assert_array_equal(batch["x"].numpy(), X.astype(np.float32))
    if form in ("frame", "csv"):
        assert data.row_names == ("id", "name", "label", "split")
    if form == "named":
        assert data.row_columns == ("key",)


@pytest.mark.parametrize("form", ["list", "lines", "frame", "csv"])
def test_texts_come_in_many_forms(form: str, tmp_path: Path) -> None:
    rows = ["a text", "another", "a third, with more"]
    frame = pd.DataFrame({"stars": [1, 2, 3], "review": rows, "code": ["1", "2", "3"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    lines = file(tmp_path, "a.txt", "\ufeff" + "\r\n".join(rows) + "\n")
    data = TextDataModule({"list": rows, "lines": lines, "frame": frame, "csv": tmp_path / "a.csv"}[form], label=None)
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch["text"] == rows
    assert data.describe_rows([2, 0], ["text"]) == {"text": [rows[2], rows[0]]}


def test_without_a_path_there_are_digits_to_try(caplog: pytest.LogCaptureFixture) -> None:
    for data, shape in ((FeaturesDataModule(), (64,)), (ImageFolderDataModule(image_size=8), (1, 8, 8))):
        with caplog.at_level("INFO"):
            data.setup()
        assert "No path is given, so the 1,797 digits of scikit-learn are the data" in caplog.text
        batch = next(iter(data.predict_dataloader()))
        assert batch["x"].shape[1:] == shape
        assert data.num_classes == 10
        caplog.clear()
