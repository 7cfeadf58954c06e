"""One attention call equals the plain formulation equals the definitions, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ddcl_lightning.functional import (
    BankOutput,
    Decomposition,
    masked_mean,
    nearest_prototype,
    prototype_attention,
    prototype_attention_reference,
    soft_assign,
)

Attend = Callable[..., BankOutput]
both_calls = pytest.mark.parametrize("attend", [prototype_attention, prototype_attention_reference])


def definition(z: Tensor, p: Tensor, temperature: Tensor, mask: Tensor | None = None, detach: bool = False):
    """Eq. 2 to 4 as they are printed, with every difference of vectors written out."""
    distances = (z.unsqueeze(-2) - p.unsqueeze(-3)).square().sum(-1)
    q = (-distances / temperature[..., None, None]).softmax(-1)
    if detach:
        q = q.detach()
    c = q @ p
    per_token = Decomposition(
        (q * distances).sum(-1),
        (z - c).square().sum(-1),
        (q * (p.unsqueeze(-3) - c.unsqueeze(-2)).square().sum(-1)).sum(-1),
    )
    keep = torch.ones(z.shape[:-1], dtype=z.dtype) if mask is None else mask.to(z.dtype)
    terms = Decomposition(*((term * keep).sum(-1) / keep.sum(-1) for term in per_token))
    return BankOutput(c * keep.unsqueeze(-1), terms, q * keep.unsqueeze(-1))


def problem(dtype: torch.dtype = torch.float64, heads: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (H, 23, 5), prototypes (H, 7, 5), one temperature per head and a mask; far from the origin."""
    g = torch.Generator().manual_seed(seed)
    shift = 3 * torch.randn(heads, 1, 5, generator=g, dtype=torch.float64)
    z = torch.randn(heads, 23, 5, generator=g, dtype=torch.float64) + shift
    p = torch.randn(heads, 7, 5, generator=g, dtype=torch.float64) + shift
    temperature = torch.linspace(0.5, 4.0, heads, dtype=torch.float64)
    mask = torch.rand(heads, 23, generator=g) < 0.7
    return z.to(dtype), p.to(dtype), temperature, mask


def gradients(attend: Attend, z: Tensor, p: Tensor, *args: object, **kwargs: object) -> list[Tensor]:
    """Of the three terms and of the centroids, each with its own random weights, so that no two errors cancel."""
    z, p = z.clone().requires_grad_(), p.clone().requires_grad_()
    output = attend(z, p, *args, **kwargs)
    g = torch.Generator().manual_seed(1)
    objective = (output.centroids * torch.randn(z.shape, generator=g, dtype=torch.float64)).sum()
    for term in output.terms:
        objective = objective + (term * torch.randn(term.shape, generator=g, dtype=torch.float64)).sum()
    return list(torch.autograd.grad(objective, (z, p)))


@both_calls
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_equals_the_definition_forward_and_backward(attend: Attend, masked: bool, detach: bool) -> None:
    z, p, temperature, mask = problem()
    valid = mask if masked else None
    expected = definition(z, p, temperature, valid)
    output = attend(z, p, temperature, valid, detach_assignments=detach)
    torch.testing.assert_close(output.centroids, expected.centroids, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tuple(output.terms), tuple(expected.terms), rtol=1e-11, atol=1e-12)
    if output.weights is not None:
        torch.testing.assert_close(output.weights, expected.weights, rtol=1e-11, atol=1e-12)
    actual = gradients(attend, z, p, temperature, valid, detach_assignments=detach)
    reference = gradients(definition, z, p, temperature, valid, detach=detach)
    torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-11)


def test_fused_call_passes_gradcheck() -> None:
    z, p, temperature, mask = problem(heads=2)

    def flat(z: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        output = prototype_attention(z, p, temperature, mask)
        return (output.centroids, *output.terms)

    assert torch.autograd.gradcheck(flat, (z.requires_grad_(), p.requires_grad_()))


@both_calls
def test_detached_gradients_are_those_of_equation_10(attend: Attend) -> None:
    z, p, temperature, mask = problem()
    z.requires_grad_()
    p.requires_grad_()
    output = attend(z, p, temperature, mask, detach_assignments=True)
    (to_tokens,) = torch.autograd.grad(output.terms.loss.sum(), z, retain_graph=True)
    (to_prototypes,) = torch.autograd.grad(output.terms.variance.sum(), p)
    with torch.no_grad():
        exact = definition(z, p, temperature, mask)
        count = mask.sum(-1)[:, None, None]
        gradient = 2 * (z - exact.centroids) * mask.unsqueeze(-1) / count
        q = exact.weights
        spread = (torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2)).sum(1) / count
    torch.testing.assert_close(to_tokens, gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(to_prototypes, 2 * spread @ p, rtol=1e-10, atol=1e-12)


@both_calls
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_padding_changes_nothing(attend: Attend, detach: bool, junk: float) -> None:
    z, p, temperature, mask = problem(torch.float32, heads=1)
    dirty = z.masked_fill(~mask.unsqueeze(-1), junk)
    clean_output = attend(z, p, temperature, mask, detach_assignments=detach)
    output = attend(dirty, p, temperature, mask, detach_assignments=detach)
    assert torch.equal(output.centroids, clean_output.centroids)
    assert torch.equal(torch.stack(output.terms), torch.stack(clean_output.terms))
    assert not output.centroids[~mask].any()

    to_tokens, to_prototypes = gradients(attend, dirty, p, temperature, mask, detach_assignments=detach)
    clean = gradients(attend, z, p, temperature, mask, detach_assignments=detach)
    assert torch.equal(to_tokens, clean[0])
    assert torch.equal(to_prototypes, clean[1])
    assert not to_tokens[~mask].any()

    removed = attend(z[mask].unsqueeze(0), p, temperature)
    torch.testing.assert_close(tuple(output.terms), tuple(removed.terms))


@both_calls
def test_heads_do_not_see_each_other(attend: Attend) -> None:
    z, p, temperature, mask = problem()
    output = attend(z, p, temperature, mask)
    for head in range(3):
        alone = attend(z[head], p[head], float(temperature[head]), mask[head])
        torch.testing.assert_close(output.centroids[head], alone.centroids)
        torch.testing.assert_close(torch.stack(output.terms)[:, head], torch.stack(alone.terms))


@both_calls
@pytest.mark.parametrize(
    ("dtype", "centroid_error"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_every_precision_keeps_its_dtype_and_agrees_with_float64(
    attend: Attend, dtype: torch.dtype, centroid_error: float
) -> None:
    z, p, temperature, mask = problem(dtype)
    expected = definition(z.double(), p.double(), temperature, mask)
    output = attend(z, p, temperature, mask)
    assert output.centroids.dtype == dtype
    terms_dtype = torch.promote_types(dtype, torch.float32)
    assert all(term.dtype == terms_dtype for term in output.terms)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for actual, exact in zip(output.terms, expected.terms, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.centroids.double(), expected.centroids, rtol=centroid_error, atol=centroid_error)


@both_calls
def test_autocast_does_not_lower_the_precision(attend: Attend) -> None:
    z, p, temperature, mask = problem(torch.float32)

    def under_autocast(*args: Tensor) -> BankOutput:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(*args)

    plain, cast = attend(z, p, temperature, mask), under_autocast(z, p, temperature, mask)
    assert torch.equal(cast.centroids, plain.centroids)
    assert torch.equal(torch.stack(cast.terms), torch.stack(plain.terms))
    expected = gradients(attend, z, p, temperature, mask)
    actual = gradients(under_autocast, z, p, temperature, mask)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def largest_saved_tensor(attend: Attend, dtype: torch.dtype, detach: bool) -> int:
    z = torch.randn(2, 301, 5, dtype=dtype, requires_grad=True)
    p = torch.randn(2, 97, 5, dtype=dtype, requires_grad=True)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend(z, p, 0.5, detach_assignments=detach)
    return max(sizes)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_call_saves_no_assignments(dtype: torch.dtype, detach: bool) -> None:
    assert largest_saved_tensor(prototype_attention, dtype, detach) <= 2 * 301 * 8
    assert largest_saved_tensor(prototype_attention_reference, dtype, detach) >= 2 * 301 * 97  # the probe sees them


@pytest.mark.parametrize("dim", [1, 3, 4, 64])
def test_kernel_gets_four_dimensions_and_aligned_rows(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: float) -> Tensor:
        shapes.extend([query.shape, key.shape, value.shape])
        return scaled_dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr("ddcl_lightning.functional.assignment.scaled_dot_product_attention", attention)
    output = prototype_attention(torch.randn(2, 6, dim), torch.randn(2, 3, dim), 1.0)
    assert output.centroids.shape == (2, 6, dim)
    assert all(len(shape) == 4 and shape[-1] % 4 == 0 for shape in shapes)


def test_precision_survives_far_from_the_origin() -> None:
    z, p, temperature, _ = problem(torch.float32)
    near, far = prototype_attention(z, p, temperature), prototype_attention(z + 1000, p + 1000, temperature)
    # Moving the inputs rounds them to 6e-5; without centring the terms would be off by about 0.1.
    torch.testing.assert_close(tuple(far.terms), tuple(near.terms), rtol=1e-3, atol=0)


def test_hard_assignments_are_exact() -> None:
    p = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    output = prototype_attention(p[[0, 1, 2, 1]] + 0.1, p, 1e-6)
    torch.testing.assert_close(output.centroids, p[[0, 1, 2, 1]])
    torch.testing.assert_close(output.terms.loss, torch.tensor(0.02))
    assert 0 <= output.terms.variance < 1e-5


@both_calls
def test_one_prototype_is_the_mean_squared_distance(attend: Attend) -> None:
    z, p = torch.randn(9, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    output = attend(z, p, 0.3)
    torch.testing.assert_close(output.terms.loss, (z - p).square().sum(-1).mean())
    torch.testing.assert_close(output.centroids, p.expand(9, 3))
    assert output.terms.variance.abs() < 1e-12


@both_calls
def test_no_valid_token_gives_nan(attend: Attend) -> None:
    z, p, temperature, mask = problem()
    output = attend(z, p, temperature, torch.zeros_like(mask))
    assert all(bool(term.isnan().all()) for term in output.terms)
    empty = attend(z[:, :0], p, temperature)
    assert empty.centroids.shape == (3, 0, 5)
    assert bool(empty.terms.loss.isnan().all())


def test_soft_assign_is_the_boltzmann_distribution() -> None:
    z, p, temperature, _ = problem()
    q = soft_assign(z, p, temperature)
    torch.testing.assert_close(q, definition(z, p, temperature).weights)
    torch.testing.assert_close(q.sum(-1), torch.ones_like(q[..., 0]))
    assert torch.equal(q.argmax(-1), nearest_prototype(z, p))
    hard = soft_assign(z.half(), p.half(), 1e-6)
    assert hard.dtype == torch.float32
    assert bool((hard.amax(-1) > 0.999).all())


def test_nearest_prototype_is_exact_far_from_the_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    z, p, _, _ = problem()
    expected = torch.cdist(z, p).argmin(-1)
    assert torch.equal(nearest_prototype(z, p), expected)
    assert torch.equal(nearest_prototype(z.float() + 1000, p.float() + 1000), expected)
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", 50)
    assert torch.equal(nearest_prototype(z, p), expected)


@both_calls
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_temperature_that_is_not_positive(attend: Attend, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be > 0.*got"):
        attend(torch.randn(4, 2), torch.randn(3, 2), temperature)


@both_calls
@pytest.mark.parametrize(
    ("tokens", "prototypes", "mask", "error", "message"),
    [
        (torch.randn(4), torch.randn(3, 4), None, ValueError, "at least 2 dimensions"),
        (torch.randn(4, 2), torch.randn(3, 5), None, ValueError, "share their last dimension.*d = 2.*d = 5"),
        (torch.randn(2, 4, 2), torch.randn(3, 2), None, ValueError, "share their leading dimensions"),
        (torch.ones(4, 2, dtype=torch.int64), torch.randn(3, 2), None, TypeError, "floating point; got torch.int64"),
        (torch.randn(4, 2), torch.randn(3, 2), torch.ones(4), TypeError, "mask must be boolean.*float32"),
        (torch.randn(4, 2), torch.randn(3, 2), torch.ones(5, dtype=torch.bool), ValueError, r"\(4,\); got \(5,\)"),
    ],
)
def test_attention_refuses_shapes_and_masks_that_do_not_fit(
    attend: Attend, tokens: Tensor, prototypes: Tensor, mask: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attend(tokens, prototypes, 1.0, mask)


def test_masked_mean_takes_numbers_vectors_and_dimensions_that_the_mask_lacks() -> None:
    values, mask = torch.randn(2, 3, 6, 4), torch.rand(2, 6) < 0.5
    mask[:, 2] = True
    expected = torch.stack([values[i][:, mask[i]].mean(1) for i in range(2)])
    poisoned = values.masked_fill(~mask[:, None, :, None], torch.nan)
    torch.testing.assert_close(masked_mean(poisoned, mask, dim=-2), expected)
    torch.testing.assert_close(masked_mean(poisoned[:, 0, :, 0], mask), expected[:, 0, 0])
    torch.testing.assert_close(masked_mean(values, None, dim=-2), values.mean(-2))
    assert bool(masked_mean(values, torch.zeros_like(mask), dim=-2).isnan().all())
