"""A budget gives the widest head within it, counted exactly."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from registry import DIM, classes, make

from ddcl_lightning import DDCLReadout
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
from ddcl_lightning.heads.width import count_parameters, widest

# name: the head, its argument for the width, the step of the width
SIZED: dict[str, tuple[Callable[..., Head], str, int]] = {
    "cls": (CLSPooling, "hidden_dim", 1),
    "mean": (MeanPooling, "hidden_dim", 1),
    "attention": (AttentionPooling, "dim", 1),
    "hops": (lambda **k: AttentionPooling(num_heads=4, **k), "dim", 1),
    "pma": (lambda **k: PMAPooling(num_seeds=2, num_heads=4, **k), "dim", 4),
    "perceiver": (lambda **k: PerceiverPooling(num_heads=2, num_blocks=2, **k), "dim", 2),
    "slots": (SlotAttentionPooling, "dim", 1),
    "vq": (lambda **k: VQPooling(16, **k), "code_dim", 1),
    "ddcl": (lambda **k: DDCLReadout(16, **k), "prototype_dim", 1),
    "ddcl heads": (lambda **k: DDCLReadout(16, num_heads=4, residual=True, **k), "prototype_dim", 1),
}


def width(head: Head) -> int:
    if isinstance(head, DDCLReadout):
        return head.attention.bank.dim
    if isinstance(head, AttentionPooling):
        return head.hidden.out_features
    return head.pooled_dim // (2 if isinstance(head, PMAPooling) else 1)


@pytest.mark.parametrize("max_parameters", [1_200, 5_000, 20_011, 200_000])
@pytest.mark.parametrize("embed_dim", [12, 64])
@pytest.mark.parametrize("name", SIZED)
def test_the_widest_head_that_fits(name: str, embed_dim: int, max_parameters: int) -> None:
    create, argument, step = SIZED[name]
    head = create(max_parameters=max_parameters, embed_dim=embed_dim)
    count, chosen = head.num_parameters(), width(head)
    assert count == sum(p.numel() for p in head.parameters()) <= max_parameters
    wider = create(**{argument: chosen + step}, embed_dim=embed_dim)
    if chosen + step == embed_dim and name in ("ddcl", "vq"):  # that one has no projection, and far fewer parameters
        wider = create(**{argument: chosen + 2 * step}, embed_dim=embed_dim)
    assert wider.num_parameters() > max_parameters
    if max_parameters == 200_000 and step == 1:
        assert count > 0.98 * max_parameters
    assert head(torch.randn(2, 3, embed_dim)).pooled.shape == (2, head.pooled_dim)


@pytest.mark.parametrize("name", SIZED)
def test_too_small_max_parameters_names_the_smallest(name: str) -> None:
    create, argument, step = SIZED[name]
    least = create(**{argument: step}, embed_dim=12).num_parameters()
    with pytest.raises(ValueError, match=f"max_parameters must be at least {least}, .*; got {least - 1}"):
        create(max_parameters=least - 1, embed_dim=12)
    assert create(max_parameters=least, embed_dim=12).num_parameters() == least


@pytest.mark.parametrize("name", SIZED)
def test_width_and_max_parameters_exclude_each_other(name: str) -> None:
    create, argument, _ = SIZED[name]
    with pytest.raises(
        ValueError, match=f"max_parameters chooses {argument}, so give one of them; got {argument} = 4 and"
    ):
        create(**{argument: 4}, max_parameters=1000)
    with pytest.raises(ValueError, match="max_parameters must be at least 1, or None; got 0"):
        create(max_parameters=0)


def sized() -> list[type[Head]]:
    return [kind for kind in classes(Head) if "max_parameters" in inspect.signature(kind).parameters]


@pytest.mark.parametrize("kind", sized(), ids=lambda kind: kind.__name__)
def test_every_head_with_max_parameters_keeps_to_them(kind: type[Head]) -> None:
    def head(max_parameters: int) -> Head:
        instance: Head = make(kind, max_parameters=max_parameters)
        state = torch.random.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            instance.build(DIM)
        assert torch.equal(torch.random.get_rng_state(), state)
        return instance

    counts = [head(max_parameters).num_parameters() for max_parameters in (2_000, 20_000)]
    assert counts[0] <= 2_000
    assert 2_000 < counts[1] <= 20_000
    with pytest.raises(ValueError, match="max_parameters must be at least") as error:
        head(1)
    least = int(re.findall(r"at least (\d+)", str(error.value))[0])
    assert head(least).num_parameters() == least
    assert head(2_000)(torch.randn(2, 3, DIM)).pooled.shape[0] == 2


def test_max_parameters_in_the_space_of_the_tokens() -> None:
    """A single head of dimension D has no projection: a budget must not fall for it and leave the most unused."""
    dim, codes = 12, 16
    exact = (dim + codes) * dim  # what a projected head of dimension D would cost
    for head in (
        DDCLReadout(codes, max_parameters=exact, embed_dim=dim),
        VQPooling(codes, max_parameters=exact, embed_dim=dim),
    ):
        assert exact - head.num_parameters() <= dim + codes
    assert DDCLReadout(codes, embed_dim=dim).num_parameters() == dim * codes


def test_widest_is_the_largest_width_that_fits() -> None:
    assert widest(lambda w: w * w, 100) == 10
    assert widest(lambda w: w * w, 99) == 9
    assert widest(lambda w: w * w, 100, step=4) == 8
    assert widest(lambda w: 1000 + w, 1001) == 1
    with pytest.raises(ValueError, match="max_parameters must be at least 16,"):
        widest(lambda w: w * w, 15, step=4)


def test_counting_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    assert count_parameters(lambda: torch.nn.Linear(10**6, 10**6)) == 10**12 + 10**6
    assert torch.equal(torch.random.get_rng_state(), state)


def test_num_parameters_counts_frozen_ones_and_no_buffers() -> None:
    head = SlotAttentionPooling(embed_dim=6)
    count = head.num_parameters()
    assert count == sum(p.numel() for p in head.parameters()) < sum(v.numel() for v in head.state_dict().values())
    assert head.requires_grad_(False).num_parameters() == count
    assert MaxPooling(embed_dim=6).num_parameters() == 0
