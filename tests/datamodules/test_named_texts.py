"""SST-2, IMDB and 20 Newsgroups: from files, from the cache of a download, and without a network."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ddcl_lightning.datamodules import IMDBDataModule, NamedTextDataModule, NewsgroupsDataModule, SST2DataModule
from ddcl_lightning.datamodules import newsgroups as newsgroups_module
from tests.datamodules.runs import indices

datasets = pytest.importorskip("datasets")
hub = pytest.importorskip("huggingface_hub")


def test_files_keep_the_numbers_of_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    pd.DataFrame({"text": ["a", "b"], "label": [1, 1], "split": ["train", "validation"]}).to_csv(path, index=False)
    data = SST2DataModule(path)
    assert data.class_names == ("negative", "positive")  # before any setup
    data.prepare_data()
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch["y"].tolist() == [1, 1]
    pd.DataFrame({"text": ["a"], "label": ["sci.space"]}).to_csv(path, index=False)
    groups = NewsgroupsDataModule(path)
    groups.setup()
    assert next(iter(groups.train_dataloader()))["y"].tolist() == [14]
    with pytest.raises(ValueError, match=r"labels must be one of negative, positive or their numbers; got sci.space"):
        IMDBDataModule(path).setup()


class Hub:
    """Stands in for the Hugging Face hub and the cache of ``datasets``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cached: bool = False, online: bool = True) -> None:
        self.cached, self.online = cached, online
        self.calls: list[tuple[str, bool]] = []
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(dataset_info=self.dataset_info))

    def dataset_info(self, repository: str, timeout: float) -> None:
        assert timeout <= 10
        if not self.online:
            raise RuntimeError("Cannot connect\n[Errno -2] Name or service not known")

    def load_dataset(self, repository: str) -> dict[str, Any]:
        offline = datasets.config.HF_HUB_OFFLINE
        self.calls.append((repository, offline))
        if not self.cached and offline:
            raise ConnectionError(f"Couldn't reach {repository} on the Hub")
        self.cached = True
        column = "sentence" if "sst2" in repository else "text"
        rows_of_split = {"train": [("bad", 0), ("good", 1)], "validation": [("fine", 1)], "test": [("so so", 0)]}
        return {
            name: {column: (text for text, _ in rows), "label": np.array([label for _, label in rows]).tolist()}
            for name, rows in rows_of_split.items()
        }


def test_download_happens_once_and_set_up_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub(monkeypatch)
    data = SST2DataModule()
    data.prepare_data()
    assert fake.calls == [("stanfordnlp/sst2", True), ("stanfordnlp/sst2", False)]
    data.prepare_data()
    data.setup()
    assert all(offline for _, offline in fake.calls[2:])
    assert datasets.config.HF_HUB_OFFLINE is False
    (batch,) = data.predict_dataloader()  # the test split has no labels, and is not there
    assert batch["text"] == ["bad", "good", "fine"]
    assert batch["y"].tolist() == [0, 1, 1]
    assert indices(data.val_dataloader()) == indices(data.test_dataloader()) == [2]


def test_imdb_validates_on_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, cached=True, online=False)
    data = IMDBDataModule()
    data.prepare_data()
    data.setup()
    assert data.example(2) == "so so"
    assert indices(data.val_dataloader()) == indices(data.test_dataloader()) == [2]


@pytest.mark.parametrize(("data", "name"), [(SST2DataModule(), "SST-2"), (IMDBDataModule(), "IMDB")])
def test_without_a_network_one_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, data: NamedTextDataModule, name: str
) -> None:
    fake = Hub(monkeypatch, online=False)
    message = rf"^{name} is not on this machine, and the download of stanfordnlp/\w+ failed \(\[Errno -2\] .* Pass as"
    with pytest.raises(ConnectionError, match=message) as caught:
        data.prepare_data()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "\n" not in str(caught.value)
    assert all(offline for _, offline in fake.calls)  # datasets would retry for half a minute
    assert datasets.config.HF_HUB_OFFLINE is False
    with pytest.raises(ConnectionError, match=f"{name} is not on this machine, and it was not downloaded yet. Pass"):
        data.setup()


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets, .* pip install 'ddcl-lightning\[text\]'"):
        SST2DataModule().prepare_data()


def fetch(missing: bool = False, online: bool = True) -> Callable[..., Any]:
    """scikit-learn's loader over two posts a split."""

    def fetch_20newsgroups(subset: str, download_if_missing: bool = True, **options: Any) -> SimpleNamespace:
        if missing and download_if_missing and not online:
            raise OSError("<urlopen error [Errno -2] Name or service not known>")
        if missing and not download_if_missing:
            raise OSError("20Newsgroups dataset not found")
        assert subset == "all" or options == {"remove": ("headers", "footers", "quotes"), "shuffle": False}
        names = ["alt.atheism", "sci.space"]
        return SimpleNamespace(data=[f"{subset} 1", f"{subset} 2"], target=np.array([1, 0]), target_names=names)

    return fetch_20newsgroups


def test_newsgroups_come_from_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newsgroups_module, "fetch_20newsgroups", fetch())
    data = NewsgroupsDataModule()
    data.prepare_data()
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch["text"] == ["train 1", "train 2", "test 1", "test 2"]
    assert batch["y"].tolist() == [14, 0, 14, 0]
    assert indices(data.val_dataloader()) == [2, 3]


def test_newsgroups_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newsgroups_module, "fetch_20newsgroups", fetch(missing=True, online=False))
    with pytest.raises(ConnectionError, match=r"^20 Newsgroups is not on this .* failed \(<urlopen .* Pass as path a"):
        NewsgroupsDataModule().prepare_data()
    with pytest.raises(ConnectionError, match="20 Newsgroups is not on this machine, and it was not downloaded yet"):
        NewsgroupsDataModule().setup()


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("kind", "name", "sizes", "first"),
    [
        (SST2DataModule, "sst2_glue", (67349, 872, 872), 1),
        (IMDBDataModule, "imdb_10k_5k", (10000, 5000, 5000), 1),
    ],
)
def test_the_real_files_have_their_published_sizes(
    shared_file: Callable[[str], Path],
    kind: type[NamedTextDataModule],
    name: str,
    sizes: tuple[int, int, int],
    first: int,
) -> None:
    data = kind(shared_file(f"{name}.jsonl.gz"), limit=50)
    data.setup()
    train = list(data.train_dataloader())
    assert sum(len(batch["text"]) for batch in train) == 50
    assert len({row for batch in train for row in batch["index"].tolist()}) == 50
    labels = [label for batch in train for label in batch["y"].tolist()]
    assert 20 <= sum(labels) <= 30
    loaded, _ = data._require_setup()
    assert (len(loaded.y) - loaded.num_val - loaded.num_test) == sizes[0]
    assert len(data.val_dataloader().dataset) == sizes[1]  # type: ignore[arg-type]
    assert len(data.test_dataloader().dataset) == sizes[2]  # type: ignore[arg-type]
    assert loaded.y[0] == first
    assert isinstance(data.example(0), str)


@pytest.mark.shared_data
def test_the_real_newsgroups_have_twenty_classes(shared_file: Callable[[str], Path]) -> None:
    data = NewsgroupsDataModule(shared_file("20newsgroups_bydate_stripped.jsonl.gz"), limit=40)
    with pytest.warns(UserWarning, match="NewsgroupsDataModule left out 515 of 18846 texts"):
        data.setup()
    batches = [*data.train_dataloader()]
    assert sorted({label for batch in batches for label in batch["y"].tolist()}) == [*range(20)]
