"""Heads survive a trip through files, whole, or are refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LinearBackbone, loader, quiet_trainer
from torch import Tensor, nn

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule, Temperature
from ddcl_lightning.heads import (
    AttentionPooling,
    CLSPooling,
    Head,
    MeanPooling,
    PMAPooling,
    ReadoutOutput,
)

pytest.importorskip("safetensors")

TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 1]]).bool()


class Custom(Head):
    """A user's own head, with required arguments."""

    def __init__(self, a: int, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def build(self, embed_dim: int) -> None:
        super().build(embed_dim)
        self.linear = nn.Linear(embed_dim, self.a)
        self.pooled_dim = self.a

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        return ReadoutOutput(tokens, self.b * self.linear(tokens).mean(1))


def test_config_is_plain_data(tmp_path: Path) -> None:
    head = AttentionPooling(2, embed_dim=8)
    head.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "class": "ddcl_lightning.heads.attention_pooling.AttentionPooling",
        "embed_dim": 8,
        "init_args": {"num_heads": 2, "dim": None, "max_parameters": None},
    }


def test_whitening_that_the_module_chose_survives(tmp_path: Path) -> None:
    module = DDCLReadoutModule(LinearBackbone(), DDCLReadout(4, temperature=0.7), Clustering(4), rho=0.1)
    assert module.head.attention.scale.mode == "whiten"
    quiet_trainer(max_epochs=2).fit(module, loader())
    module.head.save_pretrained(tmp_path)
    again = DDCLReadout.from_pretrained(tmp_path)
    tokens = torch.randn(4, 2, 3)
    assert again.attention.scale.mode == "whiten"
    assert torch.equal(again(tokens).pooled, module.head.eval()(tokens).pooled)
    assert DDCLReadout(4, embed_dim=8).init_args()["embedding_scale"] == "auto"  # nothing bound: still open
    next_module = DDCLReadoutModule(LinearBackbone(), again, Clustering(4), rho=0.1)  # and it goes on training
    quiet_trainer(max_epochs=1).fit(next_module.train(), loader())


def test_heads_of_users(tmp_path: Path) -> None:
    head = Custom(3, b=2.0)
    head.build(8)
    head.save_pretrained(tmp_path)
    again = Head.from_pretrained(tmp_path)
    assert isinstance(again, Custom)
    torch.testing.assert_close(again(TOKENS).pooled, head(TOKENS).pooled)


class Forgetful(Head):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        return ReadoutOutput(tokens, tokens.mean(1))


class Unbuilt(Forgetful):
    """Overrides ``build`` without telling the base class."""

    def __init__(self) -> None:
        super().__init__(2)

    def build(self, embed_dim: int) -> None:
        self.more = nn.Linear(embed_dim, 1)


class Holder(Forgetful):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(2)
        self.network = network


class Open(Forgetful):
    def __init__(self, **options: int) -> None:
        super().__init__(2)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Forgetful keeps its argument 'size' nowhere.*Store it as self.size"):
        Forgetful(2).save_pretrained(tmp_path / "a")
    with pytest.raises(TypeError, match=r"Open keeps its argument 'options' nowhere.*override init_args\(\)"):
        Open(size=2).save_pretrained(tmp_path / "a")
    with pytest.raises(TypeError, match=r"argument 'network' of Holder must be plain data .*; got Linear"):
        Holder(nn.Linear(1, 1)).save_pretrained(tmp_path / "a")
    head: Head = Unbuilt()
    head.build(8)
    with pytest.raises(ValueError, match=r"has other weights. Call super\(\).build\(embed_dim\)"):
        head.save_pretrained(tmp_path / "a")
    changed = AttentionPooling(2, embed_dim=8)
    changed.num_heads = 3
    with pytest.raises(ValueError, match=r"made again from its arguments, with embed_dim = 8, has other weights"):
        changed.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_refusals_of_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder '.*' has no config.json"):
        Head.from_pretrained(tmp_path)
    CLSPooling(hidden_dim=3, embed_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes a CLSPooling, not a MeanPooling. Load it with CLSPooling.from"):
        MeanPooling.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def write(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    write(init_args={"hidden_dim": 4})
    with pytest.raises(ValueError, match=r"does not hold the weights that config.json beside it describes"):
        CLSPooling.from_pretrained(tmp_path)
    write(init_args={"hidden_dims": 4})
    with pytest.raises(ValueError, match=r"CLSPooling cannot be made from its saved arguments .*hidden_dims"):
        CLSPooling.from_pretrained(tmp_path)
    write(**{"class": "somewhere.Else"})
    with pytest.raises(ValueError, match=r"the files hold a somewhere.Else, a class that is not imported"):
        Head.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"must name the 'class' and 'init_args' of a head; got keys \['model_type'\]"):
        Head.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("hello")
    with pytest.raises(ValueError, match=r"is not JSON"):
        Head.from_pretrained(tmp_path)
    write()
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"does not hold the weights"):
        CLSPooling.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors; save_pretrained writes config.json and"):
        CLSPooling.from_pretrained(tmp_path)


def test_a_missing_weight_is_not_left_at_its_start(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    head = AttentionPooling(embed_dim=8)
    head.save_pretrained(tmp_path)
    weights = {name: value for name, value in head.state_dict().items() if name != "hidden.bias"}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not hold the weights .*hidden.bias"):
        Head.from_pretrained(tmp_path)


def test_no_code_comes_with_the_files(tmp_path: Path) -> None:
    """A config names a class; nothing is imported for it."""
    CLSPooling(embed_dim=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "class": "os.system"}))
    with pytest.raises(ValueError, match=r"a class that is not imported"):
        Head.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "class": "torch.nn.modules.linear.Linear"}))
    with pytest.raises(ValueError, match=r"a class that is not imported"):
        Head.from_pretrained(tmp_path)


def test_heads_go_to_the_hub_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the server: a folder by name of repository."""
    hub = pytest.importorskip("huggingface_hub")
    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: object) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            assert exist_ok
            calls.append({"private": private})
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
            calls.append({"message": commit_message})
            (tmp_path / repo_id).mkdir(parents=True)
            for path in Path(folder_path).iterdir():
                (tmp_path / repo_id / path.name).write_bytes(path.read_bytes())
            return SimpleNamespace(commit_url="https://example.org/commit/1")

    def download(repo_id: str, filename: str, **options: Any) -> str:
        calls.append(options)
        path = tmp_path / repo_id / filename
        if not path.exists():
            raise hub.errors.LocalEntryNotFoundError("no connection\nmany details")
        return str(path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    head = PMAPooling(2, 2, embed_dim=8).eval()
    assert head.push_to_hub("readout", private=True, token="secret") == "https://example.org/commit/1"
    expected = {"revision": "v1", "token": "t", "cache_dir": tmp_path, "local_files_only": True}
    again = PMAPooling.from_pretrained("me/readout", **expected)
    assert torch.equal(again(TOKENS, MASK).pooled, head(TOKENS, MASK).pooled)
    assert calls == [{"private": True}, {"message": "Upload a readout head"}, expected, expected]
    with pytest.raises(FileNotFoundError, match=r"'me/other' is not a folder, and no repository .*: no connection. Ch"):
        Head.from_pretrained("me/other")


def test_a_name_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match=r"is not a folder, and no repository of the hub gave config.json"):
        Head.from_pretrained(tmp_path / "not" / "there")


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = CLSPooling(embed_dim=8)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    head.save_pretrained(tmp_path)
    Head.from_pretrained(tmp_path)  # folders do without
    for use in (lambda: head.push_to_hub("me/x"), lambda: Head.from_pretrained("me/x")):
        with pytest.raises(ImportError, match=r"pip install 'ddcl-lightning\[hub\]'"):
            use()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: head.save_pretrained(tmp_path), lambda: Head.from_pretrained(tmp_path)):
        with pytest.raises(ImportError, match=r"needs safetensors: pip install 'ddcl-lightning\[hub\]'"):
            use()


def test_a_temperature_with_its_unit_comes_back(tmp_path: Path) -> None:
    head = DDCLReadout(4, temperature=Temperature(0.3, "absolute"), embed_dim=8)
    head.save_pretrained(tmp_path)
    loaded = Head.from_pretrained(tmp_path)
    assert loaded.temperature == Temperature(0.3, "absolute")
    torch.testing.assert_close(loaded(TOKENS).pooled, head.eval()(TOKENS).pooled)
