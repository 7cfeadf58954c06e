"""Hidden states as transformers itself gives them, of the right tokens, trained or frozen as told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.backbones import TransformersBackbone
from tests.tiny import quiet_trainer
from tests.tiny_models import tiny_bert, tiny_gpt2

transformers = pytest.importorskip("transformers")

TEXTS = ["the film was wonderful", "bad", "a very boring story, not good"]
LAYERS = 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("models") / "bert", layers=LAYERS))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=LAYERS))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder-decoder model with tied embeddings, and without a tokenizer."""
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, vocab_size=100)
    folder = tmp_path_factory.mktemp("models") / "t5"
    transformers.T5Model(config).save_pretrained(folder)
    return str(folder)


def batch_of_ids() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"x": ids, "mask": torch.arange(7) < torch.tensor([[5], [2], [4]])}


def reference(folder: str, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_every_layer_is_that_of_the_model(name: str, request: pytest.FixtureRequest) -> None:
    folder, batch = request.getfixturevalue(name), batch_of_ids()
    states = reference(folder, batch["x"], batch["mask"])
    assert len(states) == LAYERS + 1
    for layer in range(-LAYERS - 1, LAYERS + 1):
        backbone = TransformersBackbone(folder, layer=layer)
        assert backbone.embed_dim == 32
        values, mask = backbone(batch)
        assert mask is not None
        assert torch.equal(mask, batch["mask"])  # as long as x, though its last columns are padding
        torch.testing.assert_close(values[mask], states[layer][mask], rtol=1e-4, atol=1e-5)


def test_blocks_beyond_the_layer_are_not_computed(bert: str) -> None:
    backbone = TransformersBackbone(bert, layer=1)
    assert len(backbone.encoder.encoder.layer) == 2


def test_texts_become_the_tokens_of_the_tokenizer(bert: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    encoding = tokenizer(TEXTS, padding=True, return_tensors="pt")
    values, mask = TransformersBackbone(bert)({"text": TEXTS})
    assert mask is not None
    assert torch.equal(mask, encoding["attention_mask"].bool())
    expected = reference(bert, encoding["input_ids"], mask)[-1]
    torch.testing.assert_close(values[mask], expected[mask], rtol=1e-4, atol=1e-5)
    alone = TransformersBackbone(bert)({"text": TEXTS[1:2]}).values[0]
    torch.testing.assert_close(alone, values[1][mask[1]], rtol=1e-4, atol=1e-5)  # padding takes no part


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_first_last_and_mean_token_are_those_of_the_valid_tokens(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    values, mask = TransformersBackbone(folder)({"text": TEXTS})
    assert mask is not None
    for number in range(3):
        valid = values[number, mask[number]]
        expected = {"last": valid[-1], "mean": valid.mean(0), "cls": valid[0]}
        for tokens, vector in expected.items():
            if (name, tokens) == ("gpt2", "cls"):
                continue
            pooled = TransformersBackbone(folder, tokens=tokens)({"text": TEXTS})  # type: ignore[arg-type]
            assert pooled.mask is None
            assert pooled.values.shape == (3, 1, 32)
            torch.testing.assert_close(pooled.values[number, 0], vector, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut(bert: str) -> None:
    backbone = TransformersBackbone(bert, max_length=5)
    values, mask = backbone({"text": TEXTS})
    assert values.shape == (3, 5, 32)
    assert mask is not None
    assert mask.sum(1).tolist() == [5, 3, 5]
    assert [len(spans) for spans in backbone.spans({"text": TEXTS})] == [5, 3, 5]


@pytest.mark.parametrize("content", [[""], ["", "good"]])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_empty_text_has_a_token(name: str, content: list[str], request: pytest.FixtureRequest) -> None:
    backbone = TransformersBackbone(request.getfixturevalue(name))
    values, mask = backbone({"text": content})
    assert mask is not None
    assert int(mask[0].sum()) == len(backbone.spans({"text": content})[0]) == (1 if name == "gpt2" else 2)
    assert bool(values.isfinite().all())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_half_an_emoji_is_a_question_mark(name: str, request: pytest.FixtureRequest) -> None:
    """JSON that was cut inside of an emoji has one, and no tokenizer takes it."""
    backbone = TransformersBackbone(request.getfixturevalue(name))
    cut, expected = {"text": ["good \ud83d film"]}, {"text": ["good ? film"]}
    assert torch.equal(backbone(cut).values, backbone(expected).values)
    assert backbone.spans(cut) == backbone.spans(expected)


def test_spans_point_at_the_words(bert: str, gpt2: str) -> None:
    (spans,) = TransformersBackbone(bert).spans({"text": TEXTS[:1]})
    assert [TEXTS[0][start:end] for start, end in spans] == ["", "the", "film", "was", "wonderful", ""]
    assert spans[0] == spans[-1] == (0, 0)
    backbone = TransformersBackbone(gpt2)
    for number, (content, word_spans) in enumerate(zip(TEXTS, backbone.spans({"text": TEXTS}), strict=True)):
        assert "".join(content[start:end] for start, end in word_spans) == content
        assert len(word_spans) == int(backbone({"text": TEXTS}).mask[number].sum())


def test_names_of_tokens_say_which_are_special(bert: str) -> None:
    backbone = TransformersBackbone(bert)
    (names,) = backbone.token_names({"text": TEXTS[:1]})
    assert names == ["[CLS]", "the", "film", "was", "wonderful", "[SEP]"]
    assert [len(row) for row in backbone.token_names({"text": TEXTS})] == [
        len(row) for row in backbone.spans({"text": TEXTS})
    ]


# Freezing -------------------------------------------------------------------------------------------


def trainable(backbone: TransformersBackbone) -> set[str]:
    return {name for name, parameter in backbone.encoder.named_parameters() if parameter.requires_grad}


def test_a_frozen_encoder_neither_trains_nor_drops(bert: str) -> None:
    backbone = TransformersBackbone(bert).train()
    assert not trainable(backbone)
    assert backbone.training
    first, second = backbone({"text": TEXTS}).values, backbone({"text": TEXTS}).values
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("bert", {"unfreeze": 1}, ["encoder.layer.2."]),
        ("bert", {"unfreeze": 2, "layer": 2}, ["encoder.layer.0.", "encoder.layer.1."]),
        ("bert", {"unfreeze": "all"}, ["embeddings.", "encoder."]),
        ("bert", {"unfreeze": "all", "layer": 1}, ["embeddings.", "encoder.layer.0."]),
        ("gpt2", {"unfreeze": 1}, ["h.2.", "ln_f."]),
        ("gpt2", {"unfreeze": 1, "layer": 2}, ["h.1."]),
        ("gpt2", {"unfreeze": "all"}, ["wte.", "wpe.", "h.", "ln_f."]),
        ("t5", {"unfreeze": 1}, ["block.2.", "final_layer_norm."]),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_unfrozen_gets_gradients(
    name: str, kwargs: dict[str, Any], expected: list[str], checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    backbone = TransformersBackbone(request.getfixturevalue(name), gradient_checkpointing=checkpointing, **kwargs)
    names = [parameter for parameter, _ in backbone.encoder.named_parameters()]
    assert trainable(backbone) == {parameter for parameter in names if parameter.startswith(tuple(expected))}
    backbone.train()
    values, mask = backbone(batch_of_ids())
    values[mask].square().sum().backward()
    for parameter in backbone.encoder.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad  # what DDP asks for


def test_partly_frozen_modes(bert: str) -> None:
    backbone = TransformersBackbone(bert, unfreeze=1).train()
    blocks: Any = backbone.encoder.encoder.layer
    assert [block.training for block in blocks] == [False, False, True]
    assert blocks[2].output.dropout.training
    assert not blocks[0].output.dropout.training
    assert not backbone.eval().encoder.training
    assert not any(module.training for module in backbone.modules())


def test_gradient_checkpointing_changes_no_gradient(bert: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = TransformersBackbone(bert, unfreeze=2, gradient_checkpointing=checkpointing).train()
        for module in backbone.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        backbone({"text": TEXTS}).values.square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the frozen blocks are, on purpose
def test_trains_in_the_module_and_comes_back(bert: str, tmp_path: Path) -> None:
    def module() -> DDCLReadoutModule:
        return DDCLReadoutModule(TransformersBackbone(bert, unfreeze=1), DDCLReadout(4), Classification(2))

    data = [{"text": TEXTS, "y": torch.tensor([1, 0, 0])}]
    trained, trainer = module(), quiet_trainer(max_epochs=2)
    before = {name: value.clone() for name, value in trained.backbone.state_dict().items()}
    loader = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(trained, loader)
    changed = {name for name, value in trained.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("encoder.layer.2." in name for name in changed)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = module()
    again.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again.backbone.eval()(data[0]).values, trained.backbone.eval()(data[0]).values)


# Cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokens"), [("bert", "all"), ("bert", "mean"), ("gpt2", "last"), ("gpt2", "all")])
def test_cached_tokens_are_those_of_the_encoder(
    name: str, tokens: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, content = request.getfixturevalue(name), [*TEXTS, "", TEXTS[0]]
    expected = TransformersBackbone(folder, tokens)({"text": content})
    for dtype, tolerance in (("float16", 2e-3), ("float32", 1e-5)):
        backbone = TransformersBackbone(folder, tokens, cache_dir=str(tmp_path), cache_dtype=dtype)  # type: ignore[arg-type]
        assert backbone.fill_cache([{"text": content[:2]}, {"text": content[2:]}], progress=False) == 4
        backbone.encoder.forward = None  # type: ignore[assignment]  # not touched again
        values, mask = backbone({"text": content})
        assert values.dtype == torch.float32
        if tokens == "all":
            assert mask is not None
            assert torch.equal(mask, expected.mask)
            assert not values[~mask].any()
            torch.testing.assert_close(values[mask], expected.values[mask], rtol=tolerance, atol=tolerance)
        else:
            assert mask is None
            torch.testing.assert_close(values, expected.values, rtol=tolerance, atol=tolerance)


def test_ids_are_cached_like_texts(bert: str, tmp_path: Path) -> None:
    backbone = TransformersBackbone(bert, cache_dir=str(tmp_path), cache_dtype="float32")
    batch = batch_of_ids()
    expected = TransformersBackbone(bert)(batch)
    for _ in range(2):
        values, mask = backbone(batch)
        assert mask is not None
        assert torch.equal(mask, batch["mask"])
        torch.testing.assert_close(values[mask], expected.values[mask], rtol=1e-4, atol=1e-5)
    assert len(backbone._open_cache()) == 3
    backbone({"x": batch["x"][:, :5], "mask": batch["mask"][:, :5]})  # the same texts with less padding
    assert len(backbone._open_cache()) == 3


def test_whatever_decides_the_tokens_decides_the_cache(bert: str, tmp_path: Path) -> None:
    other = str(tiny_bert(tmp_path / "other", layers=LAYERS, seed=1))
    renamed = str(shutil.copytree(bert, tmp_path / "elsewhere"))
    recased = shutil.copytree(bert, tmp_path / "recased")
    (recased / "tokenizer.json").write_text(
        (recased / "tokenizer.json").read_text().replace('"lowercase": true', '"lowercase": false')
    )
    cache = str(tmp_path / "cache")

    def folder(model: str, **kwargs: Any) -> str:
        return TransformersBackbone(model, cache_dir=cache, **kwargs)._open_cache().path.name

    first = folder(bert)
    used = TransformersBackbone(bert, cache_dir=cache)
    used({"text": TEXTS})  # a tokenizer in use changes its padding and truncation
    assert used._open_cache().path.name == folder(bert) == folder(renamed) == first
    different = [
        folder(other),
        folder(str(recased)),
        folder(bert, layer=1),
        folder(bert, layer=2),  # with the same blocks as the last layer
        folder(bert, max_length=64),
        folder(bert, tokens="mean"),
        folder(bert, cache_dtype="float32"),
    ]
    assert len({first, *different}) == 8


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"tokens": "first"}, r"tokens must be one of \('all', 'cls', 'last', 'mean'\); got 'first'"),
        ({"layer": 4}, r"layer must be in \[-4, 3\] for .* of depth 3; got 4"),
        ({"layer": -5}, r"layer must be in \[-4, 3\] for .*; got -5"),
        ({"max_length": 2}, r"max_length must be in \[3, 128\] tokens for .*; got 2"),
        ({"max_length": 129}, r"max_length must be in \[3, 128\] tokens for .*; got 129"),
        ({"unfreeze": -1}, "unfreeze must be a number of blocks >= 0, or 'all'; got -1"),
        ({"unfreeze": True}, "unfreeze must be an integer or one of 'all'; got True"),
        ({"unfreeze": "some"}, "unfreeze must be a number of blocks >= 0, or 'all'; got 'some'"),
        ({"unfreeze": 4}, "unfreeze must be at most the 3 blocks that are used, or 'all'; got 4"),
        ({"unfreeze": 2, "layer": 1}, "unfreeze must be at most the 1 blocks that are used, or 'all'; got 2"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing saves memory for gradients.*or set unfreeze"),
    ],
)
def test_transformers_backbone_refuses_arguments_out_of_range(bert: str, kwargs: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        TransformersBackbone(bert, **kwargs)


def test_refuses_a_class_token_that_is_none(gpt2: str) -> None:
    with pytest.raises(ValueError, match=r"tokens='cls' needs a model with a class token.*use 'mean'"):
        TransformersBackbone(gpt2, tokens="cls")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda b: {**b, "x": b["x"].float()}, r"token ids \(B, T\) as integers; got torch.float32"),
        (lambda b: {**b, "x": b["x"][0]}, r"token ids \(B, T\) as integers; got torch.int64 of shape \(7,\)"),
        (lambda b: {"x": torch.ones(2, 200, dtype=torch.int64)}, "at most 128 tokens.*; got 200"),
        (lambda b: {**b, "mask": b["mask"].flip(1)}, "mask must be True for the tokens of a text.*pad x at the end"),
        (
            lambda b: {**b, "mask": b["mask"].long()},
            r"mask must be boolean of the shape of x, \(3, 7\); got torch.int64",
        ),
        (lambda b: {**b, "mask": b["mask"] & (torch.arange(3) > 0)[:, None]}, "mask leaves no token in 1 samples"),
    ],
)
def test_transformers_backbone_refuses_ids_and_masks_that_do_not_fit(
    bert: str, change: Callable[[Any], Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        TransformersBackbone(bert)(change(batch_of_ids()))


def test_refuses_spans_that_mean_nothing(bert: str) -> None:
    with pytest.raises(ValueError, match=r"spans needs tokens='all'.*got 'mean'"):
        TransformersBackbone(bert, tokens="mean").spans({"text": TEXTS})


def test_a_model_without_a_tokenizer_reads_ids_only(bert: str, tmp_path: Path) -> None:
    """transformers 5 makes a tokenizer that knows no word where its files are missing."""
    folder = shutil.copytree(bert, tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    backbone = TransformersBackbone(str(folder))
    assert backbone.tokenizer is None
    backbone(batch_of_ids())
    with pytest.raises(ValueError, match=r"comes without a tokenizer.*tokenizer.save_pretrained"):
        backbone({"text": TEXTS})


def test_refuses_folders_that_hold_no_model(bert: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is a folder without a config.json"):
        TransformersBackbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="looks like a path but is no folder"):
        TransformersBackbone(str(tmp_path / "nowhere"))
    folder = shutil.copytree(bert, tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"is a folder whose model cannot be loaded: .*config.json and model.safetensors"):
        TransformersBackbone(str(folder))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(OSError, match=r"model.safetensors is no file of weights but text: 'version https://git-lfs"):
        TransformersBackbone(str(folder))
    weights.unlink()
    with pytest.raises(OSError, match="is a folder whose model cannot be loaded"):
        TransformersBackbone(str(folder))


def test_refuses_weights_that_are_not_complete(bert: str, tmp_path: Path) -> None:
    """Others only warn, and leave the rest of the encoder random."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "part")
    state = load_file(folder / "model.safetensors")
    without_pooler = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    save_file(without_pooler, folder / "model.safetensors", metadata={"format": "pt"})
    TransformersBackbone(str(folder))
    incomplete = {name: value for name, value in without_pooler.items() if "layer.1.attention" not in name}
    save_file(incomplete, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack \d+ of its parameters \(encoder.layer.1.attention"):
        TransformersBackbone(str(folder))


def test_refuses_weights_of_another_size(bert: str, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    with pytest.raises(
        ValueError, match=r"sizes of its config.json: encoder\.layer\.0\..* is \(\d+,\), not \(8,\); check"
    ):
        TransformersBackbone(str(folder))


def test_loading_is_quiet(bert: str, capfd: pytest.CaptureFixture[str]) -> None:
    TransformersBackbone(bert)
    out, err = capfd.readouterr()
    assert out + err == ""
