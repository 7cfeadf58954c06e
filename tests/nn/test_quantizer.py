"""Soft vector quantization: the loss it claims, hard codes in evaluation, and codes that stay alive."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddcl_lightning import SoftVectorQuantizer, TokenNormalized
from ddcl_lightning.functional import nearest_prototype, soft_assign


def quantizer(**kwargs: Any) -> SoftVectorQuantizer:
    torch.manual_seed(0)
    return SoftVectorQuantizer(**{"dim": 6, "num_codes": 5, "code_update": "optimizer", **kwargs})


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("code_dim", [None, 2])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_of_tokens_and_feature_maps(heads: int, code_dim: int | None, training: bool) -> None:
    vq = quantizer(num_heads=heads, code_dim=code_dim).train(training)
    last = (heads,) if heads > 1 else ()
    tokens, grid = torch.randn(3, 8, 6), torch.randn(3, 6, 2, 4)
    for z, shape in ((tokens, (3, 8)), (grid, (3, 2, 4))):
        quantized, indices, (loss, signals, decomposition) = vq(z)
        assert quantized.shape == z.shape
        assert indices.shape == (*shape, *last)
        assert indices.dtype == torch.int64
        assert loss.shape == ()
        assert all(term.shape == (heads,) for term in (*decomposition, *signals.values()))
        assert torch.equal(vq.encode(z), indices)
        assert vq.decode(indices).shape == z.shape
    # A grid is its cells, row by row. (In training the temperature has moved on.)
    vq.eval()
    flat = vq(grid.flatten(2).mT)
    torch.testing.assert_close(vq(grid).quantized.flatten(2).mT, flat.quantized)


@pytest.mark.parametrize("heads", [1, 3])
def test_evaluation_reads_the_nearest_codes(heads: int) -> None:
    vq = quantizer(num_heads=heads).eval()
    z = torch.randn(3, 8, 6)
    quantized, indices, _ = vq(z)
    head_tokens = z.view(24, heads, -1).transpose(0, 1)
    assert torch.equal(indices.reshape(24, heads).T, nearest_prototype(head_tokens, vq.codebook))
    torch.testing.assert_close(quantized, vq.decode(indices))
    expected = torch.stack([vq.codebook[h][indices.reshape(24, heads)[:, h]] for h in range(heads)], 1)
    torch.testing.assert_close(quantized.view(24, heads, -1), expected)


@pytest.mark.parametrize("output", ["hard", "soft"])
@pytest.mark.parametrize("gradient", ["straight_through", "soft"])
def test_what_training_reads_and_the_loss_is_its_definition(gradient: Any, output: Any) -> None:
    vq = quantizer(commitment_weight=0.3, entropy_weight=0.2, gradient=gradient, training_output=output)
    z = torch.randn(4, 10, 6)
    quantized, _, (loss, signals, _) = vq(z)
    flat, codes, temperature = z.view(40, 6), vq.codebook[0], float(vq.bank.temperature)
    q = soft_assign(flat, codes, temperature)
    expected = q @ codes if output == "soft" else codes[q.argmax(1)]
    torch.testing.assert_close(quantized.view(40, 6), expected)
    distances = torch.cdist(flat, codes).square()
    spread = flat.var(0, correction=0).sum()
    mean = q.mean(0)
    entropy = -(mean * mean.log()).sum()
    torch.testing.assert_close(signals["code_entropy"][0], entropy)
    torch.testing.assert_close(loss, 0.3 * (q * distances).sum(1).mean() / spread - 0.2 * entropy)
    hard = codes[q.argmax(1)]
    torch.testing.assert_close(signals["code_gap"][0], (q @ codes - hard).square().sum(1).mean() / spread)
    assert temperature == pytest.approx(
        0.1 * 4 * float(torch.linalg.eigvalsh(torch.cov(flat.T, correction=0))[-1]), rel=0.1
    )


def test_gradients_are_those_of_the_loss_written_out() -> None:
    """Of the commitment and of the entropy bonus, whose streamed form must have the gradient of the plain one."""
    vq = quantizer(commitment_weight=0.3, entropy_weight=0.2)
    z = torch.randn(4, 10, 6, requires_grad=True)
    vq(z).terms.loss.backward()
    assert z.grad is not None
    actual = [z.grad.clone(), vq.bank.prototypes.grad.clone()]
    other, codes = z.detach().clone().requires_grad_(), vq.codebook.clone().requires_grad_()
    flat = other.view(40, 6)
    distances = (flat.unsqueeze(1) - codes[0]).square().sum(-1)
    q = (-distances / float(vq.bank.temperature)).softmax(1)
    spread = float(flat.detach().var(0, correction=0).sum())
    mean = q.mean(0)
    loss = 0.3 * (q * distances).sum(1).mean() / spread + 0.2 * (mean * mean.log()).sum()
    torch.testing.assert_close(actual, list(torch.autograd.grad(loss, (other, codes))), rtol=1e-4, atol=1e-6)


def test_the_decoder_reaches_the_encoder_straight_through_or_through_the_assignments() -> None:
    weights = torch.randn(2, 7, 6)
    straight, soft = quantizer(), quantizer(gradient="soft")
    gradients = []
    for vq in (straight, soft):
        z = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (vq(z).quantized * weights).sum().backward()
        assert z.grad is not None
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], weights)
    assert straight.bank.prototypes.grad is None
    assert soft.bank.prototypes.grad is not None
    # Deep inside of the cells the paper's gradient is gone, the other is not. What rounding leaves of it is divided by
    # T: in float32 about a thousandth, on some processors more.
    cold = quantizer(gradient="soft", temperature=1e-5).double()
    z = torch.randn(2, 7, 6, dtype=torch.float64).requires_grad_()
    (cold(z).quantized * weights).sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-9


def test_the_gap_closes_with_the_temperature() -> None:
    gaps = []
    for fraction in (0.5, 0.05, 0.0005):
        vq = quantizer(temperature=fraction)
        gaps.append(
            float(vq(torch.randn(8, 50, 6, generator=torch.Generator().manual_seed(0))).terms.signals["code_gap"])
        )
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_padding_changes_nothing() -> None:
    z, mask = torch.randn(3, 9, 6), torch.rand(3, 9) < 0.6
    full, bare = quantizer(code_dim=3), quantizer(code_dim=3)
    masked = full(z.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    alone = bare(z[mask].unsqueeze(0))
    torch.testing.assert_close(masked.terms.loss, alone.terms.loss)
    torch.testing.assert_close(masked.terms.signals["code_gap"], alone.terms.signals["code_gap"])
    torch.testing.assert_close(masked.quantized[mask], alone.quantized[0])
    assert not masked.quantized[~mask].any()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("code_dim", [None, 3])
def test_padding_has_the_code_minus_one_which_is_decoded_to_zero(code_dim: int | None, heads: int) -> None:
    z, mask = torch.randn(3, 9, 6), torch.rand(3, 9) < 0.6
    vq = quantizer(code_dim=code_dim, num_heads=heads)
    for training in (True, False):
        output = vq.train(training)(z.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
        assert torch.equal(output.indices.view(3, 9, heads) == -1, ~mask.unsqueeze(-1).expand(3, 9, heads))
    assert torch.equal(vq.encode(z, mask), output.indices)
    torch.testing.assert_close(vq.decode(output.indices), output.quantized)


@pytest.mark.parametrize("code_dim", [None, 3])
def test_tokens_in_other_units_get_the_same_codes(code_dim: int | None) -> None:
    """By statistics of the batch in training, and by running ones after it."""
    z = torch.randn(8, 40, 6)
    # A projection mixes the dimensions, so that only one unit for all of them is undone behind it.
    units = torch.tensor([0.5, 1.0, 10.0, 5.0, 0.5, 4.0]) if code_dim is None else 50 * torch.ones(6)
    indices = []
    for tokens in (z, 7 + z * units):
        vq = quantizer(embedding_scale="per_dimension", code_dim=code_dim)
        training = vq(tokens)
        evaluated = vq.eval()(tokens)
        assert torch.equal(evaluated.indices, training.indices)  # the first batch is all that was seen
        torch.testing.assert_close(evaluated.quantized, vq.decode(vq.encode(tokens)))
        scaled = vq.scale(tokens if vq.input_projection is None else vq.input_projection(tokens)).reshape(1, 320, -1)
        torch.testing.assert_close(scaled.var(1, correction=0), torch.ones(1, code_dim or 6), rtol=1e-3, atol=1e-3)
        assert torch.equal(evaluated.indices.flatten(), nearest_prototype(scaled, vq.codebook).flatten())
        indices.append(evaluated.indices)
    assert torch.equal(*indices)


def test_encoding_in_training_leaves_the_running_statistics_alone() -> None:
    vq = quantizer(embedding_scale="per_dimension")
    vq(torch.randn(4, 30, 6))
    before = copy.deepcopy(vq.state_dict())
    vq.encode(5 + torch.randn(4, 30, 6))
    assert vq.scale.training
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


@pytest.mark.parametrize("start", ["equal", "far", "duplicates"])
def test_codes_come_back_from_bad_starts(start: str) -> None:
    """With the token-normalized step; under Adam they stay where they are."""
    torch.manual_seed(0)
    z = torch.randn(16, 64, 4)
    used = {}
    for name in ("token_normalized", "adam"):
        vq = SoftVectorQuantizer(4, 16, temperature=0.02, code_update="optimizer")
        codes = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
        if start == "equal":
            codes = codes[:, :1].expand(-1, 16, -1) + 1e-3 * codes
        elif start == "far":
            codes = codes + 100
        else:
            codes = codes[:, :4].repeat(1, 4, 1) + 1e-3 * codes
        vq.bank.set_prototypes(codes)
        optimizer: torch.optim.Optimizer = (
            TokenNormalized([vq.bank.prototypes], lr=0.2).watch(vq)
            if name == "token_normalized"
            else torch.optim.Adam([vq.bank.prototypes], lr=1e-2)
        )
        for _ in range(150):
            optimizer.zero_grad()
            vq(z).terms.loss.backward()
            optimizer.step()
        used[name] = len(vq.encode(z).unique())
    assert used["token_normalized"] == 16
    if start == "far":
        assert used["adam"] < 16


def test_the_step_uses_the_means_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    z, results = torch.randn(4, 20, 6), []
    for known in (True, False):
        vq = quantizer()
        optimizer = TokenNormalized([vq.bank.prototypes], lr=0.3).watch(vq)
        if known:
            monkeypatch.setattr("ddcl_lightning.nn.step_statistics.token_means", None)  # not called
            vq(z)
        else:
            monkeypatch.undo()
            vq.bank(z)
        optimizer.step()
        results.append(vq.codebook)
    torch.testing.assert_close(*results)


def test_state_and_copies(tmp_path: Any) -> None:
    vq = quantizer(num_heads=2)
    vq(torch.randn(4, 20, 6))
    torch.save(vq.state_dict(), tmp_path / "vq.pt")
    other = quantizer(num_heads=2, temperature=0.5)
    other.load_state_dict(torch.load(tmp_path / "vq.pt", weights_only=True))
    z = torch.randn(4, 20, 6)
    for same in (other, copy.deepcopy(vq)):
        torch.testing.assert_close(same(z).quantized, copy.deepcopy(vq)(z).quantized)


def test_bfloat16_autocast_and_tokens() -> None:
    vq = quantizer(code_dim=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, _, (loss, *_) = vq(torch.randn(2, 9, 6))
    assert loss.dtype == torch.float32
    assert torch.isfinite(quantized).all()
    assert quantizer()(torch.randn(2, 9, 6).bfloat16()).quantized.dtype == torch.bfloat16


def test_it_sits_in_a_sequential_model() -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vq = SoftVectorQuantizer(6, 4)

        def forward(self, z: Tensor) -> Tensor:
            return self.vq(z).quantized

    model = nn.Sequential(nn.Linear(3, 6), Codes(), nn.Linear(6, 3))
    assert model(torch.randn(2, 5, 3)).shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 0}, "dim must be at least 1; got 0"),
        ({"num_codes": 0}, "num_codes must be at least 1; got 0"),
        ({"num_heads": 4}, "dim must be divisible by num_heads; got 6 and 4. Set code_dim"),
        (
            {"temperature": 0.0},
            "a temperature must be > 0, one number or one per head; got 0.0. As a fraction of the critical",
        ),
        ({"commitment_weight": -1.0}, "commitment_weight must be >= 0; got -1.0"),
        ({"entropy_weight": math.nan}, "entropy_weight must be None or a finite number; got nan"),
        ({"gradient": "rotate"}, r"gradient must be one of \('straight_through', 'soft'\); got 'rotate'"),
        ({"embedding_scale": "batch"}, "embedding_scale must be one of .*; got 'batch'"),
    ],
)
def test_quantizer_refuses_arguments_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer(**kwargs)


def test_quantizer_refuses_inputs_that_do_not_fit() -> None:
    vq = quantizer()
    for z in (torch.randn(2, 5, 7), torch.randn(2, 3, 4, 5), torch.randn(7)):
        with pytest.raises(
            ValueError, match=r"z must (have its channels, dim = 6, in dim|be a floating-point tensor of)"
        ):
            vq(z)
    with pytest.raises(TypeError, match=r"z must be floating point; got torch.int64"):
        vq(torch.ones(2, 5, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have the shape of z without its channels, \(2, 3, 3\)"):
        vq(torch.randn(2, 6, 3, 3), torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be in \[0, num_codes = 5\), or -1 for padding; got values from 0 to 5"):
        vq.decode(torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match=r"indices must be integers of shape \(N,\), \(B, T\) or \(B, H, W\)"):
        vq.decode(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"shape \(..., num_heads = 2\)"):
        quantizer(num_heads=2).decode(torch.zeros(2, 3, 3, dtype=torch.int64))
