"""The layer computes eq. 4 to 7, ignores padding, and survives compilation and export."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny import absolute
from torch import Tensor, nn

from ddcl_lightning import DDCLAttention, PrototypeBank
from ddcl_lightning.functional import decompose, soft_assign


def by_hand(layer: DDCLAttention, x: Tensor) -> Tensor:
    """Soft centroids per head, concatenated (eq. 4, 6, 7)."""
    embedded = x if layer.input_projection is None else x @ layer.input_projection.weight.T
    heads = embedded.chunk(layer.bank.num_heads, -1)
    centroids = []
    for head_tokens, prototypes, temperature in zip(heads, layer.bank.prototypes, layer.bank.temperature, strict=True):
        q = soft_assign(head_tokens.flatten(0, -2), prototypes, float(temperature))
        centroids.append((q @ prototypes).unflatten(0, head_tokens.shape[:-1]))
    return torch.cat(centroids, -1)


def test_one_head_returns_the_soft_centroid() -> None:
    layer, x = DDCLAttention(8, 5, temperature=absolute(0.7)), torch.randn(2, 3, 8)
    assert layer.input_projection is None
    assert layer.output_projection is None
    output = layer(x)
    torch.testing.assert_close(output.tokens, by_hand(layer, x))
    assert torch.equal(output.tokens, output.centroids)
    assert layer.output_dim == 8


def test_residual_adds_the_projected_centroid() -> None:
    layer, x = DDCLAttention(8, 5, residual=True), torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x).tokens, x + by_hand(layer, x) @ layer.output_projection.weight.T)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("prototype_dim", [None, 3])
def test_several_heads_are_the_definition(residual: bool, prototype_dim: int | None) -> None:
    layer = DDCLAttention(8, 5, num_heads=4, prototype_dim=prototype_dim, residual=residual)
    x = torch.randn(2, 3, 8)
    output = layer(x, need_weights=True)
    expected = by_hand(layer, x)
    torch.testing.assert_close(output.centroids, expected)
    assert output.centroids.shape == (2, 3, 4 * (prototype_dim or 2))
    result = expected @ layer.output_projection.weight.T
    torch.testing.assert_close(output.tokens, x + result if residual else result)
    assert output.weights.shape == (2, 4, 3, 5)
    assert output.terms.loss.shape == (4,)


def test_output_projection_can_be_left_out() -> None:
    layer = DDCLAttention(8, 5, num_heads=2, prototype_dim=3, output_projection=False)
    output = layer(torch.randn(2, 3, 8))
    assert output.tokens.shape == (2, 3, 6)
    assert layer.output_dim == 6
    assert layer.output_projection is None


@pytest.mark.parametrize("prototype_dim", [2, 4])
def test_projection_starts_orthogonal(prototype_dim: int) -> None:
    weight = DDCLAttention(8, 5, num_heads=2, prototype_dim=prototype_dim).input_projection.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(2 * prototype_dim), atol=1e-5, rtol=0)


def test_scale_is_applied_before_the_bank() -> None:
    layer, x = DDCLAttention(8, 5, embedding_scale="per_dimension"), 100 + 9 * torch.randn(4, 6, 8)
    scaled = (x - x.mean((0, 1))) / x.std((0, 1), correction=0)
    torch.testing.assert_close(layer(x).centroids, by_hand(layer, scaled), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prototype_dim": 3},
        {"embedding_scale": "per_dimension"},
        {"embedding_scale": "total", "residual": True},
        {"num_heads": 2, "residual": True},
    ],
    ids=str,
)
def test_padding_reaches_neither_output_nor_gradients(options: dict[str, object], junk: float) -> None:
    layer = DDCLAttention(4, 5, **options)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = torch.randn(3, 6, 4).masked_fill(~mask.unsqueeze(-1), 0.0)

    def run(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        layer.zero_grad()
        output = layer(x, mask)
        (output.tokens.square().sum() + output.terms.loss.sum()).backward()
        return [output.tokens, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    expected = run(clean)
    actual = run(clean.masked_fill(~mask.unsqueeze(-1), junk))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not actual[0][~mask].any()
    assert not actual[1][~mask].any()


def test_state_round_trip_and_copies() -> None:
    layer = DDCLAttention(8, 5, num_heads=2, embedding_scale="total", temperature=0.3)
    x = torch.randn(4, 6, 8)
    layer(x)  # running statistics
    layer.eval()
    twin = DDCLAttention(8, 5, num_heads=2, embedding_scale="total").eval()
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x).tokens, layer(x).tokens)


def test_a_bfloat16_layer_returns_bfloat16_and_finite_gradients() -> None:
    layer = DDCLAttention(8, 5, num_heads=2, residual=True, embedding_scale="per_dimension").bfloat16()
    output = layer(torch.randn(2, 300, 8, dtype=torch.bfloat16))
    assert output.tokens.dtype == torch.bfloat16
    output.terms.loss.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_autocast_keeps_the_loss_terms_in_float32() -> None:
    layer, x = DDCLAttention(8, 5, num_heads=2, embedding_scale="per_dimension"), torch.randn(2, 30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.terms.loss.dtype == torch.float32
    torch.testing.assert_close(output.terms.loss, layer(x).terms.loss, rtol=2e-2, atol=0)


class Terms(nn.Module):
    """A layer as exporters want it: tensors in, a tuple of tensors out."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.layer = DDCLAttention(8, 5, num_heads=2, residual=True, embedding_scale="per_dimension")
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        output = self.layer(x, mask, self.need_weights)
        return (output.tokens, *output.terms, *([output.weights] if self.need_weights else []))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(b, t, 8, generator=g), torch.rand(b, t, generator=g) < 0.7) for b, t in ((3, 4), (5, 7))]


@pytest.mark.slow
@pytest.mark.parametrize("need_weights", [False, True])
def test_export_with_dynamic_batch(need_weights: bool) -> None:
    module = Terms(need_weights).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(module, batches()[0], dynamic_shapes=(sizes, sizes))
    for batch in batches():
        torch.testing.assert_close(program.module()(*batch), module(*batch))


@pytest.mark.slow
def test_compile_with_dynamic_batch() -> None:
    module = Terms(need_weights=False)
    # The graphs of both passes; to make machine code of them is torch's part, and takes most of a minute.
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", dynamic=True, fullgraph=True)
    for batch in batches():
        expected, actual = module(*batch), compiled(*batch)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for output in (expected, actual):
            (output[0].square().mean() + output[1].sum()).backward()
    gradients = [p.grad for p in compiled.parameters()]
    torch.testing.assert_close(gradients, [p.grad for p in module.parameters()], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be at least 1; got 0"),
        ({"num_heads": 3}, "embed_dim must be divisible by num_heads; got 8 and 3"),
        ({"num_heads": 0}, "got 8 and 0"),
        ({"residual": True, "output_projection": False}, "output_projection must not be False with residual=True"),
        ({"embedding_scale": "batch"}, "embedding_scale must be one of"),
        ({"prototype_dim": 0}, "must be at least 1; got 0"),
        ({"num_prototypes": None}, "num_prototypes must be given, or a bank to share; got neither"),
        ({"context_dim": 0}, "context_dim must be at least 1; got 0"),
        ({"bank": PrototypeBank(5, 8)}, "what makes a bank must be left out; got num_prototypes = 5"),
        (
            {"num_prototypes": None, "bank": PrototypeBank(5, 8), "num_heads": 2, "temperature": 0.3},
            "got num_heads = 2, temperature = 0.3",
        ),
    ],
)
def test_attention_layer_refuses_arguments_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDCLAttention(**{"embed_dim": 8, "num_prototypes": 5, **options})


def test_refuses_tokens_and_masks_that_do_not_fit() -> None:
    layer = DDCLAttention(8, 5, num_heads=2)
    with pytest.raises(ValueError, match=r"embed_dim = 8; got shape \(2, 3, 7\)"):
        layer(torch.randn(2, 3, 7))
    with pytest.raises(ValueError, match=r"\(2, 3\); got \(2,\)"):
        layer(torch.randn(2, 3, 8), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be boolean"):
        layer(torch.randn(2, 3, 8), torch.ones(2, 3))
    with pytest.raises(ValueError, match="tokens must be finite"):
        layer(torch.full((2, 3, 8), torch.nan))


# Sampling ----------------------------------------------------------------------------------------


def test_sampled_prototypes_have_the_soft_centroid_as_their_mean() -> None:
    layer, x = (
        DDCLAttention(6, 5, num_heads=2, temperature=absolute(2.0), output_projection=False, sampling=True),
        torch.randn(3, 6),
    )
    draws = layer(x.expand(20_000, 3, 6))
    distances = torch.cdist(draws.tokens[:, 0, :3], layer.bank.prototypes[0])
    assert float(distances.amin(-1).max().detach()) < 5e-3  # prototypes, not mixtures
    assert len(distances.argmin(-1).unique()) > 1
    soft = draws.centroids[0]
    deviation = draws.tokens.std(0) / 20_000**0.5
    # 18 entries, each within 4.5 standard errors.
    assert bool(((draws.tokens.mean(0) - soft).abs() < 4.5 * deviation + 1e-6).all())


def test_samples_follow_the_assignments() -> None:
    bank, x = PrototypeBank(4, 2, num_heads=2, temperature=absolute([0.7, 3.0])), torch.randn(1, 4)
    weights = bank(x.unsqueeze(0), need_weights=True).weights[0, :, 0]  # (H, K)
    codes = bank.sample(x.expand(20_000, 4))
    assert codes.shape == (20_000, 2)
    for head in range(2):
        shares = torch.bincount(codes[:, head], minlength=4) / 20_000
        torch.testing.assert_close(shares, weights[head].detach(), atol=0.02, rtol=0)


def test_sampling_streams_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, x = PrototypeBank(4, 2, temperature=absolute(1e-6)), torch.randn(50, 2)
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", 12)
    assert torch.equal(bank.sample(x), bank.encode(x))  # cold: the nearest one


def test_sampling_changes_neither_loss_terms_nor_gradients_nor_evaluation() -> None:
    soft = DDCLAttention(6, 5, temperature=absolute(2.0), residual=True)
    sampling = DDCLAttention(6, 5, temperature=absolute(2.0), residual=True, sampling=True)
    sampling.load_state_dict(soft.state_dict())
    x, weights = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    outputs = [layer(x) for layer in (soft, sampling)]
    assert not torch.equal(outputs[0].tokens, outputs[1].tokens)
    assert torch.equal(outputs[0].centroids, outputs[1].centroids)
    assert all(torch.equal(*pair) for pair in zip(outputs[0].terms, outputs[1].terms, strict=True))
    for output in outputs:
        ((output.tokens * weights).sum() + output.terms.loss.sum()).backward()
    torch.testing.assert_close(sampling.bank.prototypes.grad, soft.bank.prototypes.grad)
    assert torch.equal(sampling.eval()(x).tokens, soft.eval()(x).tokens)


def test_sampling_leaves_padding_zero() -> None:
    layer, mask = DDCLAttention(6, 5, sampling=True), torch.tensor([[True, True, False]])
    output = layer(torch.randn(1, 3, 6).masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    assert not output.tokens[~mask].any()
    assert bool(output.tokens.isfinite().all())


# Context -----------------------------------------------------------------------------------------


def conditioned(**options: Any) -> DDCLAttention:
    layer = DDCLAttention(6, 5, temperature=absolute(0.9), context_dim=2, **options)
    assert layer.context_projection is not None
    assert not layer.context_projection.weight.any()  # starts as the layer without a context
    nn.init.normal_(layer.context_projection.weight)
    return layer


@pytest.mark.parametrize("heads", [1, 2])
def test_decomposition_is_exact_for_every_sample_with_its_own_prototypes(heads: int) -> None:
    """The oracle moves the prototypes, sample by sample, in float64; the layer moves tokens."""
    layer = conditioned(num_heads=heads, output_projection=False).double()
    x, context = torch.randn(3, 7, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    read, whole = x if layer.input_projection is None else layer.input_projection(x), layer(x, mask, context=context)
    totals = torch.zeros(3, heads, dtype=torch.float64)
    for sample in range(3):
        output = layer(x[sample], mask[sample], context=context[sample])
        moved = layer.context_projection(context[sample]).unflatten(0, (heads, 1, -1)) + layer.bank.prototypes
        tokens, valid = read[sample].unflatten(-1, (heads, -1)).transpose(0, 1), mask[sample].expand(heads, -1)
        exact = decompose(tokens, moved, layer.bank.temperature, valid)
        for term, expected in zip(output.terms, exact, strict=True):
            torch.testing.assert_close(term, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(exact.loss, exact.ols + exact.variance, rtol=1e-10, atol=1e-12)
        q = soft_assign(tokens, moved, layer.bank.temperature)
        centroids = (q @ moved).transpose(0, 1).flatten(1).masked_fill(~mask[sample].unsqueeze(-1), 0.0)
        torch.testing.assert_close(output.tokens, centroids)
        torch.testing.assert_close(whole.tokens[sample], centroids)
        totals += mask[sample].sum() * torch.stack([*exact])
    torch.testing.assert_close(torch.stack([*whole.terms]), totals / mask.sum())


def test_context_is_learned_by_the_loss() -> None:
    layer = DDCLAttention(6, 5, context_dim=2)
    layer(torch.randn(3, 7, 6), context=torch.randn(3, 2)).terms.loss.sum().backward()
    assert layer.context_projection.weight.grad.abs().min() > 0


def test_context_reaches_samples_too() -> None:
    layer, context = conditioned(sampling=True), torch.randn(3, 2)
    output = layer(torch.randn(3, 7, 6), context=context)
    moved = layer.bank.prototypes + layer.context_projection(context).unsqueeze(1)
    assert float(torch.cdist(output.tokens, moved).amin(-1).max().detach()) < 5e-3


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ({}, torch.zeros(2, 3), r"context belongs to a layer with context_dim; got shape \(2, 3\)"),
        ({"context_dim": 3}, None, r"context must have shape \(2, 3\), one vector.*; got None"),
        ({"context_dim": 3}, torch.zeros(2, 4), r"got \(2, 4\)"),
        ({"context_dim": 3}, torch.zeros(2, 5, 3), r"got \(2, 5, 3\)"),
        ({"context_dim": 3}, torch.zeros(3), r"got \(3,\)"),
    ],
)
def test_refuses_contexts_that_do_not_fit(options: dict[str, int], context: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDCLAttention(8, 4, **options)(torch.randn(2, 5, 8), context=context)


# Sharing, tested further in test_placement.py ----------------------------------------------------


def test_shared_bank_is_the_other_layers() -> None:
    first = DDCLAttention(8, 5, num_heads=2, temperature=0.3)
    second = DDCLAttention(8, bank=first.bank)
    assert second.bank is first.bank
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(second(x).tokens, first(x).tokens)
    first.bank.set_temperature(0.1)
    assert torch.equal(second(x).tokens, first(x).tokens)
