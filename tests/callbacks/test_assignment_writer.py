import importlib.util

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset
from toys import QUIET, Project, Stream, blobs

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule, IdentityBackbone, PCABackbone
from ddcl_lightning.callbacks import AssignmentWriter
from ddcl_lightning.callbacks import assignment_writer as writer_module
from ddcl_lightning.callbacks.assignment_writer import assignment_table
from ddcl_lightning.datamodules.digits import DigitsDataModule
from tests.tiny import absolute

X, Y = blobs(size=50)


class Predicting(Project):
    """Returns the assignments alone."""

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        weights = self.layer(self.tokens(batch).unsqueeze(1), need_weights=True).weights
        return {"assignments": weights.mean(2)}


def predict(path, module=None, data=None, top=3):
    writer = AssignmentWriter(str(path), top)
    data = DataLoader(TensorDataset(X, Y), batch_size=16) if data is None else data
    kwargs = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"dataloaders": data}
    trainer = pl.Trainer(callbacks=[writer], **QUIET)
    trainer.predict(module or Predicting(temperature=absolute(10.0)), return_predictions=False, **kwargs)
    return (pd.read_parquet if path.suffix == ".parquet" else pd.read_csv)(path)


def exact(x=X):
    module = Predicting(temperature=absolute(10.0))
    with torch.no_grad():
        return module.layer(module.encoder(x), need_weights=True).weights[0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_one_row_a_sample_with_its_strongest_prototypes(tmp_path, suffix):
    table = predict(tmp_path / f"table.{suffix}")
    assert list(table) == ["index", "prototype_1", "weight_1", "prototype_2", "weight_2", "prototype_3", "weight_3"]
    assert table["index"].tolist() == list(range(50))
    weights, codes = exact().topk(3)
    for rank in range(3):
        assert table[f"prototype_{rank + 1}"].tolist() == codes[:, rank].tolist()
        assert table[f"weight_{rank + 1}"].tolist() == pytest.approx(weights[:, rank].tolist(), rel=1e-4)


def test_more_prototypes_than_there_are(tmp_path):
    table = predict(tmp_path / "table.csv", top=99)
    assert [name for name in table if name.startswith("prototype")] == [f"prototype_{i}" for i in (1, 2, 3, 4)]


def test_several_heads_have_a_row_each(tmp_path):
    table = predict(tmp_path / "table.csv", module=Predicting(num_heads=2))
    assert list(table)[:2] == ["index", "head"]
    assert table["index"].tolist() == [index for index in range(50) for _ in (0, 1)]
    assert table["head"].tolist() == [0, 1] * 50


def test_several_loaders_lose_no_row(tmp_path):
    loaders = [DataLoader(TensorDataset(X[:size], Y[:size]), batch_size=16) for size in (50, 20)]
    table = predict(tmp_path / "table.csv", data=loaders)
    assert list(table)[:2] == ["dataloader", "index"]
    assert table["dataloader"].tolist() == [0] * 50 + [1] * 20
    assert table["index"].tolist() == [*range(50), *range(20)]


class Backwards(Sampler[int]):
    def __iter__(self):
        return iter(range(len(X) - 1, -1, -1))

    def __len__(self):
        return len(X)


def test_the_place_in_the_data_set_is_known_without_an_index(tmp_path):
    data = DataLoader(TensorDataset(X, Y), batch_size=16, sampler=Backwards())
    table = predict(tmp_path / "table.csv", data=data)
    assert table["index"].tolist() == list(range(50))
    assert table["prototype_1"].tolist() == exact().argmax(1).tolist()


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_a_stream_is_counted_through(tmp_path):
    table = predict(tmp_path / "table.csv", data=DataLoader(Stream(40), batch_size=16))
    assert table["index"].tolist() == list(range(40))


def test_repeated_samples_are_written_once(tmp_path, monkeypatch):
    # Two processes, the second of which was given the first two samples again to fill its last batch.
    whole = torch.cat([X[1::2], X[:2]])
    first = assignment_table({"index": torch.arange(0, 50, 2), "assignments": exact(X[::2]).unsqueeze(1)}, 3)
    second_places = torch.cat([torch.arange(1, 50, 2), torch.arange(2)])
    second = assignment_table({"index": second_places, "assignments": exact(whole).unsqueeze(1)}, 3)
    for table in (first, second):
        table.insert(0, "dataloader", 0)
    monkeypatch.setattr(writer_module, "gather_objects", lambda tables: [[first], [second]])
    table = predict(tmp_path / "table.csv")
    assert table["index"].tolist() == list(range(50))
    assert table["prototype_1"].tolist() == exact().argmax(1).tolist()


def test_columns_of_the_task_and_the_index_of_the_batch(tmp_path):
    module = DDCLReadoutModule(PCABackbone(64, 8), DDCLReadout(6, num_heads=2), Classification(num_classes=10))
    data = DigitsDataModule()
    data.setup()
    module.backbone.fit(torch.cat([batch["x"] for batch in data.predict_dataloader()]))
    table = predict(tmp_path / "table.parquet", module=module, data=data, top=1)
    assert list(table) == ["index", "head", "prototype_1", "weight_1", "predicted_class", "probability"]
    assert len(table) == 2 * 1797
    assert (table.groupby("index")["predicted_class"].nunique() == 1).all()


def test_outputs_without_prototypes_and_with_wide_columns():
    columns = {"index": torch.arange(3), "class": torch.tensor([2, 0, 1]), "p": torch.rand(3, 2).bfloat16()}
    table = assignment_table(columns, top=3)
    assert list(table) == ["index", "class", "p_0", "p_1"]
    wide = assignment_table({**columns, "assignments": torch.rand(3, 2, 4).bfloat16()}, top=1)
    assert list(wide) == ["index", "head", "prototype_1", "weight_1", "class", "p_0", "p_1"]
    assert wide["class"].tolist() == [2, 2, 0, 0, 1, 1]
    assert wide["p_1"].tolist() == pytest.approx(columns["p"][:, 1].float().repeat_interleave(2).tolist())


def test_a_second_prediction_does_not_append_to_the_first(tmp_path):
    writer = AssignmentWriter(str(tmp_path / "table.csv"))
    for size in (50, 20):
        data = DataLoader(TensorDataset(X[:size], Y[:size]), batch_size=16)
        pl.Trainer(callbacks=[writer], **QUIET).predict(Predicting(), data)
        assert len(pd.read_csv(tmp_path / "table.csv")) == size


def test_a_step_that_returns_something_else_is_an_error(tmp_path):
    class Plain(Predicting):
        def predict_step(self, batch, batch_idx):
            return batch[0]

    with pytest.raises(TypeError, match=r"must return a dict of tensors.* got Tensor"):
        predict(tmp_path / "table.csv", module=Plain())


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = pl.Trainer(callbacks=[AssignmentWriter(None)], **QUIET)
    trainer.predict(Predicting(), DataLoader(TensorDataset(X, Y), batch_size=16))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"path must end in .csv or .parquet"):
        AssignmentWriter("table.xlsx")
    with pytest.raises(ValueError, match="top must be at least 1"):
        AssignmentWriter(top=0)
    with pytest.raises(ValueError, match="path must lie in an existing folder"):
        predict(tmp_path / "nowhere" / "table.csv")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ddcl-lightning\[parquet\]'"):
        predict(tmp_path / "table.parquet")


def test_the_identity_backbone_of_a_sequence(tmp_path):
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(4), Classification(num_classes=4))
    rows = [{"x": x.expand(3, 4), "mask": torch.tensor([True, True, False])} for x in X]
    table = predict(tmp_path / "table.csv", module=module, data=DataLoader(rows, batch_size=16))
    assert table["index"].tolist() == list(range(50))
