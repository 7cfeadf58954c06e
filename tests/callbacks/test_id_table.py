"""Semantic IDs as rows of a table, in one process and in two, and the codebooks beside it."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from ddcl_lightning import (
    DDCLReadoutModule,
    IdentityBackbone,
    MLPDecoder,
    QuantizerReadout,
    ResidualVectorQuantizer,
    SemanticIDs,
    VectorQuantizer,
)
from ddcl_lightning.callbacks import AssignmentWriter, FitSummary
from ddcl_lightning.callbacks._id_table import fill_disambiguation, id_lines, with_id_columns
from ddcl_lightning.checkpoints.codebook_files import load_codebooks
from ddcl_lightning.datamodules import FeaturesDataModule
from ddcl_lightning.heads import MeanPooling
from tests.processes import succeed_in_processes
from tests.tiny import quiet_trainer
from tests.tiny_ids import CODEBOOK, IDS, ITEMS, Items, item_data, item_module

DISAMBIGUATION = [0, 0, 1, 0, 0, 2]  # of IDS, by hand


def predict(writer: AssignmentWriter, data: Any = None, module: DDCLReadoutModule | None = None, **kwargs: Any) -> None:
    data = DataLoader(Items(), batch_size=4) if data is None else data
    given = {"datamodule": data} if isinstance(data, FeaturesDataModule) else {"dataloaders": data}
    quiet_trainer(callbacks=[writer], **kwargs).predict(module or item_module(), return_predictions=False, **given)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_every_item_is_a_row_with_its_tuple(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"ids.{suffix}"
    predict(AssignmentWriter(str(path), columns=["asin"]), item_data(tmp_path))
    table = (pd.read_parquet if suffix == "parquet" else pd.read_csv)(path)
    assert list(table) == ["index", "code_1", "code_2", "disambiguation", "mse", "asin"]
    assert table[["code_1", "code_2"]].to_numpy().tolist() == IDS
    assert table["disambiguation"].tolist() == DISAMBIGUATION
    assert table["asin"].tolist() == [f"B{row}" for row in range(6)]
    assert len(table.drop_duplicates(["code_1", "code_2", "disambiguation"])) == 6


def test_numbers_follow_the_data_set_whatever_the_order_of_batches(tmp_path: Path) -> None:
    backwards = DataLoader(Items(), batch_size=4, sampler=[5, 3, 4, 0, 2, 1])
    predict(AssignmentWriter(str(tmp_path / "items.csv")), backwards)
    table = pd.read_csv(tmp_path / "items.csv")
    assert table["index"].tolist() == [*range(6)]
    assert table["disambiguation"].tolist() == DISAMBIGUATION


def _predict_in_two(folder: str) -> None:
    data = item_data(Path(folder))
    writer = AssignmentWriter(f"{folder}/two.csv", codebooks=f"{folder}/two.safetensors")
    predict(writer, data, devices=2, strategy="ddp")


@pytest.mark.slow
def test_two_processes_write_the_ids_of_one(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    predict(AssignmentWriter(str(tmp_path / "one.csv")), item_data(tmp_path))
    succeed_in_processes(tmp_path, _predict_in_two, str(tmp_path))
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
    assert torch.equal(load_codebooks(tmp_path / "two.safetensors").codebook, CODEBOOK)


def test_codebooks_are_written_without_a_table_too(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    predict(AssignmentWriter(None, codebooks=str(tmp_path / "codes.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["codes.safetensors"]
    assert load_codebooks(tmp_path / "codes.safetensors").encode(ITEMS).tolist() == IDS


def test_codebooks_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match=r"codebooks must end in .safetensors; got 'codes.pt'"):
        predict(AssignmentWriter(None, codebooks="codes.pt"))
    with pytest.raises(ValueError, match="codebooks must lie in an existing folder"):
        predict(AssignmentWriter(None, codebooks=str(tmp_path / "nowhere" / "codes.safetensors")))
    plain = DDCLReadoutModule(IdentityBackbone(2), MeanPooling(), SemanticIDs(MLPDecoder(2, widths=(8,))))
    with pytest.raises(ValueError, match="codebooks are of a residual quantizer; DDCLReadoutModule has none"):
        predict(AssignmentWriter(None, codebooks=str(tmp_path / "codes.safetensors")), module=plain)


@pytest.mark.parametrize("kind", ["residual", "kmeans"])
def test_predictions_of_codes_that_have_not_started_are_refused_before_the_work(kind: str, tmp_path: Path) -> None:
    quantizer = ResidualVectorQuantizer(2, 3, 2) if kind == "residual" else VectorQuantizer(2, 3, init="kmeans")
    task = SemanticIDs(MLPDecoder(2, widths=(8,)))
    module = DDCLReadoutModule(IdentityBackbone(2), QuantizerReadout(quantizer), task)
    with pytest.raises(
        ValueError, match=r"head\.quantizer of a prediction must be a quantizer whose codes have started"
    ):
        predict(AssignmentWriter(str(tmp_path / "items.csv")), module=module)
    assert list(tmp_path.iterdir()) == []


def test_codes_of_an_id_take_the_place_of_assignments() -> None:
    outputs = {"index": torch.arange(2), "assignments": torch.rand(2, 2, 3), "mse": torch.zeros(2)}
    assert with_id_columns(outputs) == outputs
    columns = with_id_columns({**outputs, "semantic_id": torch.tensor([[4, 5, 6], [7, 8, 9]])})
    assert list(columns) == ["index", "code_1", "code_2", "code_3", "disambiguation", "mse"]
    assert columns["code_3"].tolist() == [6, 9]


def test_a_table_without_ids_stays_as_it_is() -> None:
    table = pd.DataFrame({"index": [0, 1], "code_1": [3, 3]})
    assert fill_disambiguation(table) is table


def test_the_summary_of_a_fit_prints_the_ids_of_validation(capsys: pytest.CaptureFixture[str]) -> None:
    data = DataLoader(Items(), batch_size=4)
    trainer = quiet_trainer(max_epochs=1, callbacks=[FitSummary(num_restarts=1)])
    trainer.fit(item_module(), data, data)
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("semantic IDs (val): relative error "))
    assert lines[place].endswith("colliding items 0.5, distinct 4 of 6, largest group 3")
    assert lines[place + 1].split() == ["level", "usage", "perplexity", "given", "prefix"]
    assert lines[place + 2].split() == ["1", "1.000", "2.4", "-"]
    assert lines[place + 3].split()[:2] == ["2", "0.667"]
    assert id_lines({"val/mse": torch.tensor(1.0)}) == []
