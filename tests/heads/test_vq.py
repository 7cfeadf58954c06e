"""The quantizer of VQ-VAE: nearest codes, straight-through gradient, two losses."""

import pytest
import torch
from tiny import LinearBackbone, loader, quiet_trainer
from torch import Tensor

from ddcl_lightning import Classification, DDCLReadoutModule, find_banks
from ddcl_lightning.heads import VQPooling


def prepared(**options: object) -> tuple[VQPooling, Tensor, Tensor]:
    head = VQPooling(**{"num_codes": 4, "embed_dim": 3, **options})
    torch.nn.init.normal_(head.quantizer.codebook)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()
    return head, torch.randn(3, 5, 3, requires_grad=True), mask


@pytest.mark.parametrize("dim", [None, 2])
def test_vq_gives_the_codes_and_losses_of_the_equations(dim: int | None) -> None:
    head, tokens, mask = prepared(code_dim=dim, commitment_weight=0.5, weight=0.3)
    head.eval()
    readout = head(tokens, mask)
    z = tokens if dim is None else tokens @ head.quantizer.projection.weight.mT
    codes = torch.cdist(z, head.quantizer.codebook.expand(3, -1, -1)).argmin(-1)
    nearest = head.quantizer.codebook[codes]
    squared = (z - nearest).square().sum(-1)[mask].mean()
    torch.testing.assert_close(readout.regularization, 0.3 * 1.5 * squared)
    counts = torch.zeros(4, dtype=torch.long)
    for i in range(3):
        torch.testing.assert_close(readout.pooled[i], nearest[i, mask[i]].mean(0))
        shares = torch.bincount(codes[i, mask[i]], minlength=4)
        torch.testing.assert_close(readout.assignments[i, 0], shares / shares.sum())
        counts += shares
    assert torch.equal(head.quantizer.counts, counts)
    torch.testing.assert_close(readout.tokens[mask], nearest[mask])
    assert bool((readout.tokens[~mask] == 0).all())
    assert readout.assignments.shape == (3, 1, 4)
    assert head.train()(tokens, mask).assignments is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [None, 2])
def test_codes_are_in_the_readout(dim: int | None, training: bool) -> None:
    head, tokens, mask = prepared(code_dim=dim)
    readout = head.train(training)(tokens, mask)
    assert readout.codes.shape == (3, 5, head.num_codebooks)
    assert readout.codes.dtype == torch.int64
    assert readout.tokens.shape[-1] == head.token_dim == (dim or 3)
    torch.testing.assert_close(head.quantizer.codebook[readout.codes[mask].flatten()], readout.tokens[mask])
    assert bool((readout.codes[~mask] == -1).all())
    assert torch.equal(torch.bincount(readout.codes[mask].flatten(), minlength=head.num_codes), head.quantizer.counts)
    assert int(head(tokens).codes.min()) >= 0


def test_gradients_go_where_the_paper_sends_them() -> None:
    head, tokens, _ = prepared(weight=1.0)
    readout = head(tokens)
    upstream = torch.randn_like(readout.pooled)
    (straight,) = torch.autograd.grad((readout.pooled * upstream).sum(), tokens, retain_graph=True)
    # Straight through: what a mean of the tokens themselves would get.
    torch.testing.assert_close(straight, (upstream / 5).unsqueeze(1).expand_as(tokens))
    assert torch.autograd.grad(readout.pooled.sum(), head.quantizer.codebook, retain_graph=True, allow_unused=True) == (
        None,
    )
    by_token, by_code = torch.autograd.grad(readout.regularization, (tokens, head.quantizer.codebook))
    codes = torch.cdist(tokens, head.quantizer.codebook.expand(3, -1, -1)).argmin(-1)
    difference = (tokens - head.quantizer.codebook[codes]).detach() / 15
    torch.testing.assert_close(by_token, 0.25 * 2 * difference)
    expected = torch.zeros_like(head.quantizer.codebook).index_add_(0, codes.flatten(), -2 * difference.flatten(0, 1))
    torch.testing.assert_close(by_code, expected)


def test_kmeans_start_uses_the_valid_tokens_of_the_first_training_batch() -> None:
    head = VQPooling(2, init="kmeans", embed_dim=1)
    tokens = torch.tensor([[[0.0], [0.2], [90.0]], [[10.0], [10.4], [-90.0]]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    head.eval()(tokens, mask)
    assert not bool(head.quantizer.initialized)
    head.train()(tokens, mask)
    assert bool(head.quantizer.initialized)
    torch.testing.assert_close(head.quantizer.codebook.detach().sort(0).values, torch.tensor([[0.1], [10.2]]))
    head(tokens + 5, mask)
    torch.testing.assert_close(head.quantizer.codebook.detach().sort(0).values, torch.tensor([[0.1], [10.2]]))
    again = VQPooling(2, init="kmeans", embed_dim=1)
    again.load_state_dict(head.state_dict())
    again(tokens + 5, mask)
    assert torch.equal(again.quantizer.codebook, head.quantizer.codebook)  # a resumed run is not started again
    with pytest.raises(ValueError, match="num_prototypes must not exceed the number of distinct tokens"):
        VQPooling(5, init="kmeans", embed_dim=1)(tokens, mask)


def test_codes_start_uniformly_within_one_over_k() -> None:
    codebook = VQPooling(10, embed_dim=200).quantizer.codebook.detach()
    assert float(codebook.abs().max()) <= 0.1
    assert float(codebook.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_codes_are_fast_and_no_bank() -> None:
    head = VQPooling(4, code_dim=2, init="kmeans")
    module = DDCLReadoutModule(
        LinearBackbone(), head, Classification(4, quantization_weight=0.0), lr_prototypes=0.05, rho=0.1, lr_task=0.01
    )
    assert find_banks(module) == {}
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader())
    rates = {group["name"]: (group["lr"], group["params"]) for o in trainer.optimizers for group in o.param_groups}
    assert rates["prototypes"][0] == 0.05
    assert rates["prototypes"][1][0] is head.quantizer.codebook
    assert any(p is head.quantizer.projection.weight for p in rates["task"][1])
    assert trainer.callback_metrics["train/regularization"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1; got 0"),
        ({"commitment_weight": -1.0}, "commitment_weight must be >= 0; got -1.0"),
        ({"weight": 0.0}, "weight must be > 0, or the codes would never learn; got 0.0"),
        ({"init": "zeros"}, "init must be one of"),
    ],
)
def test_vq_refuses_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQPooling(**{"num_codes": 4, **options})
