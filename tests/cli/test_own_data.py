"""Clustering of a user's own data without labels, from the command line: fit, the table, a row for each row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ddcl_lightning.cli.commands import main
from tests.cli.test_cli import QUICK, fails
from tests.tiny_models import tiny_bert

CLUSTERS = ["--model.head.num_prototypes=3"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def blobs() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ninety vectors around three centres, and which."""
    groups = np.arange(90) % 3
    return np.eye(3, 6)[groups] * 9 + np.random.default_rng(0).normal(size=(90, 6)), groups


def npy() -> str:
    np.save("vectors.npy", blobs()[0])
    return "vectors.npy"


def csv() -> str:
    frame = pd.DataFrame(blobs()[0], columns=list("abcdef"))
    frame.insert(0, "sku", [f"s{row:02d}" for row in range(90)])
    frame.to_csv("items.csv", index=False)
    return "items.csv"


def parquet() -> str:
    pytest.importorskip("pyarrow")
    pd.DataFrame({"embedding": list(blobs()[0]), "name": [f"n{row}" for row in range(90)]}).to_parquet("x.parquet")
    return "x.parquet"


SUBJECTS = ("bake the bread dough with flour", "brake wheel engine gear", "violin sonata melody choir")


def sentences() -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.permutation(SUBJECTS[row % 3].split())[:4]) + f" {row}" for row in range(90)]


def txt() -> str:
    Path("notes.txt").write_text("\n".join(sentences()), encoding="utf-8")
    return "notes.txt"


def reviews() -> str:
    pd.DataFrame({"stars": range(90), "review": sentences()}).to_csv("reviews.csv", index=False)
    return "reviews.csv"


def photos() -> str:
    for row in range(90):
        colour = [0, 0, 0]
        colour[row % 3] = 120 + row
        path = Path("photos", f"2{row % 2}", f"{row:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + row, 30), tuple(colour)).save(path)
    return "photos"


def group_of_file(name: str) -> int:
    return int(Path(name).stem) % 3


KINDS: dict[str, tuple[str, Callable[[], str], list[str], list[str]]] = {
    "npy": ("cluster_features", npy, [], []),
    "csv": ("cluster_features", csv, ["--data.id=sku"], ["sku"]),
    "parquet": ("cluster_features", parquet, ["--predictions.columns=[name]"], ["name"]),
    "txt": ("cluster_texts", txt, [], []),
    "reviews": ("cluster_texts", reviews, ["--predictions.columns=[text, stars]"], ["text", "stars"]),
    "photos": ("cluster_images", photos, [], ["file"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_command_clusters_and_one_more_says_where_each_row_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, write, words, columns = KINDS[kind]
    common = ["--config", recipe, f"--data.path={write()}", *CLUSTERS, *words, *QUICK]
    main(["fit", *common])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split() == ["R2", "usage", "perplexity"])
    r2, usage, perplexity = map(float, lines[header + 1].split()[-3:])
    baseline = float(lines[header + 2].split()[-3])
    assert lines[header + 2].startswith("k-means, ")
    assert r2 == pytest.approx(baseline, abs=0.02)
    assert usage == 1
    assert 2.5 < perplexity <= 3
    assert "no labels: R2 is" in printed
    assert " 0 violations" in printed
    main(["predict", *common, f"--ckpt_path={next(tmp_path.rglob('*.ckpt'))}"])
    table = pd.read_csv("assignments.csv")
    ranks = [name for rank in (1, 2, 3) for name in (f"prototype_{rank}", f"weight_{rank}")]
    assert list(table.columns) == ["index", *ranks, *columns]
    assert table["index"].tolist() == list(range(90))
    np.testing.assert_allclose(table[["weight_1", "weight_2", "weight_3"]].sum(axis=1), 1, atol=1e-4)
    groups = table["file"].map(group_of_file) if kind == "photos" else table["index"] % 3
    assert pd.crosstab(groups, table["prototype_1"]).max().sum() >= 88  # each cluster is a group
    if kind == "csv":
        assert table["sku"].tolist() == [f"s{row:02d}" for row in range(90)]
    if kind == "reviews":
        assert table["text"].tolist() == sentences()


def test_a_pretrained_encoder_takes_the_place_of_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    model = tiny_bert(tmp_path / "bert")
    words = [f"--model.backbone=TransformersBackbone --model.backbone.model={model}"]
    main(["fit", "--config=cluster_texts", f"--data.path={txt()}", *CLUSTERS, *QUICK, *" ".join(words).split()])
    assert "k-means, " in capsys.readouterr().out


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "fewer rows than clusters": (
        "cluster_features",
        lambda: np.save("x.npy", np.random.default_rng(0).normal(size=(5, 4))),
        "num_prototypes must not exceed the number of distinct tokens; got 10 prototypes for 5 distinct among 5",
    ),
    "fewer different rows than clusters": (
        "cluster_features",
        lambda: np.save("x.npy", np.eye(6, 4).repeat(10, 0)),
        "num_prototypes must not exceed the number of distinct tokens; got 10 prototypes for 5 distinct among 60",
    ),
    "equal rows": (
        "cluster_features",
        lambda: np.save("x.npy", np.ones((20, 4))),
        "x must vary to fit a PCA; got 20 equal rows. Check the data",
    ),
    "equal texts": (
        "cluster_texts",
        lambda: Path("x.txt").write_text("same words\n" * 9),
        "texts must differ in their words to fit LSABackbone; 9 texts have no word that some have and others have not",
    ),
    "no path": ("cluster_texts", lambda: None, "data.init_args.path must be given: "),
    "another recipe's file": (
        "cluster_texts",
        lambda: np.save("x.npy", np.eye(3)),
        "path must be a file in .csv, .tsv, .jsonl (each also with .gz) or .parquet, or .txt with one text per line",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_clustered_ends_in_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, write, message = REFUSED[name]
    write()
    path = [f"--data.path={path}" for path in Path().glob("x.*")]
    assert message in fails(capsys, "fit", "--config", recipe, *path, *QUICK)
