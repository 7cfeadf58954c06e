"""Residual quantization: levels from coarse to fine, prefixes, groups, shared codes and dropped levels."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddcl_lightning import CodebookMetrics, ResidualVectorQuantizer
from ddcl_lightning.functional import nearest_prototype
from tests.processes import results_of_processes

D, K, L = 6, 8, 3
VARIANTS = [{}, {"num_heads": 2}, {"shared_codebook": True}, {"code_dim": 4}, {"level_dropout": 0.5}]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "+".join(variant) or "plain")


def tokens(number: int = 0, size: int = 400) -> Tensor:
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(7))
    return torch.randn(size, D, generator=torch.Generator().manual_seed(number)) @ mix


def trained(steps: int = 60, **kwargs: object) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    rvq = ResidualVectorQuantizer(D, K, L, **kwargs)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(rvq.parameters(), lr=1e-3)
    for number in range(steps):
        quantized, _, terms = rvq(tokens(number))
        optimizer.zero_grad()
        ((quantized - tokens(number)).square().mean() + terms).backward()
        optimizer.step()
    return rvq.eval()


@each_variant
def test_every_level_lowers_the_error_with_all_codes(variant: dict[str, object]) -> None:
    rvq, z = trained(**variant), tokens(1000)
    indices, heads = rvq.encode(z), rvq.num_heads
    assert indices.shape == (400, L * heads)
    prefixes = [rvq.decode(indices[:, : level * heads]).detach() for level in range(1, L + 1)]
    errors = [float((z - prefix).square().mean()) for prefix in prefixes]
    if "code_dim" not in variant:  # whose projection is not trained yet
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.8 * errors[0]
    assert all(len(column.unique()) == K for column in rvq.encode(tokens(3, 4000)).T)
    assert rvq.codebook.shape == (L * heads, K, rvq.codebook.shape[-1])


def test_indices_are_the_nearest_codes_of_the_residuals_written_out() -> None:
    rvq, z = trained(), tokens(1000)
    residual, expected = z, []
    for level in range(L):
        codes = rvq.codebook[level]
        expected.append(nearest_prototype(residual, codes))
        residual = residual - codes[expected[-1]]
    output = rvq(z)
    assert torch.equal(output.indices, torch.stack(expected, -1))
    torch.testing.assert_close(output.quantized, z - residual, rtol=1e-4, atol=1e-5)
    share = residual.square().sum() / (z - z.mean(0)).square().sum()
    torch.testing.assert_close(output.terms.signals[f"level{L}_error"], share, rtol=1e-4, atol=1e-6)
    assert output.terms.decomposition.loss.shape == (L,)


def test_one_gradient_passes_straight_through_the_sum() -> None:
    rvq = trained().train()
    z = tokens(5).requires_grad_()
    weights = torch.randn(400, D)
    quantized = rvq(z).quantized
    (quantized * weights).sum().backward()
    gap, spread = z.detach() - quantized.detach(), z.detach() - z.detach().mean(0)
    weight = rvq.commitment_ratio * weights.norm() / spread.norm()
    torch.testing.assert_close(z.grad, weights + weight * gap, rtol=1e-4, atol=1e-5)
    rvq.eval()
    z.grad = None
    (rvq(z).quantized * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_levels_start_in_order_on_the_residuals() -> None:
    rvq = ResidualVectorQuantizer(D, K, L)
    errors = [float(value) for value in rvq(tokens()).terms.signals.values()]
    assert errors[0] < 0.6
    assert errors == sorted(errors, reverse=True)
    assert all(bool(level.initialized) for level in rvq.levels)
    few = ResidualVectorQuantizer(D, K, L)
    few(tokens(size=6))
    assert not any(bool(level.initialized) for level in few.levels)


def test_dropped_levels_have_no_index_and_go_on_learning() -> None:
    rvq = trained(level_dropout=0.9).train()
    numbers = set()
    for number in range(40):
        output = rvq(tokens(number))
        left_out = (output.indices == -1).all(0)
        numbers.add(L - int(left_out.sum()))
        assert torch.equal(left_out, (output.indices == -1).any(0))
        torch.testing.assert_close(rvq.decode(output.indices), output.quantized, rtol=1e-4, atol=1e-5)
    assert numbers == {1, 2, 3}
    before = rvq.codebook.clone()
    rvq.settle()
    assert (rvq.codebook != before).flatten(1).any(1).all()
    assert not (rvq.eval()(tokens()).indices == -1).any()


def test_padding_is_left_out_by_levels_and_metrics() -> None:
    rvq, z, mask = trained(code_dim=4), tokens(1).view(20, 20, D), torch.rand(20, 20) < 0.5
    output = rvq(z.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    assert torch.equal(output.indices == -1, ~mask.unsqueeze(-1).expand(20, 20, L))
    torch.testing.assert_close(rvq.decode(output.indices), output.quantized)
    assert not rvq.decode(output.indices)[~mask].any()
    metrics = CodebookMetrics(K, L)
    metrics.update(output.indices)
    assert int(metrics.counts.sum()) == L * int(mask.sum())


def test_state_decodes_alike_and_training_goes_on() -> None:
    rvq = trained()
    other = ResidualVectorQuantizer(D, K, L)
    other.load_state_dict(rvq.state_dict())
    assert torch.equal(other.eval().encode(tokens(9)), rvq.encode(tokens(9)))
    before = other.codebook.clone()
    other.train()(tokens(9)).terms.loss.backward()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
    assert 0 < float((other.codebook - before).abs().max()) < float(before.abs().max())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_levels": 0}, "num_levels must be at least 1; got 0"),
        ({"num_codes": 0}, "num_codes must be at least 1; got 0"),
        ({"num_heads": 4}, "dim must be divisible by num_heads; got 6 and 4. Set code_dim"),
        ({"level_dropout": 1.0}, r"level_dropout must be a probability in \[0, 1\); got 1.0"),
        ({"commitment_ratio": -1.0}, "commitment_ratio must be finite and >= 0; got -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualVectorQuantizer(**{"dim": D, "num_codes": K, "num_levels": L, **kwargs})  # type: ignore[arg-type]


def test_indices_that_do_not_fit_are_refused() -> None:
    rvq = ResidualVectorQuantizer(D, K, L)
    with pytest.raises(ValueError, match=r"indices must have shape \(..., 1 to 3\)"):
        rvq.decode(torch.zeros(5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be in \[0, num_codes = 8\)"):
        rvq.decode(torch.full((5, 3), 8))


def _moved_beside_garbage(rank: int) -> Tensor:
    """Objects lie elsewhere in the memory of every process."""
    kept = [torch.nn.Linear(2, 2) for _ in range(50 * rank)]
    codes = []
    for seed in range(4):
        torch.manual_seed(seed)
        rvq = ResidualVectorQuantizer(8, 16, 3)
        kept += [torch.nn.Linear(2, 2) for _ in range(7 * rank)]
        optimizer = torch.optim.SGD(rvq.parameters(), lr=1e-2)
        rows = torch.randn(160, 8, generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            rvq(rows[80 * rank : 80 * rank + 80].requires_grad_()).quantized.square().mean().backward()
            optimizer.step()
        codes.append(rvq.codebook)
    return torch.stack(codes)


def test_processes_move_the_levels_in_one_order(tmp_path: Path) -> None:
    first, second = results_of_processes(tmp_path, _moved_beside_garbage)
    assert torch.equal(first, second)


def test_one_level_is_never_left_out() -> None:
    with pytest.raises(ValueError, match=r"level_dropout must be 0 with one level.* got 0.5"):
        ResidualVectorQuantizer(D, K, 1, level_dropout=0.5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_loaded_state_of_another_size_sets_the_number_of_codes(shared: bool) -> None:
    small = ResidualVectorQuantizer(D, 16, L, shared_codebook=shared)
    rvq = ResidualVectorQuantizer(D, 40, L, shared_codebook=shared)
    rvq.load_state_dict(small.state_dict())
    assert rvq.num_codes == 16
    assert "num_codes=16" in repr(rvq)
    with pytest.raises(ValueError, match=r"indices must be in \[0, num_codes = 16\).*from 30 to 30"):
        rvq.decode(torch.full((5, L), 30))


def test_levels_out_of_range_have_no_bank() -> None:
    rvq = ResidualVectorQuantizer(D, K, L)
    for level in (L, -1):
        with pytest.raises(ValueError, match=rf"level must be in \[0, num_levels = {L}\); got {level}. Count"):
            rvq.bank(level)
