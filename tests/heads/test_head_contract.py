"""What holds for every head, found and not listed: masks, sizes, gradients, codes, evaluation, state, training."""

import copy
import functools
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import DIM, classes, make
from tiny import LinearBackbone, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ddcl_lightning import (
    Classification,
    DDCLAttention,
    DDCLFeedForward,
    DDCLReadoutModule,
    Decoder,
    EmbeddingScale,
    Head,
    MLPDecoder,
    PoolingHead,
    PrototypeBank,
    PrototypeNorm,
    SoftVectorQuantizer,
    find_banks,
)
from ddcl_lightning._utils.arguments import as_plain
from ddcl_lightning.cli.commands import main
from ddcl_lightning.heads.base import fill_padding
from ddcl_lightning.heads.saving import CONFIG
from ddcl_lightning.nn.discovery import prototypes_of

# Every head is tried with its defaults; those with more than one way of working in the others too.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "AttentionPooling": [{"num_heads": 3, "dim": 5}],
    "CLSPooling": [{"hidden_dim": 5}],
    "DDCLReadout": [
        {"num_heads": 2, "pooling": "both", "repulsion": 0.1},
        {"tokens": "first", "prototype_dim": 3, "residual": True, "embedding_scale": "total"},
        {"num_heads": 2, "pooling": "slots"},
        {"num_heads": 2, "pooling": "histogram", "token_weights": "salience"},
        {"num_heads": 2, "pooling": "tokens_histogram", "token_weights": "mass"},
        {"tokens": "mean", "max_parameters": 300},
    ],
    "HierarchicalReadout": [
        {"num_heads": [2, 1], "pooling": "all", "end_to_end": True},
        {"tokens": ["all", "idf_mean"]},
        {"tokens": ["all", "idf_inputs"], "prototype_dim": 3},
        {"num_prototypes": [6, 5, 3], "embedding_scale": "per_dimension"},
    ],
    "MeanPooling": [{"hidden_dim": 5}],
    "PMAPooling": [{"num_seeds": 2, "num_heads": 2, "pooling": "mean", "dim": 6}],
    "PerceiverPooling": [{"num_latents": 3, "num_heads": 2, "num_blocks": 2, "dim": 12}],
    "SlotAttentionPooling": [{"num_slots": 3, "dim": 5}],
    "ResidualVQ": [{"num_heads": 2, "code_dim": 3}, {"shared_codebook": True, "level_dropout": 0.3}],
    "SoftVQ": [
        {"num_heads": 2, "code_dim": 3, "embedding_scale": "per_dimension"},
        {"gradient": "soft", "training_output": "soft"},
    ],
    "VQPooling": [{"code_dim": 3}, {"init": "kmeans"}, {"max_parameters": 100}],
}
HEADS = {
    " ".join([kind.__name__, *(f"{name}={value}" for name, value in options.items())]): functools.partial(
        make, kind, **options
    )
    for kind in classes(Head)
    for options in [{}, *VARIANTS.get(kind.__name__, [])]
}


def _built(decoder: Decoder) -> Decoder:
    decoder.build(DIM)
    return decoder


each_head = pytest.mark.parametrize("name", HEADS)
# Their codes are moving averages, which the library updates whenever it is called in training.
MOVED_BY_CALLS = {"LibraryVQ"}


def built(name: str) -> Head:
    head: Head = HEADS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head.build(DIM)
    return head


def batch(samples: int = 4, length: int = 6) -> tuple[Tensor, Tensor]:
    """Samples of one token, of two, and of most."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(samples, length, generator=generator) < 0.6
    mask[:, 0] = True
    mask[0, 1:], mask[1, 2:] = False, False
    return torch.randn(samples, length, DIM, generator=generator), mask


def fields(head: Head, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What a readout holds, but its tokens."""
    torch.manual_seed(0)
    readout = head(tokens, mask)
    values = [readout.pooled, *(term for level in readout.loss_terms for term in level), *readout.signals.values()]
    return values + [value for value in (readout.assignments, readout.regularization) if value is not None]


def test_every_head_is_found() -> None:
    """Those that were in no list, and those of another package."""
    names = {kind.__name__ for kind in classes(Head)}
    assert names >= {"DDCLReadout", "FurthestToken", "HierarchicalReadout", "NormPooling", "QuantizerReadout", "SoftVQ"}
    assert VARIANTS.keys() <= names


@pytest.mark.parametrize("training", [False, True])
@each_head
def test_padding_never_matters(name: str, training: bool) -> None:
    head = built(name).train(training)
    tokens, mask = batch()
    expected = fields(copy.deepcopy(head), tokens, mask)
    for garbage in (0.0, 1e6, torch.nan, torch.inf):
        dirty = tokens.masked_fill(~mask.unsqueeze(-1), garbage)
        longer = torch.cat([dirty, torch.full((4, 3, DIM), garbage)], 1)
        extended = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
        torch.testing.assert_close(fields(copy.deepcopy(head), dirty, mask), expected)
        torch.testing.assert_close(fields(copy.deepcopy(head), longer, extended), expected)
    values = [value for value in fields(head, longer, extended) if value.requires_grad]
    if values:
        torch.stack([value.sum() for value in values]).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)


@each_head
def test_a_mask_selects_the_tokens(name: str) -> None:
    head = built(name).eval()
    tokens, mask = batch()
    mask[:, 0] = False  # padding on the left too
    mask[:, 2] = True
    pooled = head(tokens, mask).pooled
    assert pooled.shape == (4, head.pooled_dim)
    for i in range(4):
        torch.testing.assert_close(head(tokens[i : i + 1, mask[i]]).pooled[0], pooled[i])
    torch.testing.assert_close(head(tokens).pooled, head(tokens, torch.ones_like(mask)).pooled)


@each_head
def test_heads_read_a_single_token(name: str) -> None:
    head = built(name)
    tokens = torch.randn(7, 1, DIM)
    for training in (True, False):
        readout = head.train(training)(tokens)
        assert readout.pooled.shape == (7, head.pooled_dim)
        assert readout.tokens.shape == (7, 1, head.token_dim)
        assert bool(readout.pooled.isfinite().all())


@each_head
def test_every_parameter_takes_part(name: str) -> None:
    """Plain DDP waits for a gradient of each."""
    head = built(name)
    readout = head(*batch())
    loss = readout.pooled.square().sum()
    for term in (readout.quantization_loss() if readout.loss_terms else None, readout.regularization):
        loss = loss if term is None else loss + term
    if head.num_parameters():
        loss.backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []


@each_head
def test_evaluation_is_deterministic_and_copies_agree(name: str) -> None:
    head = built(name)
    tokens, mask = batch()
    first = head.eval()(tokens, mask).pooled
    again = HEADS[name]()
    again.build(DIM)
    again.load_state_dict(head.state_dict())
    for twin in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head)), again.eval()):
        torch.manual_seed(7)
        assert torch.equal(twin(tokens, mask).pooled, first)


@each_head
def test_a_call_in_training_mode_changes_nothing_for_the_next(name: str) -> None:
    head = built(name)
    if type(head).__name__ in MOVED_BY_CALLS:
        pytest.skip("its codes move by themselves")
    first, second = fields(head, *batch()), fields(head, *batch())
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@each_head
def test_heads_in_half_precision_agree_with_float32(name: str) -> None:
    head = built(name).eval()
    tokens, mask = batch()
    exact = head(tokens, mask).pooled.detach()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = head(tokens.bfloat16(), mask).pooled.detach()
    assert bool(pooled.isfinite().all())
    assert float((pooled - exact).abs().max()) < 0.1 * float(exact.abs().max())


@each_head
def test_codes_and_assignments(name: str) -> None:
    """Codes in range, -1 at padding and there only; shares that sum to 1, in evaluation mode."""
    head = built(name)
    tokens, mask = batch()
    for training in (True, False):
        readout = head.train(training)(tokens, mask)
        assert (readout.codes is None) == (head.num_codes is None)
        if readout.codes is not None:
            assert head.num_codes is not None
            assert readout.codes.dtype == torch.int64
            assert readout.codes.shape == (4, 6, head.num_codebooks)
            assert torch.equal(readout.codes == -1, ~mask.unsqueeze(-1).expand_as(readout.codes))
            assert int(readout.codes.min()) >= -1
            assert int(readout.codes.max()) < head.num_codes
            assert not readout.tokens[~mask].any()
        if readout.assignments is not None:
            torch.testing.assert_close(readout.assignments.sum(-1), torch.ones(readout.assignments.shape[:2]))
            assert bool((readout.assignments >= 0).all())
        if readout.regularization is not None:
            assert readout.regularization.shape == ()
        assert all(value.shape == () for value in readout.signals.values())
    assert (readout.assignments is None) == (not find_banks(head) and readout.codes is None)


@each_head
def test_round_trip_through_files(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    head = randomized(built(name)).eval()
    try:
        json.dumps({name: as_plain(value) for name, value in head.init_args().items()})
    except TypeError:
        with pytest.raises(TypeError, match=r"must be plain data .* to be saved"):
            head.save_pretrained(tmp_path)
        return
    state = torch.random.get_rng_state()
    head.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, "model.safetensors"]
    for kind in (type(head), Head):
        again = kind.from_pretrained(tmp_path / "new" / "folder")
        assert type(again) is type(head)
        assert not again.training
        assert (again.pooled_dim, again.input_dim) == (head.pooled_dim, DIM)
        assert again.init_args() == head.init_args()
        assert torch.equal(again(*batch()).pooled, head(*batch()).pooled)
        for key, value in head.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(torch.random.get_rng_state(), state)


def randomized(head: Head) -> Head:
    """A head whose floating-point state is not where it starts."""
    state = head.state_dict()
    for name, value in state.items():
        if name.endswith("covariance.covariance"):
            state[name] = (torch.rand(value.shape[:-1]) + 0.5).diag_embed()
        elif value.is_floating_point():
            state[name] = torch.rand(value.shape) / 2 + 0.5
    head.load_state_dict(state)
    return head


@each_head
def test_wrong_use_is_refused(name: str) -> None:
    head = HEADS[name]()
    tokens, mask = batch()
    ours = type(head).__module__.startswith("ddcl_lightning")
    if ours:
        with pytest.raises(RuntimeError, match=f"{type(head).__name__} does not know its input dimension"):
            head(tokens, mask)
    head.build(DIM)
    if ours or isinstance(head, PoolingHead):
        built_parameters = list(head.parameters())
        head.build(DIM)
        assert all(a is b for a, b in zip(built_parameters, head.parameters(), strict=True))
        with pytest.raises(ValueError, match="embed_dim of the head is 8 but the backbone gives 9"):
            head.build(9)
        with pytest.raises(ValueError, match=r"tokens must have shape \(B, T, embed_dim = 8\)"):
            head(tokens[..., :7], mask)
        with pytest.raises(ValueError, match="tokens must have shape"):
            head(tokens[:, 0])
    with pytest.raises(TypeError, match="mask must be boolean"):
        head(tokens, mask.long())
    mask[2] = False
    if ours or isinstance(head, PoolingHead):
        with pytest.raises(ValueError, match=r"none in 1 of 4 \(the first is number 2 of the batch\)"):
            head(tokens, mask)


@each_head
def test_a_sample_without_tokens_is_never_guessed(name: str) -> None:
    """On a GPU nobody looks; the sample's readout is NaN, and the training step stops there."""
    head = built(name)
    tokens, mask = batch()
    mask[2] = False
    filled, kept = fill_padding(tokens, mask)
    assert bool(filled[2].isnan().all())
    assert bool(kept[2].all())
    if isinstance(head, PoolingHead):  # banks look for themselves
        output = head.pool(filled, kept)
        assert bool(output[2].isnan().all())
        assert bool(output[[0, 1, 3]].isfinite().all())


class Sets(Dataset[dict[str, Tensor]]):
    """Sets of up to five noisy tokens around the centre of their class."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(64) % 4
        centers = 2 * torch.randn(4, 1, 4, generator=generator)
        self.x = centers[self.y] + 0.5 * torch.randn(64, 5, 4, generator=generator)
        self.mask = torch.arange(5) <= torch.arange(64).unsqueeze(1) % 5

    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.x[row], "y": self.y[row], "mask": self.mask[row]}


@each_head
def test_trains_every_parameter_in_its_group(name: str) -> None:
    """Codes and prototypes are fast, what moves a bank's tokens is slow, and all the rest is the task's."""
    head, task = HEADS[name](), Classification(4, quantization_weight=0.0)
    module = DDCLReadoutModule(LinearBackbone(embed_dim=DIM), head, task, lr_prototypes=1e-2, rho=0.1)
    groups = {role: {id(p) for p in parameters} for role, parameters in module.parameter_groups().items()}
    slow = [*module.backbone.parameters(), *head.embedding_parameters()]
    assert groups["prototypes"] == {id(p) for p in head.prototype_parameters()}
    assert groups["prototypes"] >= {id(prototypes) for prototypes in prototypes_of(find_banks(head).values())}
    assert groups["encoder"] == {id(p) for p in slow}
    assert set().union(*groups.values()) == {id(p) for p in module.parameters()}
    whole = next(iter(DataLoader(Sets(), batch_size=64)))

    def loss() -> float:
        torch.manual_seed(0)
        cross_entropy = module.task.losses(module.eval()(whole), whole)["cross_entropy"].detach()
        module.train()
        return float(cross_entropy)

    before = loss()
    quiet_trainer(max_epochs=5).fit(module, DataLoader(Sets(), batch_size=16))
    # Codes that start near each other tell the classes hardly apart so soon.
    assert loss() < (0.97 if head.num_codes else 0.8) * before


@pytest.mark.parametrize(
    "words",
    [
        ["PMAPooling", "--model.head.pooling=mean", "--model.head.max_parameters=3000"],
        ["VQPooling", "--model.head.num_codes=5"],
        ["DDCLReadout", "--model.head.num_prototypes=5", "--model.head.tokens=mean", "--model.head.max_parameters=900"],
    ],
)
def test_in_the_command_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = words
    given = ["--model.backbone=IdentityBackbone", "--model.backbone.in_features=64", f"--model.head={name}", *options]
    given += ["--model.task=Classification", "--model.task.num_classes=10", "--model.task.quantization_weight=0"]
    given += ["--data=DigitsDataModule", "--data.val_fraction=0.2", "--trainer.max_epochs=1"]
    given += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    given += ["--trainer.enable_model_summary=false", "--trainer.callbacks=ModelCheckpoint"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *given, "--print_config"])
    assert stop.value.code == 0
    assert re.search(rf"class_path: ddcl_lightning\.(heads\.)?{name}\n", capsys.readouterr().out)
    main(["fit", *given])
    module = DDCLReadoutModule.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert type(module.head).__name__ == name
    x: Any = {"x": torch.rand(3, 64), "y": torch.zeros(3).long()}
    assert module.eval()(x).pooled.shape == (3, module.head.pooled_dim)


class Pooled(nn.Module):
    """What a head makes of a sample."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        pooled: Tensor = self.head(tokens, mask).pooled
        return pooled


@pytest.mark.parametrize("name", [kind.__name__ for kind in classes(Head) if kind.__module__.startswith("ddcl_")])
def test_heads_are_exported_for_any_number_of_samples_and_tokens(name: str) -> None:
    if name in MOVED_BY_CALLS:
        pytest.skip("the library's own layer")
    head = built(name).eval()
    sizes = {0: torch.export.Dim("samples"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(Pooled(head), padded(5, 12), dynamic_shapes=(sizes, sizes)).module()
    tokens, mask = padded(3, 7)
    torch.testing.assert_close(program(tokens, mask), head(tokens, mask).pooled)


def padded(samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens with a mask that leaves one in every sample."""
    generator = torch.Generator().manual_seed(samples)
    mask = torch.rand(samples, length, generator=generator) < 0.7
    mask[:, 0] = True
    return torch.randn(samples, length, DIM, generator=generator), mask


NO_TOKENS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([1, 2], TypeError, "tokens must be a tensor; got list. Convert them by torch.as_tensor."),
    "complex": (torch.randn(2, 3, DIM, dtype=torch.complex64), TypeError, r"tokens must be floating point; got .*real"),
    "integers": (torch.ones(2, 3, DIM, dtype=torch.int64), TypeError, r"must be floating point; got torch.int64"),
    "number": (torch.tensor(1.0), ValueError, "must be vectors"),
}


@pytest.mark.parametrize("kind", NO_TOKENS)
@each_head
def test_what_is_no_tokens_is_refused_in_a_sentence(name: str, kind: str) -> None:
    value, error, message = NO_TOKENS[kind]
    head = HEADS[name]()
    head.build(DIM)
    with pytest.raises(error, match=message):
        head(value)


@pytest.mark.parametrize("kind", NO_TOKENS)
@pytest.mark.parametrize(
    "layer",
    [
        DDCLAttention(DIM, 4),
        DDCLAttention(DIM, 4, num_heads=2),
        DDCLFeedForward(DIM, num_prototypes=4),
        PrototypeBank(4, DIM),
        PrototypeNorm(DIM, 4),
        EmbeddingScale(DIM, "unit"),
        EmbeddingScale(DIM, "per_dimension"),
        SoftVectorQuantizer(DIM, 4),
        _built(MLPDecoder(DIM)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_refuse_it_in_the_same_words(layer: nn.Module, kind: str) -> None:
    value, error, message = NO_TOKENS[kind]
    with pytest.raises(error, match=message.replace("tokens", "(tokens|z)")):
        layer(value)
