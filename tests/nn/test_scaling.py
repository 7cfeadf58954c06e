"""The bound on the scale of embeddings: its statistics and its gradient."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning import EmbeddingScale
from ddcl_lightning.nn.scaling import ScaleMode, _InverseSquareRoot

modes = pytest.mark.parametrize("mode", ["per_dimension", "total", "whiten"])


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


def test_whiten_makes_the_covariance_the_identity_without_a_rotation() -> None:
    mix = torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.5], [0.3, 0.0, 1.0]])
    tokens = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) @ mix + 5
    scale = EmbeddingScale(3, "whiten")
    scaled = scale(tokens)
    torch.testing.assert_close(scaled.T.cov(correction=0), torch.eye(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scale.variance, tokens.T.cov(correction=0))
    # Rotation-free: where the covariance is diagonal already it only stretches.
    cross = (scaled.T @ (tokens - tokens.mean(0))) / 500
    torch.testing.assert_close(cross, cross.T, atol=1e-4, rtol=0)
    assert bool((torch.linalg.eigvalsh(cross) > 0).all())


def test_unit_length_is_the_geometry_of_cosines() -> None:
    scale, tokens = EmbeddingScale(3, "unit"), data().requires_grad_()
    scaled = scale(tokens)
    torch.testing.assert_close(scaled.norm(dim=-1), torch.ones(40))
    cosines = torch.nn.functional.cosine_similarity(tokens[:5], tokens[5:10])
    torch.testing.assert_close((scaled[:5] - scaled[5:10]).square().sum(-1), 2 - 2 * cosines)
    torch.testing.assert_close(scale(1e3 * tokens), scaled)
    (scaled**3).sum().backward()
    assert tokens.grad is not None
    # No gradient along a token, so nothing is gained by shrinking it.
    torch.testing.assert_close((tokens.grad * tokens).sum(-1), torch.zeros(40), atol=1e-5, rtol=0)
    assert int(scale.num_batches) == 0
    assert scale(torch.zeros(2, 3)).abs().max() == 0
    assert scale.eval()(tokens[:1]).equal(scaled[:1])


@pytest.mark.parametrize("values", [[3.0, 1.0, 0.2], [2.0, 2.0, 0.5], [1.0, 1.0, 1.0]])
def test_inverse_square_root_is_differentiable_even_where_eigenvalues_coincide(values: list[float]) -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64)).Q
    matrix = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T
    root = _InverseSquareRoot.apply(matrix)
    torch.testing.assert_close(root @ matrix @ root, torch.eye(3, dtype=torch.float64))

    def symmetric(half: Tensor) -> Tensor:
        return _InverseSquareRoot.apply(matrix + half + half.T)

    assert torch.autograd.gradcheck(symmetric, torch.zeros(3, 3, dtype=torch.float64, requires_grad=True))


def test_batch_too_small_to_whiten() -> None:
    scale = EmbeddingScale(3, "whiten")
    with pytest.raises(ValueError, match=r"at least 2 D = 6 valid tokens; the first has 5"):
        scale(data()[:5])
    scale(data())
    state = {name: value.clone() for name, value in scale.state_dict().items()}
    small = data(1)[:5].requires_grad_()
    scaled = scale(small)
    scaled.square().sum().backward()
    assert small.grad is not None
    assert not small.grad.any()  # against constant statistics shrinking would pay
    assert all(torch.equal(value, state[name]) for name, value in scale.state_dict().items())
    torch.testing.assert_close(scaled, scale.eval()(small))
    mask = torch.arange(40) < 5
    torch.testing.assert_close(scale.train()(data(1), mask)[mask], scaled)  # padding does not count


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


@pytest.mark.parametrize("mode", ["per_dimension", "total"])
def test_running_statistics_are_even_means_at_first_and_exponential_ones_after(mode: ScaleMode) -> None:
    scale = EmbeddingScale(3, mode, momentum=0.4)
    batches = [data(seed) * (seed + 1) for seed in range(4)]
    for batch in batches:
        scale(batch)
    # Averaged evenly while 1 / n > momentum, exponentially after.
    means = [batch.mean(0) for batch in batches]
    expected = 0.6 * (0.6 * (means[0] + means[1]) / 2 + 0.4 * means[2]) + 0.4 * means[3]
    torch.testing.assert_close(scale.mean, expected)
    variance = scale.variance if mode == "per_dimension" else scale.variance.mean()
    floor = 1e-5 * scale.variance.mean()
    tokens = data(9)
    torch.testing.assert_close(scale.eval()(tokens), (tokens - scale.mean) / (variance + floor).sqrt())


@modes
def test_evaluation_neither_learns_nor_depends_on_the_batch(mode: ScaleMode) -> None:
    scale, tokens = EmbeddingScale(3, mode), data(9)
    scale(data())
    scale.eval()
    before = {name: value.clone() for name, value in scale.state_dict().items()}
    torch.testing.assert_close(scale(tokens[:1]), scale(tokens)[:1])
    assert all(torch.equal(value, before[name]) for name, value in scale.state_dict().items())
    twin = EmbeddingScale(3, mode).eval()
    twin.load_state_dict(before)
    assert torch.equal(twin(tokens), scale(tokens))


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
@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_constant_tokens_have_finite_gradients(mode: ScaleMode, value: float) -> None:
    tokens = torch.full((8, 3), value, requires_grad=True)
    scaled = EmbeddingScale(3, mode)(tokens)
    scaled.square().sum().backward()
    assert float(scaled.detach().abs().max()) < 2  # rounding noise at most, at the scale of everything else
    assert tokens.grad is not None
    assert bool(tokens.grad.isfinite().all())


@pytest.mark.parametrize("mode", ["per_dimension", "total"])
def test_a_single_token_is_its_own_mean(mode: ScaleMode) -> None:
    token = torch.randn(1, 3, requires_grad=True)
    scaled = EmbeddingScale(3, mode)(token)
    scaled.square().sum().backward()
    assert not scaled.any()
    assert token.grad is not None
    assert not token.grad.any()


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_embedding_scale_keeps_the_dtype_of_its_tokens(mode: ScaleMode, dtype: torch.dtype) -> None:
    scale = EmbeddingScale(3, mode)
    assert scale(data().to(dtype)).dtype == dtype
    scaled = scale.eval()(data().to(dtype))
    assert scaled.dtype == dtype
    expected = scale(data())
    tolerance = {torch.bfloat16: 0.3, torch.float16: 0.03, torch.float64: 1e-3}[dtype]  # of data that are 7 +- 0.1
    torch.testing.assert_close(scaled.float()[:, 1:], expected[:, 1:], atol=tolerance, rtol=tolerance)


@modes
def test_half_precision_module(mode: ScaleMode) -> None:
    # 4,001 tokens: their number does not fit into bfloat16.
    many = torch.randn(4001, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = EmbeddingScale(3, mode).bfloat16()
    for scaled in (scale(many), scale.eval()(many)):
        assert scaled.dtype == torch.bfloat16
        assert float(scaled.float().var(0, correction=0).sub(1).abs().max()) < 0.05
    assert scale.mean.dtype == scale.variance.dtype == torch.float32  # statistics are not rounded


@modes
def test_autocast_changes_nothing(mode: ScaleMode) -> None:
    tokens = data()
    expected = EmbeddingScale(3, mode)(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EmbeddingScale(3, mode)(tokens), expected)


def test_embedding_scale_refuses_modes_momenta_and_masks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of.*got 'batch'"):
        EmbeddingScale(3, "batch")  # type: ignore[arg-type]
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]"):
            EmbeddingScale(3, momentum=momentum)
    with pytest.raises(TypeError, match="mask must be boolean"):
        EmbeddingScale(3)(data(), torch.ones(40))
