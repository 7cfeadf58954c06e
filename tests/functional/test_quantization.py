"""One look at the assignments gives what the plain formulas give, gradients included."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning.functional import (
    nearest_prototype,
    prototype_attention_reference,
    quantization,
    quantize,
    token_means,
)

TEMPERATURE = torch.tensor([0.7, 1.3], dtype=torch.float64)


def data(unused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, prototypes and a mask of two heads, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 23, 3, dtype=torch.float64, generator=generator) + 5
    p = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator) + 5
    if unused:
        p[0, 0] += 300
        p[1, 3] -= 200
    return z, p, (torch.rand(23, generator=generator) > 0.2).expand(2, -1)


@pytest.fixture(params=[True, False], ids=["stored", "redone"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "BLOCK_ELEMENTS", 60)
    if not request.param:
        monkeypatch.setattr(quantization, "STORED_ELEMENTS", 0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("unused", [True, False])
def test_equals_the_plain_formulas(unused: bool, detach: bool, masked: bool) -> None:
    z, p, valid = data(unused)
    mask = valid if masked else None
    means = token_means(z, p, TEMPERATURE, mask)
    surprisal = means.log_mass.logsumexp(-1, keepdim=True) - means.log_mass
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    results, gradients = [], []
    for which in ("one look", "plain"):
        inputs = [z.clone().requires_grad_(), p.clone().requires_grad_()]
        if which == "plain":
            out = prototype_attention_reference(
                *inputs, TEMPERATURE, mask, surprisal=surprisal, detach_assignments=detach
            )
        else:
            out = quantize(*inputs, TEMPERATURE, mask, detach_assignments=detach)
        assert out.entropy is not None
        loss = (out.terms.loss * weights).sum() - 0.3 * out.entropy.sum()
        gradients.append(torch.autograd.grad(loss, inputs))
        results.append([out.centroids, *out.terms, out.entropy])
        if which == "one look":
            assert out.statistics is not None
            torch.testing.assert_close(out.statistics[:2], means[:2])
            keep = slice(None) if mask is None else mask[0]
            assert out.codes is not None
            assert torch.equal(out.codes[:, keep], nearest_prototype(z, p)[:, keep])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_entropy_prices_prototypes_by_their_mass_everywhere() -> None:
    z, p, _ = data()
    log_masses = token_means(z, p, TEMPERATURE).log_mass
    elsewhere = torch.randn(log_masses.shape, dtype=log_masses.dtype)
    out = quantize(z, p, TEMPERATURE, total=lambda log_mass: torch.logaddexp(log_mass, elsewhere))
    share = torch.logaddexp(log_masses, elsewhere).softmax(-1)
    torch.testing.assert_close(out.entropy, -(log_masses.softmax(-1) * share.log()).sum(-1))


def test_half_precision_computes_in_float32() -> None:
    z, p, _ = data()
    out = quantize(z.bfloat16(), p.float(), 0.7)
    assert out.centroids.dtype == torch.bfloat16
    assert out.terms.loss.dtype == torch.float32
    reference = quantize(z.bfloat16().float(), p.float(), 0.7)
    torch.testing.assert_close(out.terms, reference.terms)


def test_quantize_refuses_temperatures_and_shapes_that_do_not_fit() -> None:
    z, p, mask = data()
    with pytest.raises(ValueError, match="temperature must be > 0"):
        quantize(z, p, 0.0)
    with pytest.raises(ValueError, match="share their last dimension"):
        quantize(z[..., :2], p, 1.0)
    with pytest.raises(TypeError, match="mask must be boolean"):
        quantize(z, p, 1.0, mask.long())
