"""Tables in every format, and their labels."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ddcl_lightning.datamodules import TextDataModule
from ddcl_lightning.datamodules._labels import class_numbers
from ddcl_lightning.datamodules._tables import read_columns, require_column

TEXTS = ['plain, with "quotes"', "two\nlines", "NA", "", "ümlaut", "42"]
LABELS = [0, 1, 0, 1, 1, 0]


def write(path: Path) -> Path:
    frame = pd.DataFrame({"text": TEXTS, "label": LABELS})
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".jsonl"):
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.b.csv.gz", "a.tsv", "A.TSV.GZ", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_texts_and_labels(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "A.TSV.GZ":
        path.write_bytes(gzip.compress(write(tmp_path / "a.tsv").read_bytes()))
    else:
        write(path)
    columns = read_columns("path", str(path))
    assert columns["text"] == TEXTS
    assert class_numbers(columns["label"], len(TEXTS)) == (("0", "1"), LABELS)


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\ngood,1\r\n\r\nbad,\r\n")  # byte order mark, CRLF, a blank line
    assert read_columns("path", path) == {"text": ["good", "bad"], "label": ["1", ""]}


def test_long_texts_and_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(read_columns("path", path)["text"][0]) == 200_000
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b", "label": 1}\n', encoding="utf-8")
    assert read_columns("path", path) == {"text": ["a", "b"], "label": [None, 1]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text", r"path must be a file in \.csv, .* or \.parquet; got .*a\.txt"),
        ("a.csv", "", "path must hold at least one row; .*a.csv has none"),
        ("a.csv", "text,label\n", "path must hold at least one row"),
        ("a.jsonl", "\n\n", "path must hold at least one row"),
        (
            "a.csv",
            "text,label\nwell, done,1\n",
            "line 2 of .*a.csv has 3 fields between ',' and the header 2. Quote texts",
        ),
        ("a.csv", 'text,label\n"good,1\n', "line 2 of .*a.csv has unbalanced quotes .unexpected end of data"),
        ("a.csv", 'text,label\n"a" b,1\n', "line 2 of .*a.csv has unbalanced quotes"),
        ("a.csv", "text,text\na,b\n", "columns of .*a.csv must have different names; got text, text"),
        ("a.tsv", 'text\tlabel\n"good\t1\nbad\t0\n"fine\t1\n', "line 4 of .*a.tsv .*quote"),
        ("a.tsv", 'text\tlabel\n"good\t1\nbad"\t0\n', "ends in line 3 of .*a.tsv holds a tab and a line break in one"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 of .*a.jsonl must be JSON; Expecting value"),
        ("a.jsonl", '["a"]\n', r"line 1 of .*a.jsonl must be a JSON object; got \[\"a\"\]"),
        ("a.jsonl.gz", "plain", r"path must be a \.jsonl file in UTF-8; .* cannot be read \(Not a gzipped file"),
        ("a.parquet", "plain", "a.parquet must be a parquet file; it cannot be read"),
    ],
)
def test_broken_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_columns("path", path)
    assert caught.value.__cause__ is None


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"columns of .*a\.parquet must have different names; got text, text\. Rename"):
        read_columns("path", tmp_path / "a.parquet")


def test_other_encodings_cut_files_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\nümlaut\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"val_path must be a \.csv file in UTF-8; .* cannot be read in line 2"):
        read_columns("val_path", path)
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-12])
    with pytest.raises(ValueError, match=r"path must be a \.jsonl file in UTF-8; .* cannot be read"):
        read_columns("path", cut)
    with pytest.raises(FileNotFoundError, match=r"test_path must be an existing file .*; got .*nowhere\.csv"):
        read_columns("test_path", tmp_path / "nowhere.csv")


def test_missing_columns_are_named_with_the_nearest() -> None:
    columns = {"sentence": ["a"], "target": [1]}
    with pytest.raises(
        ValueError,
        match=r"text must name a column of a\.csv, which has sentence, target; got 'sentences'\. Did you mean 'sente",
    ):
        require_column(columns, "text", "sentences", "a.csv")
    with pytest.raises(ValueError, match=r"got 'zzz'\. Then\.$"):
        require_column(columns, "label", "zzz", "a.csv", " Then.")


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([0, 1, 1], ("0", "1"), [0, 1, 1]),
        (["10", "9", "1"], ("1", "9", "10"), [2, 1, 0]),
        ([5, 1, -1, None], ("1", "5"), [1, 0, -1, -1]),
        (["spam", "ham ", "", " "], ("ham", "spam"), [1, 0, -1, -1]),
        (["b", -1, "a"], ("a", "b"), [1, -1, 0]),
        ([1.0, float("nan"), 0.0], ("0", "1"), [1, -1, 0]),
        (["1.0", "", "0.0", "-1.0"], ("0", "1"), [1, -1, 0, -1]),  # the same from a CSV file of pandas
        (["1.5", "v1.0"], ("1.5", "v1.0"), [0, 1]),
        ([True, False], ("False", "True"), [1, 0]),
        ([None, ""], (), [-1, -1]),
    ],
)
def test_classes_of_labels(labels: list[Any], names: tuple[str, ...], numbers: list[int]) -> None:
    assert class_numbers(labels, len(labels)) == (names, numbers)


def test_known_classes_keep_their_numbers() -> None:
    known = ("low", "middle", "high")
    assert class_numbers([2, -1, 0], 3, known) == (known, [2, -1, 0])
    assert class_numbers(["high", "low"], 2, known) == (known, [2, 0])
    with pytest.raises(ValueError, match="labels must be one of low, middle, high or their numbers; got 3"):
        class_numbers([0, 3], 2, known)
    with pytest.raises(ValueError, match="got best"):
        class_numbers(["best", "low"], 2, known)


def test_labels_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every label must occur in the training rows; .* have sports"):
        class_numbers(["news", "news", "sports"], 2)
    assert class_numbers([None, None, "sports"], 2) == (("sports",), [-1, -1, 0])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (0.5, "labels must be integers or strings; got 0.5. Convert them, or pass label=None"),
        ([1], r"labels must be integers or strings; got \[1\]"),
        (-2, "integer labels must be at least 0, or -1 for unlabelled; got -2"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_numbers([label, 1], 2)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"needs pyarrow, .* pip install 'ddcl-lightning\[parquet\]'"):
        read_columns("path", path)


def test_jsonl_is_what_json_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    assert read_columns("path", path)["text"] == TEXTS


GOOD = ('{"text": "a", "label": 0}', '{"text": "b", "label": 1}')


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("1e400", "inf"),
        ("-5", "-5"),
        ("true", "True"),
        ('{"a": 1}', "{'a': 1}"),
        ("[1]", "[1]"),
        ("1.5", "1.5"),
        ("1e300", "1e+300"),
        ("-Infinity", "-inf"),
        ('"1.5"', "'1.5'"),
        ('"-5"', "'-5'"),
        ('"nan"', "'nan'"),
    ],
)
def test_a_label_that_is_no_class_is_refused_by_its_row(label: str, shown: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*GOOD, f'{{"text": "c", "label": {label}}}']))
    expected = (
        rf"labels must be names, or integers [^;]*; row 3 of {re.escape(str(file))} has {re.escape(shown)} as 'label'"
    )
    with pytest.raises(ValueError, match=rf"^{expected}\. Correct it, or leave it empty\.$"):
        TextDataModule(file).setup("fit")


@pytest.mark.parametrize("label", ["NaN", "null", '""', "-1", '"cat"', "1.0"])
def test_a_label_that_is_a_class_or_none_is_taken(label: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([*GOOD, f'{{"text": "c", "label": {label}}}']))
    data = TextDataModule(tmp_path / "a.jsonl")
    data.setup("fit")
    assert set(data.class_names) >= {"0", "1"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\né,0\n".encode("latin-1"), r"cannot be read in line 2 \(invalid .*\)\. Save it as UTF-8"),
        ("a.csv", b"text,label\na,0\nb\0,1\n", r"line 3 of .*a\.csv must hold text; got a NUL byte\. Save"),
        ("a.tsv", b"text\tlabel\na\t0\0\n", r"line 2 of .*a\.tsv must hold text; got a NUL byte\. Save"),
        ("a.csv", b'text,label\n" ",0\n"  ",1\n', r"texts must hold more than white space; .*a\.csv has .* as 'text'"),
        ("a.jsonl", b'{"text": \n', r"line 1 of .*a\.jsonl must be JSON; Expecting value at character 11\. Correct"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"line 1 of .* must be JSON; the key 'text' is there twice\. Cor"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", r"line 1 of .* must be JSON; .*4300 digits.*\. Correct that"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_its_line(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        TextDataModule(tmp_path / name).setup("fit")
