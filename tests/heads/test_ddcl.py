"""The readout pools what the layer returns, over valid tokens only."""

import pytest
import torch
from tiny import absolute
from torch import Tensor

from ddcl_lightning import DDCLReadout, ReadoutOutput, Temperature
from ddcl_lightning.functional import Decomposition, repulsion_energy, soft_assign
from ddcl_lightning.heads.ddcl import Pooling


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 6, generator=g) < 0.6
    mask[:, 0] = True
    return torch.randn(4, 6, 8, generator=g), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pooling", ["centroid", "histogram", "both"])
def test_pools_by_hand(pooling: Pooling, residual: bool, masked: bool) -> None:
    residual = residual and pooling != "histogram"
    head = DDCLReadout(5, num_heads=2, prototype_dim=3, pooling=pooling, residual=residual, embed_dim=8).eval()
    tokens, mask = batch()
    valid = mask if masked else torch.ones_like(mask)
    dirty = tokens.masked_fill(~valid.unsqueeze(-1), torch.nan)
    readout = head(dirty, valid if masked else None)
    layer = head.attention(tokens, valid, need_weights=True)
    for i in range(4):
        centroid = layer.tokens[i, valid[i]].mean(0)
        histogram = layer.weights[i, :, valid[i]].mean(1)
        torch.testing.assert_close(readout.assignments[i], histogram)
        pieces = {"centroid": [centroid], "histogram": [histogram.flatten()], "both": [centroid, histogram.flatten()]}
        torch.testing.assert_close(readout.pooled[i], torch.cat(pieces[pooling]))
    assert readout.pooled.shape[1] == head.pooled_dim
    assert len(readout.loss_terms) == 1
    torch.testing.assert_close(readout.quantization_loss(), layer.terms.loss.sum())


@pytest.mark.parametrize("pooling", ["centroid", "histogram", "both"])
def test_training_and_evaluation_pool_the_same(pooling: Pooling) -> None:
    head = DDCLReadout(5, pooling=pooling, embed_dim=8)
    trained = head(*batch())
    evaluated = head.eval()(*batch())
    assert trained.assignments is None
    assert (trained.token_weights is None) == (pooling == "centroid")  # what is not needed is not stored
    torch.testing.assert_close(trained.pooled, evaluated.pooled)
    torch.testing.assert_close(trained.loss_terms[0].loss, evaluated.loss_terms[0].loss)
    trained.pooled.sum().backward()
    assert head.attention.bank.prototypes.grad is not None


def test_every_parameter_takes_part() -> None:
    for residual in (False, True):
        head = DDCLReadout(5, num_heads=2, residual=residual, embed_dim=8)
        readout = head(*batch())
        (readout.pooled.sum() + readout.quantization_loss()).backward()
        assert all(p.grad is not None for p in head.parameters())  # or plain DDP would wait for it


def test_auto_scale_is_bound_on_request_only() -> None:
    head = DDCLReadout(5, embed_dim=8)
    assert head.attention.scale.mode == "none"
    head.bound_scale()
    assert head.attention.scale.mode == "whiten"
    for chosen in ("none", "total", "per_dimension"):
        head = DDCLReadout(5, embed_dim=8, embedding_scale=chosen)
        head.bound_scale()
        assert head.attention.scale.mode == chosen


def test_parameters_by_role() -> None:
    head = DDCLReadout(5, num_heads=2, residual=True, embed_dim=8)
    assert [id(p) for p in head.prototype_parameters()] == [id(head.attention.bank.prototypes)]
    assert [id(p) for p in head.embedding_parameters()] == [id(head.attention.input_projection.weight)]
    assert DDCLReadout(5, embed_dim=8).embedding_parameters() == []


@pytest.mark.parametrize("temperature", [0.1, absolute(1.0)])
def test_repulsion_is_weighted_and_of_the_scale_of_the_tokens(temperature: float | Temperature) -> None:
    head = DDCLReadout(5, num_heads=2, repulsion=0.3, embed_dim=8, temperature=temperature)
    bank = head.attention.bank
    assert not head.eval()(*batch()).regularization  # no tokens to take a scale from yet
    readout = head.train()(*batch())
    scale = bank.temperature_state.variance.sqrt()
    assert bool((scale > 0).all())
    torch.testing.assert_close(readout.regularization, 0.3 * repulsion_energy(bank.prototypes, scale).sum())
    torch.testing.assert_close(readout.quantization_loss(), readout.loss_terms[0].loss.sum())  # it is not part of L_q
    assert DDCLReadout(5, embed_dim=8)(*batch()).regularization is None


def test_build_takes_the_dimension_of_the_tokens() -> None:
    head = DDCLReadout(5, detach_assignments=True, temperature=0.3)
    with pytest.raises(RuntimeError, match="does not know its input dimension"):
        head(*batch())
    head.build(8)
    built = head.attention
    assert built.bank.detach_assignments
    assert built.bank.temperature_state.value.tolist() == [pytest.approx(0.3)]
    head.build(8)
    assert head.attention is built
    with pytest.raises(ValueError, match="embed_dim of the head is 8 but the backbone gives 9"):
        head.build(9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of"),
        ({"repulsion": -1.0}, "repulsion must be >= 0; got -1.0"),
        ({"repulsion": 1.0, "num_prototypes": 1}, "repulsion needs at least 2 prototypes; got num_prototypes = 1"),
        ({"num_heads": 3}, "embed_dim must be divisible by num_heads"),
        ({"embedding_scale": "batch"}, "embedding_scale must be one of"),
    ],
)
def test_ddcl_readout_refuses_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDCLReadout(**{"num_prototypes": 5, "embed_dim": 8, **options})


def test_quantization_loss_sums_levels_and_heads() -> None:
    levels = [Decomposition(torch.tensor(v), torch.tensor(v), torch.tensor(v)) for v in ([1.0, 2.0], [10.0])]
    assert ReadoutOutput(torch.zeros(1), torch.zeros(1), levels).quantization_loss() == 13
    with pytest.raises(ValueError, match="no quantization loss to train on"):
        ReadoutOutput(torch.zeros(1), torch.zeros(1)).quantization_loss()


def test_slots_are_one_summary_per_prototype() -> None:
    head = DDCLReadout(3, num_heads=2, prototype_dim=5, pooling="slots", embed_dim=4, temperature=absolute(2.0))
    tokens, mask = torch.randn(2, 6, 4), torch.arange(6) < torch.tensor([[6], [4]])
    pooled = head(tokens, mask).pooled
    assert pooled.shape == (2, head.pooled_dim) == (2, 2 * 3 * 5)
    bank, projection = head.attention.bank, head.attention.input_projection
    assert projection is not None
    embedded = projection(tokens[1, :4])[:, 5:]
    q = soft_assign(embedded, bank.prototypes[1], 2.0)  # (T, K)
    torch.testing.assert_close(pooled[1, 15:], ((q / q.sum(0)).T @ embedded).flatten())
    pooled.square().sum().backward()
    assert bank.prototypes.grad is not None
    assert bank.prototypes.grad.abs().max() > 0
    assert head(tokens, mask).assignments is None
    assert head.eval()(tokens, mask).assignments.shape == (2, 2, 3)
    torch.testing.assert_close(head(tokens, mask).pooled, pooled)


def test_the_slot_of_a_prototype_far_from_every_token_is_the_nearest_token() -> None:
    """Its assignments underflow to zero, where a plain quotient is 0 / 0."""
    head = DDCLReadout(2, pooling="slots", embed_dim=3, temperature=absolute(0.01))
    head.attention.bank.set_prototypes(torch.stack([torch.zeros(3), torch.full((3,), 1e2)]).unsqueeze(0))
    tokens = torch.randn(1, 7, 3)
    slot = head(tokens).pooled.unflatten(-1, (2, 3))[0, 1]
    nearest = torch.cdist(tokens[0], torch.full((1, 3), 1e2)).argmin()
    torch.testing.assert_close(slot, tokens[0, nearest])


def test_slots_find_a_token_that_a_mean_drowns() -> None:
    """One token in a hundred carries the class; the slot of the prototype next to it shows it undiluted."""
    head = DDCLReadout(2, pooling="slots", embed_dim=2, temperature=absolute(0.5))
    head.attention.bank.set_prototypes(torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]))
    tokens = 0.1 * torch.randn(1, 100, 2)
    tokens[0, 7] = torch.tensor([4.0, 1.0])
    torch.testing.assert_close(head(tokens).pooled[0, 2:], tokens[0, 7], atol=1e-3, rtol=0)
    assert tokens.mean(1).abs().max() < 0.1


def test_slots_refuse_a_residual() -> None:
    with pytest.raises(ValueError, match="residual must be False with pooling='slots'"):
        DDCLReadout(3, pooling="slots", residual=True)
