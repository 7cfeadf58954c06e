"""A step knows the tokens that belong to it and no others: whatever else a bank is called with moves no code."""

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddcl_lightning import PrototypeBank, SoftVectorQuantizer, TokenNormalized
from ddcl_lightning.functional import BankOutput
from ddcl_lightning.nn.temperature import BankTemperature


class Net(nn.Module):
    """An encoder that starts as the identity, and a quantizer."""

    def __init__(self, encoder: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False) if encoder else nn.Identity()
        if isinstance(self.encoder, nn.Linear):
            nn.init.eye_(self.encoder.weight)
        self.vq = SoftVectorQuantizer(4, 8, code_update="optimizer", temperature=0.05)
        generator = torch.Generator().manual_seed(0)
        self.vq.bank.set_prototypes(torch.randn(1, 8, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        output = self.vq(self.encoder(x))
        return (output.quantized.square().mean() + output.terms.loss) * 1e-3


def tokens(number: int, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(6, 20, 4, generator=torch.Generator().manual_seed(number))


def junk(number: int = 9) -> Tensor:
    return tokens(number, 100.0)


Loop = Callable[[Net, TokenNormalized], None]


def plain(net: Net, codes: TokenNormalized) -> None:
    net(tokens(1)).backward()


def without_gradients(net: Net, codes: TokenNormalized) -> None:
    plain(net, codes)
    with torch.no_grad():
        net(junk())


def without_backward(net: Net, codes: TokenNormalized) -> None:
    net(junk())
    plain(net, codes)
    net(junk())


def forward_dropped_by_zero_grad(net: Net, codes: TokenNormalized) -> None:
    net(junk())
    codes.zero_grad()
    plain(net, codes)


def backward_dropped_by_zero_grad(net: Net, codes: TokenNormalized) -> None:
    net(junk()).backward()
    codes.zero_grad(set_to_none=False)
    plain(net, codes)


def backward_dropped_by_the_zero_grad_of_the_module(net: Net, codes: TokenNormalized) -> None:
    net(junk()).backward()
    net.zero_grad()
    plain(net, codes)


def zero_grad_between_forward_and_backward(net: Net, codes: TokenNormalized) -> None:
    net(junk()).backward()
    loss = net(tokens(1))
    codes.zero_grad()
    loss.backward()


def zero_grad_of_the_module_between_forward_and_backward(net: Net, codes: TokenNormalized) -> None:
    net(junk()).backward()
    loss = net(tokens(1))
    net.zero_grad()
    loss.backward()


def evaluation(net: Net, codes: TokenNormalized) -> None:
    plain(net, codes)
    net.eval()
    net(junk()).backward()
    net.train()


def teacher(net: Net, codes: TokenNormalized) -> None:
    plain(net, codes)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        copied.train()(junk()).backward()


def backward_twice(net: Net, codes: TokenNormalized) -> None:
    loss = net(tokens(1))
    loss.backward(retain_graph=True)
    loss.backward()


def gradient_asked_for_and_dropped(net: Net, codes: TokenNormalized) -> None:
    loss = net(tokens(1))
    torch.autograd.grad(loss, net.encoder.weight, retain_graph=True)
    codes.zero_grad()
    loss.backward()


def checkpointed(net: Net, codes: TokenNormalized) -> None:
    checkpoint(net, tokens(1), use_reentrant=False).backward()


def checkpointed_reentrant(net: Net, codes: TokenNormalized) -> None:
    checkpoint(net, tokens(1).requires_grad_(), use_reentrant=True).backward()


def around_the_bank(net: Net, codes: TokenNormalized) -> None:
    net(junk())
    net.vq(net.encoder(tokens(1))).quantized.square().mean().backward()


def tokens_alone(net: Net, codes: TokenNormalized) -> None:
    """Somebody else's straight-through gradient."""
    z = net.encoder(tokens(1))
    net.vq.bank.quantize(z)
    net(junk())
    z.sum().backward()


def frozen_meanwhile(net: Net, codes: TokenNormalized) -> None:
    plain(net, codes)
    net.vq.bank.requires_grad_(False)
    net(junk()).backward()
    net.vq.bank.requires_grad_(True)


LOOPS = [
    value
    for value in list(globals().values())
    if list(getattr(value, "__annotations__", {})) == ["net", "codes", "return"]
]


def moved(loop: Loop, lr: float = 0.5, relocation_threshold: float = 0.5) -> Tensor:
    net = Net()
    codes = TokenNormalized([net.vq.bank.prototypes], lr=lr, relocation_threshold=relocation_threshold).watch(net)
    # The temperature that the codes see must not depend on what else passes.
    net.vq.bank.temperature_state.covariance.momentum = 1e-9  # type: ignore[union-attr]
    with torch.no_grad():
        net.vq(tokens(1))
    loop(net, codes)
    codes.step()
    return net.vq.codebook


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_only_what_belongs_to_the_step_counts(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BankTemperature, "take_over", lambda self, where=True: None)
    torch.testing.assert_close(moved(loop), moved(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", [False, True])
def test_backward_passes_add_up_to_that_of_the_joint_batch(views: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BankTemperature, "take_over", lambda self, where=True: None)

    def apart(net: Net, codes: TokenNormalized) -> None:
        losses = [net(tokens(number)) for number in (1, 2, 3)]
        for loss in [torch.stack(losses).sum()] if views else losses:
            loss.backward()

    def joint(net: Net, codes: TokenNormalized) -> None:
        net(torch.cat([tokens(number) for number in (1, 2, 3)])).backward()

    torch.testing.assert_close(moved(apart), moved(joint), rtol=1e-5, atol=1e-5)


def test_a_call_counts_once_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BankTemperature, "take_over", lambda self, where=True: None)

    def passes(times: int) -> Loop:
        def loop(net: Net, codes: TokenNormalized) -> None:
            net(tokens(2)).backward()
            loss = net(tokens(1))
            for _ in range(times):
                loss.backward(retain_graph=True)

        return loop

    torch.testing.assert_close(moved(passes(3)), moved(passes(1)))


def test_straight_through_without_an_encoder_to_train() -> None:
    """No loss asks for a gradient of the bank or its tokens, only of what is read in the place of the latter."""
    net = Net(encoder=False)
    codes = TokenNormalized([net.vq.bank.prototypes], lr=1.0).watch(net)
    decoder = nn.Linear(4, 4)
    net.vq(junk())
    loss = decoder(net.vq(tokens(1)).quantized).square().mean()
    codes.zero_grad()
    loss.backward()
    assert not bool(net.vq.bank.prototypes.grad.any())
    codes.step()
    assert float(net.vq.codebook.abs().max()) < 5


def test_straight_through_alone_adds_up_and_is_dropped_with_zero_grad() -> None:
    def moved(batches: int, drop: bool = False) -> Tensor:
        net = Net()
        codes = TokenNormalized([net.vq.bank.prototypes], lr=1.0).watch(net)
        before = net.vq.codebook.clone()
        for batch in range(batches):
            net.vq(net.encoder(tokens(batch + 1))).quantized.square().mean().backward()
        if drop:
            net.zero_grad()
        codes.step()
        return net.vq.codebook - before

    assert bool((moved(2) - moved(1)).abs().max() > 1e-3)
    assert not bool(moved(2, drop=True).any())


def test_a_loop_without_losses_counts_the_calls_since_the_last_step_or_zero_grad() -> None:
    net = Net()
    codes = TokenNormalized([net.vq.bank.prototypes], lr=1.0).watch(net)
    net(junk())
    codes.zero_grad()
    net(tokens(1))
    codes.step()
    assert float(net.vq.codebook.abs().max()) < 5
    with pytest.raises(RuntimeError, match="needs a forward pass in training mode before each step"):
        codes.step()


@pytest.mark.parametrize("reset", ["grad", "module", "frozen", "forget"])
def test_a_step_whose_gradient_somebody_dropped_moves_nothing(reset: str) -> None:
    net = Net()
    codes = TokenNormalized([net.vq.bank.prototypes], lr=1.0).watch(net)
    before = net.vq.codebook.clone()
    net(tokens(1)).backward()
    if reset == "grad":
        net.vq.bank.prototypes.grad = None
    elif reset == "module":
        net.zero_grad()
    elif reset == "frozen":
        net.vq.bank.requires_grad_(False)
    else:
        codes.forget(net.vq.bank.prototypes)
    codes.step()
    assert torch.equal(net.vq.codebook, before)
    net.requires_grad_(True)
    net(tokens(1)).backward()
    codes.step()
    assert not torch.equal(net.vq.codebook, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_poisoned_calls_add_nothing(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nobody looks whether the loss is finite."""
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)
    poison = tokens(2)
    poison[0, 0, 0] = bad

    def poisoned(net: Net, codes: TokenNormalized) -> None:
        net(poison).backward()
        plain(net, codes)

    for relocation_threshold in (0.0, 0.5):
        expected = moved(plain, relocation_threshold=relocation_threshold)
        torch.testing.assert_close(
            moved(poisoned, relocation_threshold=relocation_threshold), expected, rtol=1e-5, atol=1e-6
        )

    def alone(net: Net, codes: TokenNormalized) -> None:
        net(poison).backward()

    assert torch.equal(moved(alone), Net().vq.codebook)


def test_state_of_a_poisoned_step_is_that_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrototypeBank, "_require_finite", lambda *args: None)
    states = []
    for batches in ([torch.full((1, 5, 4), torch.nan), tokens(1)], [tokens(1)]):
        net = Net()
        codes = TokenNormalized([net.vq.bank.prototypes], lr=0.1, relocation_threshold=0.5).watch(net)
        for batch in batches:
            net(batch).backward()
            codes.step()
            codes.zero_grad()
        states.append((net.vq.codebook, codes.state[net.vq.bank.prototypes]["cells"], net.vq.bank.temperature))
    torch.testing.assert_close(states[0], states[1])


def test_a_watched_module_can_be_saved_whole_and_goes_on() -> None:
    net = Net()
    codes = TokenNormalized([net.vq.bank.prototypes], lr=0.5).watch(net)
    net(tokens(1)).backward()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.vq.codebook, net.vq.codebook)
    codes.step()
    twin = copy.deepcopy(codes)  # follows nothing
    with pytest.raises(RuntimeError, match=r"Call optimizer.watch\(module\)"):
        twin.step()
    net.eval()
    for strict in (False, True):
        exported = torch.export.export(net, (tokens(1),), strict=strict).module()
        torch.testing.assert_close(exported(tokens(2)), net(tokens(2)))


def test_an_optimizer_that_is_gone_leaves_nothing_behind() -> None:
    bank = PrototypeBank(3, 4)
    codes = TokenNormalized([bank.prototypes]).watch(bank)
    bank(torch.randn(5, 4)).terms.loss.sum().backward()
    del codes
    gc.collect()
    assert not bank._active_observers()
    assert isinstance(bank(torch.randn(5, 4)), BankOutput)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_calls_inside_of_a_compiled_module_count() -> None:
    net = Net()
    codes = TokenNormalized([net.vq.bank.prototypes], lr=1.0).watch(net)
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        compiled(junk())
        loss = compiled(tokens(1))
        codes.zero_grad()
        loss.backward()
        codes.step()
    assert float(net.vq.codebook.abs().max()) < 5
