"""The index of a prediction is the number of the row in the user's file."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from numbered import Reader, numbered_table, predict, predict_on_two
from torch.utils.data import DataLoader
from toys import QUIET

from ddcl_lightning.callbacks import AssignmentWriter
from ddcl_lightning.datamodules import (
    CIFAR10DataModule,
    DebrisDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    NewsgroupsDataModule,
    TextDataModule,
)
from ddcl_lightning.datamodules._orbits import FEATURE_NAMES
from tests.processes import succeed_in_processes
from tests.tiny_data import idx_folder, jpeg_file

GAPS = (0, 7, 8, 39)
pytestmark = pytest.mark.filterwarnings("ignore:.*left out .* texts", "ignore:val_fraction=.* is not used")


def written(folder: Path, form: str) -> Path:
    table, path = numbered_table(), folder / f"a.{form}"
    if "jsonl" in form:
        table.to_json(path, orient="records", lines=True)
    elif form == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if "tsv" in form else ",")
    return path


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": None},
        {"limit": 10},
        {"split": None, "val_fraction": 0.3},
        {"evaluate_on": "all", "num_workers": 1},
    ],
    ids=str,
)
def test_texts_keep_the_number_of_their_row(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = TextDataModule(written(tmp_path, form), batch_size=7, **options)
    predict(data, tmp_path / "out.csv", columns=["key", "label", "text"])
    table = pd.read_csv(tmp_path / "out.csv")
    assert table["index"].tolist() == sorted(table["truth"])
    assert (table["index"] == table["truth"]).all()
    source = numbered_table().loc[table["index"]]
    for name in ("key", "label", "text"):
        assert table[name].tolist() == source[name].tolist()
    left_out = data.left_out()
    assert left_out["white space"] == list(GAPS)
    assert sorted([*table["index"], *(row for rows in left_out.values() for row in rows)]) == list(range(40))
    for index in table["index"]:
        assert data.example(index).endswith(f" {index}")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_was_dropped_is_told_and_written_where_asked(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = TextDataModule(written(tmp_path, "csv"), limit=20, seed=0)
    with caplog.at_level("INFO"):
        predict(data, tmp_path / f"out.{suffix}", columns=["key", "label", "text"], dropped=True)
    assert "Not predicted: 4 by white space (rows 0, 7, 8, 39); 2 by limit=20 (rows " in caplog.text
    table = (pd.read_csv if suffix == "csv" else pd.read_parquet)(tmp_path / f"out.{suffix}")
    assert table["index"].tolist() == list(range(40))
    gone = table[table["left_out"].notna()]
    assert gone["left_out"].value_counts().to_dict() == {"white space": 4, "limit=20": 2}
    assert gone["prototype_1"].isna().all()
    source = numbered_table()
    for name in ("key", "label", "text"):
        assert gone[name].tolist() == source[name].loc[gone["index"]].tolist()
    if suffix == "csv":  # integers stay integers beside the gaps
        assert ",1," in (tmp_path / "out.csv").read_text()
        assert not any(".0," in line for line in (tmp_path / "out.csv").read_text().splitlines())


def test_several_files_count_on_and_say_which(tmp_path: Path) -> None:
    sizes = {"path": 40, "val_path": 10, "test_path": 5}
    first, files = 0, {}
    for name, rows in sizes.items():
        numbered_table(rows, GAPS[:2], first).to_csv(tmp_path / f"{name}.csv", index=False)
        files[name] = tmp_path / f"{name}.csv"
        first += rows
    predict(TextDataModule(**files), tmp_path / "out.csv", columns=["key"])
    table = pd.read_csv(tmp_path / "out.csv")
    assert (table["index"] == table["truth"]).all()
    for file, rows in table.groupby("file"):
        source = pd.read_csv(file).loc[rows["row"]]
        assert rows["key"].tolist() == source["key"].tolist()


def test_newsgroups_in_a_file(tmp_path: Path) -> None:
    table = numbered_table().assign(label="sci.space")
    table.to_csv(tmp_path / "a.csv", index=False)
    predict(NewsgroupsDataModule(tmp_path / "a.csv"), tmp_path / "out.csv")
    predictions = pd.read_csv(tmp_path / "out.csv")
    assert (predictions["index"] == predictions["truth"]).all()


class Images(Reader):
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, torch.Tensor]:
        return {"index": batch["index"], "truth": batch["y"]}


def rows_of(data: Any, path: Path, **options: Any) -> pd.DataFrame:
    import lightning.pytorch as pl

    trainer = pl.Trainer(**QUIET, callbacks=[AssignmentWriter(str(path), **options)])
    trainer.predict(Images(), datamodule=data, return_predictions=False)
    return pd.read_csv(path)


def test_images_keep_the_number_in_their_files(tmp_path: Path) -> None:
    for data in (MNISTDataModule(idx_folder(tmp_path / "idx")), CIFAR10DataModule(jpeg_file(tmp_path / "a.npz"))):
        data.limit = 20
        table = rows_of(data, tmp_path / "out.csv", columns=["split", "label"])
        assert table["split"].value_counts().to_dict() == {"test": 20, "train": 20}
        assert (table["truth"] == table["index"] % 10).all()  # 60 training images, ten classes in turn
        assert table["label"].astype(str).tolist() == [data.class_names[label] for label in table["truth"]]


def test_image_folders_say_their_files(tmp_path: Path) -> None:
    from PIL import Image

    for split, names in (("train", ("b", "a", "c")), ("test", ("x",))):
        for kind in ("cat", "dog"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            for name in names:
                Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / kind / f"{name}.png")
    data = ImageFolderDataModule(tmp_path / "images", image_size=8, limit=2, seed=0)
    table = rows_of(data, tmp_path / "out.csv", columns=["label"])
    assert [file.split("/")[1] for file in table["file"]] == table["label"].tolist()
    assert set(table["index"]) >= {6, 7}
    assert table["file"].tolist()[-2:] == ["test/cat/x.png", "test/dog/x.png"]
    assert len(data.left_out()["limit=2"]) == 4


def test_a_catalogue_keeps_its_rows(tmp_path: Path) -> None:
    iss, gps = (
        (6798.0, 0.0004, 51.6, 10.0, 1.0, 92.6, 418.0, 423.0),
        (26560.0, 0.0005, 55.0, 20.0, 2.0, 718.0, 20180, 20190),
    )
    graveyard = (42471.0, 0.0002, 5.0, 50.0, 4.0, 1452.0, 36086.0, 36100.0)
    no_rcs, broken = (*gps[:4], None, *gps[5:]), (None, *gps[1:])
    columns = [*FEATURE_NAMES, "perigee_km", "apogee_km"]
    source = pd.DataFrame([broken, iss, graveyard, no_rcs, gps, broken, iss, gps], columns=columns)
    source.insert(0, "name", [f"object {row}" for row in range(len(source))])
    path = tmp_path / "catalogue.csv"
    source.to_csv(path, index=False)
    for options in ({}, {"other": "keep"}, {"missing_rcs": "drop"}):
        data = DebrisDataModule(catalogue=path, **options)
        table = rows_of(data, tmp_path / "out.csv", columns=["name"])
        assert table["name"].tolist() == [f"object {row}" for row in table["index"]]
        gone = [row for rows in data.left_out().values() for row in rows]
        assert sorted([*gone, *table["index"]]) == list(range(len(source)))
        assert len(data.left_out()["invalid elements"]) == data.num_invalid


def test_other_data_modules_give_columns_by_the_batch(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    rows = [{"text": f"row {row}", "index": 90 - row, "y": row % 2, "id": f"i{row}"} for row in range(9)]
    trainer = pl.Trainer(**QUIET, callbacks=[AssignmentWriter(str(tmp_path / "a.csv"), columns=["id", "label"])])
    trainer.predict(Reader(), DataLoader(rows, batch_size=4), return_predictions=False)
    table = pd.read_csv(tmp_path / "a.csv")
    assert table["id"].tolist() == [f"i{row}" for row in range(8, -1, -1)]
    assert table["label"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_unknown_columns_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'lable'. Did you mean 'label'"):
        predict(TextDataModule(written(tmp_path, "csv")), tmp_path / "out.csv", columns=["lable"])


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    data = TextDataModule(written(tmp_path, "csv"), batch_size=3)
    predict(data, tmp_path / "one.csv", columns=["key", "label"], dropped=True)
    succeed_in_processes(tmp_path, predict_on_two, tmp_path)
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
