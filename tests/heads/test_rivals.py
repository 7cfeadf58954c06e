"""What holds for every head: masks, sizes, gradients, evaluation, training, the command line."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LinearBackbone, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule, find_banks
from ddcl_lightning.cli.commands import main
from ddcl_lightning.heads import (
    AttentionPooling,
    CLSPooling,
    Head,
    MaxPooling,
    MeanPooling,
    PerceiverPooling,
    PMAPooling,
    SlotAttentionPooling,
    VQPooling,
)
from ddcl_lightning.heads.base import fill_padding

HEADS: dict[str, Callable[..., Head]] = {
    "cls": lambda **k: CLSPooling(**k),
    "cls control": lambda **k: CLSPooling(hidden_dim=5, **k),
    "mean": lambda **k: MeanPooling(**k),
    "mean control": lambda **k: MeanPooling(hidden_dim=5, **k),
    "max": lambda **k: MaxPooling(**k),
    "attention": lambda **k: AttentionPooling(**k),
    "hops": lambda **k: AttentionPooling(num_heads=3, dim=5, **k),
    "pma": lambda **k: PMAPooling(num_seeds=2, num_heads=2, **k),
    "pma mean": lambda **k: PMAPooling(num_seeds=2, num_heads=2, pooling="mean", dim=6, **k),
    "perceiver": lambda **k: PerceiverPooling(num_latents=3, num_heads=2, **k),
    "perceiver wide": lambda **k: PerceiverPooling(num_latents=3, num_heads=2, num_blocks=2, dim=12, **k),
    "slots": lambda **k: SlotAttentionPooling(num_slots=3, **k),
    "slots narrow": lambda **k: SlotAttentionPooling(num_slots=3, dim=5, **k),
    "vq": lambda **k: VQPooling(6, **k),
    "vq projected": lambda **k: VQPooling(6, dim=3, **k),
    "ddcl": lambda **k: DDCLReadout(6, num_heads=2, pooling="both", **k),
    "ddcl first": lambda **k: DDCLReadout(6, tokens="first", prototype_dim=3, residual=True, **k),
    "ddcl slots": lambda **k: DDCLReadout(6, num_heads=2, pooling="slots", **k),
    "ddcl token slots": lambda **k: DDCLReadout(6, num_heads=2, pooling="token_slots", **k),
    "ddcl mean": lambda **k: DDCLReadout(6, tokens="mean", **k),
}
each_head = pytest.mark.parametrize("name", HEADS)


def batch(samples: int = 4, length: int = 6, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(samples, length, generator=generator) < 0.6
    mask[:, 0] = True
    return torch.randn(samples, length, dim, generator=generator), mask


def fields(head: Head, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    torch.manual_seed(0)
    readout = head(tokens, mask)
    values = [readout.pooled, *(term for level in readout.loss_terms for term in level)]
    return values + [value for value in (readout.assignments, readout.regularization) if value is not None]


@pytest.mark.parametrize("training", [False, True])
@each_head
def test_padding_never_matters(name: str, training: bool) -> None:
    head = HEADS[name](embed_dim=8).train(training)
    tokens, mask = batch()
    expected = fields(head, tokens, mask)
    for garbage in (0.0, 1e6, torch.nan, torch.inf):
        dirty = tokens.masked_fill(~mask.unsqueeze(-1), garbage)
        longer = torch.cat([dirty, torch.full((4, 3, 8), garbage)], 1)
        extended = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
        torch.testing.assert_close(fields(head, dirty, mask), expected)
        torch.testing.assert_close(fields(head, longer, extended), expected)
    if head.num_parameters():
        sum(value.sum() for value in fields(head, longer, extended)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in head.parameters())


@each_head
def test_a_mask_selects_the_tokens(name: str) -> None:
    head = HEADS[name](embed_dim=8).eval()
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
    head = HEADS[name](embed_dim=8)
    tokens = torch.randn(5, 1, 8)
    for training in (True, False):
        pooled = head.train(training)(tokens).pooled
        assert pooled.shape == (5, head.pooled_dim)
        assert bool(pooled.isfinite().all())


@each_head
def test_order_of_tokens_matters_to_the_first_only(name: str) -> None:
    head = HEADS[name](embed_dim=8).eval()
    tokens, mask = batch()
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    same = torch.allclose(head(tokens, mask).pooled, head(tokens[:, order], mask[:, order]).pooled, atol=1e-5)
    assert same == (name not in ("cls", "cls control", "ddcl first"))


@each_head
def test_every_parameter_takes_part(name: str) -> None:
    """Plain DDP waits for a gradient of each."""
    head = HEADS[name](embed_dim=8)
    readout = head(*batch())
    loss = readout.pooled.square().sum()
    for term in (readout.quantization_loss() if readout.loss_terms else None, readout.regularization):
        loss = loss if term is None else loss + term
    if head.num_parameters():
        loss.backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []


@each_head
def test_evaluation_is_deterministic_and_copies_agree(name: str) -> None:
    head = HEADS[name]()
    head.build(8)
    tokens, mask = batch()
    first = head.eval()(tokens, mask).pooled
    for twin in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        torch.manual_seed(7)
        assert torch.equal(twin(tokens, mask).pooled, first)


@each_head
def test_heads_in_half_precision_agree_with_float32(name: str) -> None:
    head = HEADS[name](embed_dim=8).eval()
    tokens, mask = batch()
    exact = head(tokens, mask).pooled.detach()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = head(tokens.bfloat16(), mask).pooled.detach()
    assert bool(pooled.isfinite().all())
    assert float((pooled - exact).abs().max()) < 0.1 * float(exact.abs().max())


@each_head
def test_heads_refuse_use_before_build_and_other_shapes(name: str) -> None:
    head = HEADS[name]()
    tokens, mask = batch()
    with pytest.raises(RuntimeError, match=f"{type(head).__name__} does not know its input dimension"):
        head(tokens, mask)
    head.build(8)
    built = list(head.parameters())
    head.build(8)
    assert all(a is b for a, b in zip(built, head.parameters(), strict=True))
    with pytest.raises(ValueError, match="embed_dim of the head is 8 but the backbone gives 9"):
        head.build(9)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, T, embed_dim = 8\)"):
        head(tokens[..., :7], mask)
    with pytest.raises(ValueError, match="tokens must have shape"):
        head(tokens[:, 0])
    with pytest.raises(TypeError, match="mask must be boolean"):
        head(tokens, mask.long())
    mask[2] = False
    with pytest.raises(ValueError, match=r"none in 1 of 4 \(the first is number 2 of the batch\)"):
        head(tokens, mask)


def test_a_sample_without_tokens_is_never_guessed() -> None:
    """On a GPU nobody looks; the sample's readout is NaN, and the training step stops there."""
    tokens, mask = batch()
    mask[2] = False
    filled, kept = fill_padding(tokens, mask)
    assert bool(filled[2].isnan().all())
    assert bool(kept[2].all())
    for name, create in HEADS.items():
        head = create(embed_dim=8)
        if isinstance(head, DDCLReadout):
            continue  # its bank looks for itself
        if not isinstance(head, VQPooling):
            output = head.layer(filled, kept)
            assert bool(output[2].isnan().all()), name
            assert bool(output[[0, 1, 3]].isfinite().all()), name


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


STARTS = [(name, {"init": init}) for name in HEADS if name.startswith("vq") for init in ("uniform", "kmeans")]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in HEADS if not name.startswith("vq")), *STARTS],
    ids=lambda value: value if isinstance(value, str) else "".join(value.values()),
)
def test_every_head_trains_in_the_module(name: str, options: dict[str, str]) -> None:
    module = DDCLReadoutModule(
        LinearBackbone(embed_dim=8),
        HEADS[name](**options),
        Classification(4, quantization_weight=0.0),
        lr_prototypes=1e-2,
        rho=0.1,
    )
    trained = {id(p) for group in module.parameter_groups().values() for p in group}
    assert trained == {id(p) for p in module.parameters()}
    whole = next(iter(DataLoader(Sets(), batch_size=64)))

    def loss() -> float:
        torch.manual_seed(0)
        cross_entropy = module.task.losses(module.eval()(whole), whole)["cross_entropy"].detach()
        module.train()
        return float(cross_entropy)

    before = loss()
    quiet_trainer(max_epochs=5).fit(module, DataLoader(Sets(), batch_size=16))
    # From the authors' start most codes are never used, and the readout hardly tells the classes apart.
    assert loss() < (0.95 if options.get("init") == "uniform" else 0.8) * before


def test_parameters_have_the_rate_of_their_role() -> None:
    """Codes and prototypes are fast, what moves a bank's tokens is slow, and all the rest is the task's."""
    for name, create in HEADS.items():
        head = create()
        module = DDCLReadoutModule(LinearBackbone(embed_dim=8), head, Classification(4), rho=0.1)
        groups = {role: {id(p) for p in parameters} for role, parameters in module.parameter_groups().items()}
        banks = {id(bank.prototypes) for bank in find_banks(head).values()}
        if isinstance(head, VQPooling):
            assert groups["prototypes"] == {id(head.layer.codebook)}
        else:
            assert groups["prototypes"] == banks, name
        if isinstance(head, DDCLReadout):
            assert banks
        else:
            assert not banks
            assert groups["encoder"] == {id(p) for p in module.backbone.parameters()}


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
