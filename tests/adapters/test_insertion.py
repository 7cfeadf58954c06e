"""Prototypes inside networks: what they compute, that models come back unchanged, and what shared banks are."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import (
    DDCLAttention,
    GatedPrototypes,
    PrototypeBank,
    PrototypeNorm,
    SerialPrototypes,
    TokenNormalized,
    find_banks,
    insert_prototypes,
    quantization_loss,
    remove_prototypes,
    two_timescale_groups,
)
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from tests.processes import succeed_in_processes
from tests.tiny import absolute, quiet_trainer

DIM = 8


class Block(nn.Module):
    """A residual block that returns a tuple, as those of Hugging Face do, if ``as_tuple``."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(DIM, DIM), as_tuple

    def forward(self, hidden: Tensor, flag: str = "flag") -> Any:
        hidden = hidden + torch.tanh(self.linear(hidden))
        return (hidden, flag) if self.as_tuple else hidden


class Net(nn.Module):
    def __init__(self, as_tuple: bool = False, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(as_tuple) for _ in range(depth))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(hidden=x)
            x = x[0] if isinstance(x, tuple) else x
        return x


NAMES = [f"blocks.{i}" for i in range(3)]


def gated(**options: Any) -> GatedPrototypes:
    return GatedPrototypes(DDCLAttention(DIM, 5, **options))


def serial(**options: Any) -> SerialPrototypes:
    return SerialPrototypes(DDCLAttention(DIM, 5, **options))


# What the pieces compute ------------------------------------------------------------------------


def test_serial_prototypes_are_the_layer() -> None:
    placed, x = serial(residual=True), torch.randn(2, 6, DIM)
    expected = placed.layer(x)
    assert torch.equal(placed(x), expected.tokens)
    assert placed.terms is not None
    assert torch.equal(quantization_loss(placed), expected.terms.loss.sum())


def test_gate_scales_the_branch_of_each_token() -> None:
    placed, x = gated(), torch.randn(2, 6, DIM)
    with torch.no_grad():
        placed.gate.weight.normal_()
        placed.gate.bias.fill_(0.3)
    gate_value = torch.tanh(x @ placed.gate.weight.T + placed.gate.bias)
    torch.testing.assert_close(placed(x), gate_value * placed.layer(x).tokens)
    assert torch.equal(placed.gate_value(x), gate_value)


def test_closed_gate_learns_to_open() -> None:
    placed, x = gated(), torch.randn(2, 6, DIM)
    output = placed(x)
    assert not output.any()
    (output - 1).square().sum().backward()
    assert placed.gate.bias.grad is not None
    assert placed.gate.bias.grad.abs() > 0
    # Every parameter has a gradient from the first step on, which plain DDP needs.
    assert all(p.grad is not None for p in placed.parameters())


def test_norm_with_one_prototype_at_zero_is_rms_norm() -> None:
    norm, x = PrototypeNorm(DIM, 1, eps=1e-6), 30 * torch.randn(2, 6, DIM)
    norm.bank.set_prototypes(torch.zeros(1, 1, DIM))
    with torch.no_grad():
        norm.gain.normal_()
        norm.bias.normal_()
    expected = nn.functional.rms_norm(x, (DIM,), norm.gain, eps=1e-6) + norm.bias
    torch.testing.assert_close(norm(x), expected)


def test_norm_by_hand() -> None:
    norm, x = PrototypeNorm(DIM, 4, temperature=absolute(0.7)), torch.randn(2, 6, DIM)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    p = norm.bank.prototypes[0]
    c = (-torch.cdist(x, p.expand(2, -1, -1)).square() / 0.7).softmax(-1) @ p
    rest = x - c
    expected = norm.gain * rest / rest.square().mean(-1, keepdim=True).sqrt() + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)


def test_norm_does_not_depend_on_place_or_scale() -> None:
    """Moved and scaled tokens, with prototypes and T moved and scaled along, give the same numbers."""
    norm, x = PrototypeNorm(DIM, 4, temperature=absolute()), torch.randn(2, 6, DIM)
    moved = copy.deepcopy(norm)
    moved.bank.set_prototypes(100 * norm.bank.prototypes.detach() + 7)
    moved.bank.set_temperature(absolute(float(norm.bank.temperature * 1e4)))
    torch.testing.assert_close(moved(100 * x + 7), norm(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "create",
    [serial, gated, lambda: PrototypeNorm(DIM, 4, temperature=absolute())],
    ids=["serial", "gated", "norm"],
)
def test_padding_stays_out(create: Callable[[], PrototypeAdapter]) -> None:
    placed, mask, x = create(), torch.rand(3, 6) < 0.6, torch.randn(3, 6, DIM)
    if isinstance(placed, GatedPrototypes):
        nn.init.ones_(placed.gate.bias)

    def run(x: Tensor, mask: Tensor | None = mask) -> list[Tensor]:
        placed.zero_grad()
        output = placed(x, mask)
        loss = quantization_loss(placed)
        (output.square().sum() + loss).backward()
        return [output, loss, *(p.grad for p in placed.parameters() if p.grad is not None)]

    clean = run(x)
    assert all(
        torch.equal(*pair) for pair in zip(run(x.masked_fill(~mask.unsqueeze(-1), torch.nan)), clean, strict=True)
    )
    assert not clean[0][~mask].any()
    assert not torch.equal(run(x, None)[1], clean[1])


# In a model that exists -------------------------------------------------------------------------


@pytest.mark.parametrize("as_tuple", [False, True])
def test_pretrained_model_is_unchanged_while_gates_are_closed(as_tuple: bool) -> None:
    net, x = Net(as_tuple), torch.randn(2, 6, DIM)
    expected, names = net(x), list(net.state_dict())
    placed = insert_prototypes(net, NAMES, gated)
    assert torch.equal(net(x), expected)
    assert len(find_banks(net)) == 3
    assert [name for name in net.state_dict() if ".prototypes." not in name] == names
    assert [net.get_submodule(f"{name}.prototypes") for name in NAMES] == placed
    nn.init.ones_(placed[1].gate.bias)
    assert not torch.equal(net(x), expected)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_serial_insertion_is_the_layer_after_the_block(as_tuple: bool) -> None:
    net, x = Net(as_tuple, depth=1), torch.randn(2, 6, DIM)
    before = net(x)
    (placed,) = insert_prototypes(net, ["blocks.0"], serial)
    torch.testing.assert_close(net(x), placed.layer(before).tokens)
    assert (net.blocks[0](x)[1] == "flag") if as_tuple else True


def test_gated_insertion_reads_the_input_of_the_block() -> None:
    net, x = Net(depth=1), torch.randn(2, 6, DIM)
    before = net(x)
    (placed,) = insert_prototypes(net, ["blocks.0"], gated)
    nn.init.ones_(placed.gate.bias)
    torch.testing.assert_close(net(x), before + torch.tanh(torch.tensor(1.0)) * placed.layer(x).tokens)
    torch.testing.assert_close(net.blocks[0](x), net(x))  # positional or by name


@pytest.mark.parametrize("create", [serial, gated, lambda: PrototypeNorm(DIM, 4)], ids=["serial", "gated", "norm"])
def test_removal_leaves_no_trace(create: Callable[[], PrototypeAdapter]) -> None:
    net, x = Net(), torch.randn(2, 6, DIM)
    expected, names = net(x), list(net.state_dict())
    placed = insert_prototypes(net, NAMES, create, mask="lengths")
    net(x)
    assert remove_prototypes(net) == placed
    assert torch.equal(net(x), expected)
    assert list(net.state_dict()) == names
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())
    assert not any(layer._forward_hooks_with_kwargs or layer._forward_pre_hooks_with_kwargs for layer in net.modules())
    assert remove_prototypes(net) == []
    insert_prototypes(net, NAMES, create)  # and again


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_call_their_own_prototypes(clone: Callable[[nn.Module], nn.Module]) -> None:
    net, x = Net(), torch.randn(2, 6, DIM)
    plain = net(x)
    insert_prototypes(net, NAMES, gated, mask="lengths")
    net(x)  # leaves loss terms with a graph, which cannot be copied
    twin = clone(net)
    for layer in twin.modules():
        if isinstance(layer, GatedPrototypes):
            nn.init.ones_(layer.gate.bias)
    assert torch.equal(net(x), plain)
    assert not torch.equal(twin(x), plain)
    assert len(remove_prototypes(twin)) == 3
    assert torch.equal(twin(x), plain)
    assert len(remove_prototypes(net)) == 3
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in twin.modules())


@pytest.mark.parametrize("positional", [False, True])
def test_mask_of_the_model_reaches_the_banks(positional: bool) -> None:
    net, x, mask = Net(), torch.randn(3, 6, DIM), torch.arange(6) < torch.tensor([[6], [2], [4]])
    insert_prototypes(net, NAMES, serial, mask="lengths")

    def terms(x: Tensor) -> Tensor:
        net(x, mask.long()) if positional else net(x, lengths=mask.long())
        return quantization_loss(net)

    assert torch.equal(terms(x), terms(x.masked_fill(~mask.unsqueeze(-1), 1e6)))
    net(x)  # without one, all tokens are valid again
    assert all(layer.mask is None for layer in net.modules() if isinstance(layer, PrototypeAdapter))


def test_hugging_face_and_timm_models() -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    bert = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4])}
    vit, image = timm.create_model("test_vit", pretrained=False).eval(), torch.rand(2, 3, 160, 160)
    for model, names, width, mask, call in (
        (bert, ["encoder.layer.0", "encoder.layer.1"], 32, "attention_mask", lambda: bert(**batch).last_hidden_state),
        (vit, ["blocks.0", "blocks.1"], vit.embed_dim, None, lambda: vit(image)),
    ):
        before = call()
        insert_prototypes(model, names, lambda width=width: GatedPrototypes(DDCLAttention(width, 4)), mask=mask)
        assert torch.equal(call(), before)
        with record_codebooks(find_banks(model), lambda name, record: None):
            assert quantization_loss(model) > 0
        remove_prototypes(model)
        insert_prototypes(model, names[:1], lambda width=width: SerialPrototypes(DDCLAttention(width, 4)), mask=mask)
        assert not torch.equal(call(), before)
        remove_prototypes(model)
        assert torch.equal(call(), before)


def test_loss_terms_of_a_call_can_be_read_once() -> None:
    net, x = Net(), torch.randn(2, 6, DIM)
    placed = insert_prototypes(net, NAMES, gated)
    net(x)
    expected = sum(layer.terms.loss.sum() for layer in placed)
    torch.testing.assert_close(quantization_loss(net), expected)
    with pytest.raises(RuntimeError, match="no loss terms to read"):
        quantization_loss(net)
    with pytest.raises(ValueError, match="found none in Linear"):
        quantization_loss(nn.Linear(2, 2))


# Shared banks -----------------------------------------------------------------------------------


def sharing(**options: Any) -> tuple[Net, PrototypeBank]:
    """Three blocks with a layer each that read one bank."""
    bank = PrototypeBank(5, DIM, temperature=absolute(2.0))
    net = Net()
    insert_prototypes(net, NAMES, lambda: SerialPrototypes(DDCLAttention(DIM, bank=bank, residual=True, **options)))
    return net, bank


def test_shared_bank_counts_once() -> None:
    net, bank = sharing()
    assert list(find_banks(net)) == ["blocks.0.prototypes.layer.bank"]
    assert find_banks(net)["blocks.0.prototypes.layer.bank"] is bank
    size = sum(p.numel() for p in net.parameters())
    assert size == 3 * (DIM * DIM + DIM) + 5 * DIM + 3 * DIM * DIM
    (fast, slow) = two_timescale_groups(net, 1e-2)
    assert [id(p) for p in fast["params"]] == [id(bank.prototypes)]
    assert id(bank.prototypes) not in {id(p) for p in slow["params"]}
    twin, other = sharing()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(other.prototypes, bank.prototypes)


def test_token_normalized_reads_the_tokens_of_all_layers_that_share() -> None:
    net, bank = sharing()
    optimizer = TokenNormalized([bank.prototypes], lr=0.5).watch(net)
    records: list[CodebookRecord] = []
    with record_codebooks({"": bank}, lambda name, observed: records.append(observed)):
        net(torch.randn(2, 6, DIM))
    before = bank.prototypes.detach().clone()
    optimizer.step()
    assert len(records) == 3
    tokens = torch.cat([observed.tokens[0] for observed in records])
    q = (-torch.cdist(tokens, before[0]).square() / 2.0).softmax(-1)
    target = (q / q.sum(0)).T @ tokens
    torch.testing.assert_close(bank.prototypes[0].detach(), before[0].lerp(target, 0.5), rtol=1e-4, atol=1e-5)


def test_gradients_of_all_layers_add_up() -> None:
    net, bank = sharing()
    net(torch.randn(2, 6, DIM))
    terms = [layer.terms for layer in net.modules() if isinstance(layer, SerialPrototypes)]
    gradients = [torch.autograd.grad(term.loss.sum(), bank.prototypes, retain_graph=True)[0] for term in terms if term]
    quantization_loss(net).backward()
    torch.testing.assert_close(bank.prototypes.grad, sum(gradients))


def test_each_layer_keeps_its_own_projection() -> None:
    bank = PrototypeBank(5, 3, num_heads=2, temperature=absolute())
    wide, narrow = DDCLAttention(8, bank=bank), DDCLAttention(4, bank=bank)
    assert wide(torch.randn(2, 6, 8)).tokens.shape == (2, 6, 8)
    assert narrow(torch.randn(2, 6, 4)).tokens.shape == (2, 6, 4)
    bank.set_temperature(absolute(0.25))
    assert wide.bank.temperature is narrow.bank.temperature


class Training(pl.LightningModule):
    """A network with prototype adapters that trains on their loss and a regression."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        return self.net(x).square().mean() + 0.1 * quantization_loss(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(two_timescale_groups(self, self.lr))


class SaveState(pl.Callback):
    """Writes each process's weights where the test can find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def fit(net: nn.Module, callbacks: list[pl.Callback], lr: float = 1e-2, **kwargs: Any) -> Training:
    x = 3 * torch.randn(32, 6, DIM, generator=torch.Generator().manual_seed(0)) + 5
    # One batch an epoch, so that it does not matter how a sampler deals the rows to processes.
    data = DataLoader(TensorDataset(x), batch_size=32 // kwargs.get("devices", 1))
    module = Training(net, lr)
    quiet_trainer(callbacks=callbacks, max_epochs=4, **kwargs).fit(module, data)
    return module


@pytest.mark.parametrize(
    "create",
    [serial, gated, lambda: serial(residual=True, sampling=True), lambda: PrototypeNorm(DIM, 4)],
    ids=["serial", "gated", "sampling", "norm"],
)
def test_trains_under_the_callbacks(create: Callable[[], PrototypeAdapter]) -> None:
    net = Net()
    insert_prototypes(net, NAMES, create)
    check = DecompositionCheck(every_n_batches=1)
    before = [bank.prototypes.detach().clone() for bank in find_banks(net).values()]
    fit(net, [TemperatureAnnealing(), KMeansInitialization(num_restarts=1, progress=False), check])
    assert (check.checks, check.violations) == (12, 0)
    assert all(bool(bank.initialized) for bank in find_banks(net).values())
    after = [bank.prototypes.detach() for bank in find_banks(net).values()]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_shared_bank_starts_from_the_tokens_of_all_its_layers() -> None:
    """Blocks that move everything by 50: a start from the first layer alone would lie around 5 + 50 only."""
    net, bank = sharing()
    for block in net.blocks:
        block.forward = lambda hidden: hidden + 50  # type: ignore[method-assign]
    for adapter in net.modules():
        if isinstance(adapter, SerialPrototypes):
            nn.init.zeros_(adapter.layer.output_projection.weight)  # type: ignore[union-attr]
    fit(net, [KMeansInitialization(num_restarts=5, progress=False)], lr=1e-9)
    places = bank.prototypes.detach().mean(-1)[0]
    assert [bool(((places - 5 - 50 * layer).abs() < 5).any()) for layer in (1, 2, 3)] == [True] * 3


def train_shared(folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    net, _ = sharing()
    insert_prototypes(net, [f"{name}.linear" for name in NAMES], gated)
    fit(net, [KMeansInitialization(num_restarts=1, progress=False), SaveState(folder)], **options)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Plain DDP, which refuses parameters that are not used: a bank of three layers, and gates that start closed."""
    train_shared(tmp_path)
    succeed_in_processes(tmp_path, partial(train_shared, tmp_path, devices=2, strategy="ddp"))
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert len([name for name in alone if name.endswith("bank.prototypes")]) == 6  # one of them under three names
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: GatedPrototypes(DDCLAttention(8, 4, residual=True)), "layer must have residual=False"),
        (lambda: SerialPrototypes(DDCLAttention(8, 4, prototype_dim=3)), "of the dimension that it takes, 8; got 3"),
        (lambda: GatedPrototypes(DDCLAttention(8, 4, context_dim=2)), "no context inside of a network"),
        (lambda: PrototypeNorm(8), "num_prototypes must be given, or a bank to share"),
        (lambda: PrototypeNorm(8, 4, eps=0.0), "eps must be > 0; got 0.0"),
        (lambda: PrototypeNorm(8, bank=PrototypeBank(4, 6)), "one head of dimension dim = 8; got 1 of dimension 6"),
        (lambda: PrototypeNorm(8, bank=PrototypeBank(4, 8, num_heads=2)), "got 2 of dimension 8"),
        (lambda: PrototypeNorm(8, 4, bank=PrototypeBank(4, 8)), "must be left out; got num_prototypes = 4"),
    ],
)
def test_adapters_refuse_arguments_that_do_not_fit(create: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        (["blocks.7"], {}, r"must name modules of the model; got 'blocks.7'. Did you mean one of \['blocks.2'"),
        (["blocks"], {}, "must not name containers, whose children are what they run; got 'blocks', a ModuleList"),
        ([], {}, "at least one block"),
        (["blocks.0", "blocks.0"], {}, "each once"),
        (["blocks.0"], {"mask": "attention_mask"}, "argument of Net.forward; got 'attention_mask'"),
    ],
)
def test_a_refused_insertion_changes_nothing(blocks: list[str], options: dict[str, str], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        insert_prototypes(net, blocks, gated, **options)
    assert find_banks(net) == {}


def test_insertion_refuses_a_shared_adapter_and_blocks_that_have_prototypes() -> None:
    net, adapter = Net(), gated()
    with pytest.raises(ValueError, match="create must return a new module at each call"):
        insert_prototypes(net, NAMES, lambda: adapter)
    insert_prototypes(net, NAMES[:1], gated)
    with pytest.raises(ValueError, match=r"block 'blocks.0' has prototypes already"):
        insert_prototypes(net, NAMES, gated)
    net.blocks[1].forward = lambda hidden: {"tokens": hidden}  # type: ignore[method-assign]
    insert_prototypes(net, NAMES[1:2], gated)
    with pytest.raises(TypeError, match=r"the output of Block must be tokens.*got dict"):
        net(torch.randn(2, 6, DIM))
