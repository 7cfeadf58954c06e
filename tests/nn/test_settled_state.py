"""All calls of a step see the same temperature and the same idf, which move when an optimizer steps."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddcl_lightning import DDCLAttention, PrototypeBank, SoftVectorQuantizer
from ddcl_lightning.heads import HierarchicalReadout
from ddcl_lightning.nn.settled_state import SettledState


def tokens(number: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(6, 9, 6, generator=torch.Generator().manual_seed(number))


class Quantized(nn.Module):
    """A quantizer whose codes, temperature and spread all enter the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vq = SoftVectorQuantizer(
            6, 5, code_update="optimizer", temperature=0.3, gradient="soft", training_output="soft"
        )

    def forward(self, x: Tensor) -> Tensor:
        output = self.vq(x)
        return output.quantized.square().mean() + output.terms.loss


class Levels(nn.Module):
    """Two banks in critical units, the second of which reads tokens that are weighed by their idf."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = HierarchicalReadout([5, 3], embed_dim=6, tokens=["all", "idf_mean"])

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(x)
        return output.pooled.square().mean() + sum(terms.loss.sum() for terms in output.loss_terms)


class Read(nn.Module):
    """A bank, bare or in a layer, with one temperature for each of two heads."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bank = PrototypeBank(5, 3, num_heads=2, temperature=[0.3, 0.1])
        self.layer = DDCLAttention(6, bank=self.bank) if layer else self.bank

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output.centroids.square().mean() + output.terms.loss.sum()


NETS: list[Callable[[], nn.Module]] = [Quantized, Levels, partial(Read, layer=False), partial(Read, layer=True)]


def step(net: nn.Module, number: int, scale: float = 1.0) -> None:
    """One step of an optimizer that leaves every parameter where it is."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net(tokens(number, scale)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("build", NETS)
@pytest.mark.parametrize("steps", [0, 2])
def test_the_same_call_twice_gives_the_same(build: Callable[[], nn.Module], steps: int) -> None:
    net = build()
    for number in range(steps):
        step(net, number)
    first = net(tokens(7))
    net(tokens(8, 5.0))
    assert torch.equal(net(tokens(7)), first)
    step(net, 9)
    assert not torch.equal(net(tokens(7)), first)


@pytest.mark.parametrize("build", NETS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_checkpointed_calls_of_one_backward_pass_see_what_they_saw(
    build: Callable[[], nn.Module], reentrant: bool, steps: int
) -> None:
    gradients = []
    for run_again in (True, False):
        net = build()
        for number in range(steps):
            step(net, number)
        inputs = [tokens(7).requires_grad_(), tokens(8, 5.0).requires_grad_()]
        losses = [checkpoint(net, x, use_reentrant=reentrant) if run_again else net(x) for x in inputs]
        torch.stack(losses).sum().backward()
        gradients.append([x.grad for x in inputs] + [p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


def test_any_optimizer_moves_the_temperature_after_its_step() -> None:
    bank = PrototypeBank(3, 4, temperature=0.1)
    encoder = nn.Linear(6, 4)
    bank.requires_grad_(False)
    bank(encoder(tokens(1)))
    before = bank.temperature.clone()
    bank(encoder(tokens(2, 3.0))).terms.loss.sum().backward()
    assert torch.equal(bank.temperature, before)
    torch.optim.Adam(encoder.parameters()).step()
    assert bank.temperature_state.covariance is not None
    torch.testing.assert_close(bank.temperature, 0.1 * 4 * bank.temperature_state.covariance.lambda_max)
    assert bool(bank.temperature > before)
    bank.eval()
    bank(encoder(tokens(3, 9.0)))
    moved = bank.temperature.clone()
    torch.optim.Adam(encoder.parameters()).step()
    assert torch.equal(bank.temperature, moved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_follow_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    twin = copied(Levels())
    step(twin, 1)
    states = [copy.deepcopy(twin.state_dict())]
    step(twin, 2, 3.0)
    states.append(twin.state_dict())
    changed = {key for key, value in states[1].items() if not torch.equal(value, states[0][key])}
    assert {f"head.levels.{level}.bank.temperature_state.current" for level in (0, 1)} < changed


@pytest.mark.parametrize("build", NETS)
def test_a_loaded_state_goes_on_as_the_one_that_was_saved(build: Callable[[], nn.Module]) -> None:
    net = build()
    for number in range(3):
        step(net, number, 1.0 + number)
    state = copy.deepcopy(net.state_dict())
    expected = net(tokens(7))
    for other in (build(), net):
        other.load_state_dict(state)
        assert torch.equal(other(tokens(7)), expected)


def test_nobody_settles_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Quantized()
    step(net, 1)
    monkeypatch.setattr(SettledState, "take_over", lambda self, where=True: pytest.fail("nothing was measured"))
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.SGD([parameter], lr=0.1).step()
