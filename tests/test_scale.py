"""The bound on the scale of embeddings: its statistics, its gradient, its sums over processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ddcl_lightning import EmbeddingScale
from ddcl_lightning.scale import ScaleMode

modes = pytest.mark.parametrize("mode", ["per_dimension", "total"])


def data(seed: int = 0) -> Tensor:
    """Tokens (40, 3) of three scales, away from the origin."""
    g = torch.Generator().manual_seed(seed)
    return 7 + torch.randn(40, 3, generator=g) * torch.tensor([0.1, 1.0, 10.0])


def test_per_dimension_standardises_every_dimension() -> None:
    scaled = EmbeddingScale(3)(data())
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    # The floor is 1e-5 of the mean variance, which the smallest dimension feels.
    torch.testing.assert_close(scaled.var(0, correction=0), torch.ones(3), atol=0.05, rtol=0)
    torch.testing.assert_close(scaled.var(0, correction=0)[1:], torch.ones(2), atol=1e-3, rtol=0)


def test_total_keeps_the_geometry() -> None:
    tokens = data()
    scaled = EmbeddingScale(3, "total")(tokens)
    assert float(scaled.var(0, correction=0).mean()) == pytest.approx(1, rel=1e-4)
    ratio = torch.pdist(scaled) / torch.pdist(tokens)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def test_none_returns_the_tokens_themselves() -> None:
    scale, tokens = EmbeddingScale(3, "none"), data()
    assert scale(tokens) is tokens
    assert scale.num_batches == 0


@modes
def test_padding_is_ignored(mode: ScaleMode) -> None:
    tokens = data().view(4, 10, 3)
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) < 0.6
    padded, plain = EmbeddingScale(3, mode), EmbeddingScale(3, mode)
    scaled = padded(tokens.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    torch.testing.assert_close(scaled[mask], plain(tokens[mask]))
    torch.testing.assert_close(padded.mean, plain.mean)
    torch.testing.assert_close(padded.variance, plain.variance)


@modes
def test_running_statistics(mode: ScaleMode) -> None:
    scale = EmbeddingScale(3, mode, momentum=0.4)
    batches = [data(seed) * (seed + 1) for seed in range(4)]
    for batch in batches:
        scale(batch)
    # Averaged evenly while 1 / n > momentum, exponentially after.
    means = [batch.mean(0) for batch in batches]
    expected = 0.6 * (0.6 * (means[0] + means[1]) / 2 + 0.4 * means[2]) + 0.4 * means[3]
    torch.testing.assert_close(scale.mean, expected)
    scale.eval()
    tokens = data(9)
    before = scale.state_dict()["mean"].clone()
    variance = scale.variance if mode == "per_dimension" else scale.variance.mean()
    floor = 1e-5 * scale.variance.mean()
    torch.testing.assert_close(scale(tokens), (tokens - scale.mean) / (variance + floor).sqrt())
    assert torch.equal(scale.mean, before)  # evaluation does not learn
    torch.testing.assert_close(scale(tokens[:1]), scale(tokens)[:1])  # nor depend on the rest of the batch


@modes
@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1.0, 1e6])
def test_units_do_not_matter(mode: ScaleMode, unit: float) -> None:
    tokens = data()
    torch.testing.assert_close(
        EmbeddingScale(3, mode)(unit * tokens), EmbeddingScale(3, mode)(tokens), rtol=1e-3, atol=1e-3
    )


@modes
def test_shrinking_has_no_gradient(mode: ScaleMode) -> None:
    tokens = data().double().requires_grad_()
    target = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (EmbeddingScale(3, mode)(tokens) - target).square().mean()
    (gradient,) = torch.autograd.grad(loss, tokens)
    along = (gradient * (tokens.detach() - tokens.detach().mean(0))).sum()
    assert gradient.norm() > 1e-3
    assert abs(float(along)) < 1e-10  # d loss / d ln(scale)
    assert float(gradient.sum(0).abs().max()) < 1e-10  # nor has moving all of them
    plain = (tokens - target).square().mean()
    (gradient,) = torch.autograd.grad(plain, tokens)
    assert (gradient * (tokens.detach() - tokens.detach().mean(0))).sum() > 1  # without the bound it has


@modes
@pytest.mark.parametrize("tokens", [torch.randn(1, 3), torch.full((5, 3), 0.3), torch.zeros(4, 3)])
def test_constant_tokens_have_finite_gradients(mode: ScaleMode, tokens: Tensor) -> None:
    tokens = tokens.clone().requires_grad_()
    scaled = EmbeddingScale(3, mode)(tokens)
    scaled.square().sum().backward()
    assert not scaled.any()
    assert tokens.grad is not None
    assert bool(tokens.grad.isfinite().all())


def test_dtypes() -> None:
    tokens = data()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        scaled = EmbeddingScale(3)(tokens.to(dtype))
        assert scaled.dtype == dtype
    # 4,001 tokens: their number does not fit into bfloat16.
    many = torch.randn(4001, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = EmbeddingScale(3).bfloat16()
    assert float(scale(many).float().var(0, correction=0).sub(1).abs().max()) < 5e-3
    assert scale.mean.dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of.*got 'batch'"):
        EmbeddingScale(3, "batch")  # type: ignore[arg-type]
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]"):
            EmbeddingScale(3, momentum=momentum)
    with pytest.raises(TypeError, match="mask must be boolean"):
        EmbeddingScale(3)(data(), torch.ones(40))


def _scaled_step(encoder: torch.nn.Linear, scale: EmbeddingScale, x: Tensor, mask: Tensor, count: float) -> Tensor:
    loss = ((scale(encoder(x), mask) - 0.3).abs() * mask.unsqueeze(-1)).sum() / count
    loss.backward()
    return loss.detach()


def _setup(mode: ScaleMode) -> tuple[torch.nn.Linear, EmbeddingScale, Tensor, Tensor]:
    torch.manual_seed(0)
    encoder = torch.nn.Linear(3, 2).double()
    mask = torch.rand(8, 5) < 0.7
    return encoder, EmbeddingScale(2, mode).double(), torch.randn(8, 5, 3, dtype=torch.float64), mask


def _scale_on_two(rank: int, init_file: str, out: str, mode: ScaleMode) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    try:
        encoder, scale, x, mask = _setup(mode)
        # DDP averages gradients over processes; the joint loss is the mean of the two when each is divided by half.
        _scaled_step(encoder, scale, x[rank::2], mask[rank::2], float(mask.sum()) / 2)
        gradients = []
        for parameter in encoder.parameters():
            dist.all_reduce(parameter.grad)
            gradients.append(parameter.grad / 2)
        torch.save((gradients, scale.state_dict()), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@modes
def test_two_processes_equal_one(mode: ScaleMode, tmp_path: Path) -> None:
    mp.spawn(_scale_on_two, args=(str(tmp_path / "init"), str(tmp_path), mode), nprocs=2)
    encoder, scale, x, mask = _setup(mode)
    _scaled_step(encoder, scale, x, mask, float(mask.sum()))
    for rank in range(2):
        gradients, state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(gradients, [p.grad for p in encoder.parameters()])
        torch.testing.assert_close(state, dict(scale.state_dict()))
