"""Without a network: one sentence, at once."""

import importlib
import time
from typing import Any

import pytest

from ddcl_lightning.backbones import TimmBackbone, TransformersBackbone
from ddcl_lightning.backbones._model_files import from_cache_or_hub, local_folder, require

hub = pytest.importorskip("huggingface_hub")
NAME = "nobody-of-this-name/nothing-of-this-name"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached, by a client that may not wait for it."""

    class Client:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("Name or service not known\nand 100 lines more")

    def no_sleep(_: float) -> None:
        raise AssertionError("waited for a retry")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Client)
    monkeypatch.setattr(time, "sleep", no_sleep)


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.usefixtures("no_network")
def test_no_network_and_no_model() -> None:
    pytest.importorskip("transformers")
    expected = (
        rf"model '{NAME}' is neither a local folder nor in the local cache, and https://.* cannot be reached \(Name or "
        rf"service not known\)\. Download it where there is a network \(hf download {NAME} --local-dir FOLDER\)"
    )
    with pytest.raises(OSError, match=expected) as raised:
        TransformersBackbone(NAME)
    assert_one_sentence(raised.value)


def test_offline_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="and HF_HUB_OFFLINE is set"):
        TransformersBackbone(NAME)


@pytest.mark.usefixtures("no_network")
def test_no_network_and_no_image_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    expected = (
        r"weights of model 'test_resnet' are not in the local cache, and .* cannot be reached .*hf download "
        r"timm/test_resnet\S* model.safetensors --local-dir FOLDER\) and pass that file as checkpoint"
    )
    with pytest.raises(OSError, match=expected) as raised:
        TimmBackbone("test_resnet")
    assert_one_sentence(raised.value)


def test_the_cache_goes_before_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(local_files_only: bool) -> str:
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("not cached")
        return "loaded"

    assert from_cache_or_hub(lambda local: asked.append(local) or "cached", "m", "") == "cached"  # type: ignore[func-returns-value]
    monkeypatch.setattr("ddcl_lightning.backbones._model_files.hub_unavailable", lambda: None)
    assert from_cache_or_hub(load, "m", "") == "loaded"
    assert asked == [True, True, False]

    def refuse(local_files_only: bool) -> str:
        raise OSError("404 not found\nmore")

    with pytest.raises(OSError, match=r"the hub does not offer it \(404 not found\)\. Do this"):
        from_cache_or_hub(refuse, "m", "Do this.")


def test_names_on_the_hub_are_no_paths(tmp_path: Any) -> None:
    assert local_folder("bert-base-uncased") is None
    assert local_folder("owner/name") is None
    for path in ("./name", "/owner/name", "a/b/c", str(tmp_path / "name")):
        with pytest.raises(FileNotFoundError, match="looks like a path but is no folder"):
            local_folder(path)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs transformers.*pip install 'ddcl-lightning\[text\]'"):
        TransformersBackbone("bert-base-uncased")
    with pytest.raises(ImportError, match=r"needs timm.*pip install 'ddcl-lightning\[vision\]'"):
        TimmBackbone("test_resnet")
    with pytest.raises(ImportError, match="pip install"):
        require("anything", "text")
