"""Prototypes in the place of MLPs: the layer, the exchange and back, the start from data, distillation."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddcl_lightning import PrototypeBank, find_banks
from ddcl_lightning.adapters.distillation import distill_feedforward, initialize_feedforward
from ddcl_lightning.adapters.feedforward import DDCLFeedForward, ridge_regression
from ddcl_lightning.adapters.insertion import quantization_loss
from ddcl_lightning.adapters.replacement import FeedForwardReplacement, replace_feedforward
from ddcl_lightning.functional import critical_temperature, soft_assign
from tests.tiny import absolute

VOCABULARY, DIM, DEPTH = 40, 16, 3


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,  # so that its MLPs are far from linear
    )
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def vit() -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, img_size=64).eval()


def texts(padding_id: int = 0, batches: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Ids and masks; half of the positions are padding of one id."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(batches):
        ids = torch.randint(5, VOCABULARY, (16, 12), generator=generator)
        mask = torch.arange(12) < torch.randint(2, 13, (16, 1), generator=generator)
        inputs.append({"input_ids": ids.masked_fill(~mask, padding_id), "attention_mask": mask.long()})
    return inputs


def small(dim: int) -> DDCLFeedForward:
    return DDCLFeedForward(dim, 4, num_heads=4, prototype_dim=4)


def output_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(**batch).last_hidden_state
    return hidden[batch["attention_mask"].bool()]


# The layer ---------------------------------------------------------------------------------------


def test_output_is_what_the_formula_says() -> None:
    layer = DDCLFeedForward(6, 5, num_heads=2, prototype_dim=3, temperature=absolute(0.7))
    x = torch.randn(4, 7, 6)
    z = (x @ layer.input_projection.weight.T).unflatten(-1, (2, 3))
    centroids = torch.stack(
        [
            soft_assign(z[..., h, :].flatten(0, 1), layer.bank.prototypes[h], 0.7) @ layer.bank.prototypes[h]
            for h in (0, 1)
        ],
        1,
    )
    assert layer.linear is not None
    expected = centroids.flatten(1) @ layer.output_projection.weight.T + layer.output_projection.bias
    expected = expected.unflatten(0, (4, 7)) + x @ layer.linear.weight.T
    torch.testing.assert_close(layer(x), expected)
    assert layer(x[0, 0]).shape == (6,)


def test_defaults_have_a_quarter_of_the_parameters_of_a_standard_mlp() -> None:
    dim = 384
    layer, whole = DDCLFeedForward(dim), 8 * dim * dim
    assert sum(p.numel() for p in layer.parameters()) == pytest.approx(whole / 4, rel=0.02)
    assert DDCLFeedForward(dim, linear=False).linear is None


def test_padding_takes_no_part() -> None:
    layer = small(DIM)
    x, mask = torch.randn(2, 6, DIM), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    x[0, 4:] = math.nan
    layer(x, mask)
    assert layer.terms is not None
    masked = layer.terms.loss
    layer.eval()(x, mask)[mask].sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters() if p.grad is not None)
    again = small(DIM)
    again.load_state_dict(layer.state_dict())
    again.eval()(x[mask])  # the same tokens without padding
    layer.eval()(x, mask)
    assert again.terms is not None
    torch.testing.assert_close(layer.terms.loss, again.terms.loss)
    assert bool(torch.isfinite(masked).all())


def test_a_feed_forward_layer_loads_the_state_of_another() -> None:
    layer, other = small(DIM), small(DIM)
    layer.start_from(torch.randn(200, DIM), torch.randn(200, DIM))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, DIM)
    torch.testing.assert_close(other.eval()(x), layer.eval()(x), rtol=0, atol=0)
    assert bool(other.bank.initialized)
    layer(x)
    copy.deepcopy(layer)  # terms with a graph cannot be copied


def test_starts_from_k_means_and_least_squares() -> None:
    torch.manual_seed(0)
    centers = 10 * torch.randn(4, 8)
    x = centers.repeat(50, 1) + 0.01 * torch.randn(200, 8)
    layer = DDCLFeedForward(8, 4, num_heads=1, prototype_dim=8, temperature=0.05)
    outcomes = torch.randn(4, 8).repeat(50, 1)
    layer.train().start_from(x, outcomes)
    assert layer.training
    assert layer.bank.temperature_state.covariance is not None
    assert int(layer.bank.temperature_state.covariance.num_batches) == 20  # the least squares have not moved T
    slices = layer.input_projection(centers).detach()
    assert float(torch.cdist(layer.bank.prototypes[0].detach(), slices).min(0).values.max()) < 0.05
    expected = 0.05 * critical_temperature(layer.input_projection(x).unsqueeze(0))
    torch.testing.assert_close(layer.bank.temperature.double(), expected.detach(), rtol=1e-3, atol=0)
    error = (layer.eval()(x).detach() - outcomes).square().mean() / outcomes.var()
    assert float(error) < 0.01


def test_ridge_regression_recovers_a_linear_map() -> None:
    x, weight, bias = torch.randn(100, 5) + 3, torch.randn(2, 5), torch.randn(2)
    slope, offset = ridge_regression(x, x @ weight.T + bias, ridge=1e-12)
    torch.testing.assert_close(slope.float(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offset.float(), bias, rtol=1e-4, atol=1e-4)


# The exchange --------------------------------------------------------------------------------------


def test_bert_and_back() -> None:
    model, batch = bert(), texts(batches=1)[0]
    before, names = output_of(model, batch), list(model.state_dict())
    replacement = replace_feedforward(model, small, blocks=[0, -1])
    assert list(replacement.layers) == ["encoder.layer.0.intermediate", "encoder.layer.2.intermediate"]
    assert isinstance(model.encoder.layer[0].output.dense, nn.Identity)
    assert isinstance(model.encoder.layer[1].output.dense, nn.Linear)
    assert list(find_banks(model)) == [f"{name}.bank" for name in replacement.layers]
    assert not torch.allclose(output_of(model, batch), before)
    # What the block does around the MLP stays: LayerNorm(x + what the layer adds).
    block, x = model.encoder.layer[0], torch.randn(1, 3, DIM)
    replacement.layers["encoder.layer.0.intermediate"].mask = None
    expected = block.output.LayerNorm(x + replacement.layers["encoder.layer.0.intermediate"](x))
    torch.testing.assert_close(block.feed_forward_chunk(x), expected)
    replacement.restore()
    assert list(model.state_dict()) == names
    assert torch.equal(output_of(model, batch), before)
    assert not model._forward_pre_hooks
    replacement.restore()


def test_restores_after_an_error() -> None:
    model, batch = bert(), texts(batches=1)[0]
    before = output_of(model, batch)
    with pytest.raises(RuntimeError, match="600"), replace_feedforward(model, small):
        model(input_ids=torch.ones(1, 600, dtype=torch.int64))  # more tokens than positions
    assert torch.equal(output_of(model, batch), before)


def test_vit_and_back() -> None:
    model, images = vit(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_features(images)
        with replace_feedforward(model) as replacement:
            assert list(replacement.layers) == [f"blocks.{i}.mlp" for i in range(len(model.blocks))]
            reports = distill_feedforward(replacement, [(torch.rand(8, 3, 64, 64), torch.zeros(8))], steps=2)
            assert [report.name for report in reports] == list(replacement.layers)
            assert not torch.allclose(model.forward_features(images), before)
        assert torch.equal(model.forward_features(images), before)


@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "vit"])
def test_finds_the_mlps_of_other_models(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "distilbert": ("DistilBert", {"dim": DIM, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40}),
        "gpt2": (
            "GPT2",
            {"n_embd": DIM, "n_layer": 2, "n_head": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1},
        ),
        "vit": (
            "ViT",
            {
                "hidden_size": DIM,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 32,
            },
        ),
    }
    name, config = sizes[kind]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval()
    inputs = (
        {"pixel_values": torch.rand(2, 3, 32, 32)} if kind == "vit" else {"input_ids": torch.randint(2, 40, (2, 5))}
    )
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with replace_feedforward(model, small) as replacement:
            assert len(replacement.layers) == 2
            distill_feedforward(replacement, [inputs], steps=1)
            assert not torch.allclose(model(**inputs).last_hidden_state, before)
        assert torch.equal(model(**inputs).last_hidden_state, before)


def test_takes_modules_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8)))
    x = torch.randn(5, 3)
    before = model(x)
    with replace_feedforward(model, small, blocks=["1"]) as replacement:
        assert isinstance(model[1], DDCLFeedForward)
        assert replacement.mask is None
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_device_dtype_and_mode_follow_the_model() -> None:
    model = bert().double().train()
    replacement = replace_feedforward(model, small)
    layer = next(iter(replacement.layers.values()))
    assert layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert model(**texts(batches=1)[0]).last_hidden_state.dtype == torch.float64
    model.float().eval()
    replacement.restore()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())


def test_the_replaced_model_saves_loads_and_copies() -> None:
    model, other, batch = bert(), bert(), texts(batches=1)[0]
    distill_feedforward(replace_feedforward(model, small), texts(), steps=2)
    replace_feedforward(other, small)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(other, batch), output_of(model, batch))
    twin = copy.deepcopy(model)
    assert torch.equal(output_of(twin, batch), output_of(model, batch))


def test_the_mask_of_the_model_reaches_the_loss_terms() -> None:
    losses = []
    for padding_id in (0, 7):
        model = bert()
        torch.manual_seed(1)
        replace_feedforward(model, small)
        model(**texts(padding_id, batches=1)[0])
        losses.append(float(quantization_loss(model).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_task_trains_through_it() -> None:
    model, batch = bert(), texts(batches=1)[0]
    replace_feedforward(model, small, blocks=[1])
    loss = model(**batch).last_hidden_state.square().mean() + 0.1 * quantization_loss(model)
    loss.backward()
    bank = model.encoder.layer[1].intermediate.bank
    assert isinstance(bank, PrototypeBank)
    assert bank.prototypes.grad is not None
    assert float(bank.prototypes.grad.abs().max()) > 0


# From data -----------------------------------------------------------------------------------------


def errors(replacement: FeedForwardReplacement, batches: list[dict[str, Tensor]], reference: list[Tensor]) -> float:
    outputs = [output_of(replacement.model, batch) for batch in batches]
    return float(sum((f - r).square().sum() for f, r in zip(outputs, reference, strict=True)))


def test_start_and_distillation_bring_the_model_back() -> None:
    model, batches = bert(), texts(batches=20)
    reference = [output_of(model, batch) for batch in batches]
    torch.manual_seed(0)
    replacement = replace_feedforward(model, small)
    untrained = errors(replacement, batches, reference)
    initialize_feedforward(replacement, batches, max_tokens=1000)
    assert all(bool(bank.initialized) for bank in find_banks(model).values())
    started = errors(replacement, batches, reference)
    reports = distill_feedforward(replacement, batches, steps=200, initialize=False)
    assert started < 0.1 * untrained
    assert errors(replacement, batches, reference) < 0.9 * started
    assert all(report.error < 0.9 * report.start < 0.9 for report in reports)


def test_layers_start_from_what_their_mlp_sees() -> None:
    model, batches = bert(), texts()
    inputs = []
    hook = model.encoder.layer[2].intermediate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        output_of(model, batch)
    hook.remove()
    tokens = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(inputs, batches, strict=True)])
    replacement = replace_feedforward(model, lambda dim: DDCLFeedForward(dim, 3, num_heads=1, prototype_dim=dim))
    initialize_feedforward(replacement, batches)
    layer = replacement.layers["encoder.layer.2.intermediate"]
    assert isinstance(layer, DDCLFeedForward)
    # Each prototype of k-means is the mean of the tokens that are nearest to it.
    z = layer.input_projection(tokens).detach()
    codes = layer.bank.encode(z)[:, 0]
    means = torch.stack([z[codes == k].mean(0) for k in range(3)])
    torch.testing.assert_close(layer.bank.prototypes[0].detach(), means, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_does_not_count_in_distillation(sequential: bool) -> None:
    layers = []
    for padding_id in (0, 7):
        model = bert()
        torch.manual_seed(1)
        replacement = replace_feedforward(model, small)
        reports = distill_feedforward(replacement, texts(padding_id), steps=5, sequential=sequential)
        valid = sum(int(batch["attention_mask"].sum()) for batch in texts())
        assert reports[0].tokens == valid - int(0.1 * valid)
        layers.append(replacement.layers["encoder.layer.2.intermediate"].state_dict())
    for name, value in layers[0].items():
        torch.testing.assert_close(value, layers[1][name], rtol=1e-3, atol=1e-3)


def test_what_the_layers_are_trained_on() -> None:
    """Sequential: what the replaced model gives them. Otherwise: what the original gave."""
    reports = {}
    for sequential in (True, False):
        model = bert()
        torch.manual_seed(1)
        replacement = replace_feedforward(model, small, blocks=[0, 2])
        reports[sequential] = distill_feedforward(replacement, texts(), steps=5, sequential=sequential)
    assert reports[True][0] == reports[False][0]
    assert reports[True][1] != reports[False][1]


def test_distillation_leaves_the_rest_alone() -> None:
    model, batches = bert(), texts()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with replace_feedforward(model, small, blocks=[1]) as replacement:
        distill_feedforward(replacement, batches, steps=3)
        assert all(module.training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        assert not next(iter(model.encoder.layer[0].intermediate._forward_pre_hooks), None)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.other = nn.ModuleList([self.mlp])


def restored() -> FeedForwardReplacement:
    replacement = replace_feedforward(bert(), small)
    replacement.restore()
    return replacement


ONE = small(DIM)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "dim": (lambda: DDCLFeedForward(0), "dim must be at least 1; got 0"),
    "prototypes": (lambda: DDCLFeedForward(8, 0), "num_prototypes must be at least 1; got 0"),
    "heads": (lambda: DDCLFeedForward(8, num_heads=0), "num_heads must be at least 1; got 0"),
    "prototype_dim": (lambda: DDCLFeedForward(8, prototype_dim=0), "dim must be at least 1; got 0"),
    "tokens": (lambda: small(8)(torch.randn(2, 3, 7)), r"dim = 8; got shape \(2, 3, 7\)"),
    "targets": (lambda: small(8).start_from(torch.randn(9, 8), torch.randn(9, 7)), r"\(9, 8\); got \(9, 7\)"),
    "nan targets": (
        lambda: small(8).start_from(torch.randn(9, 8), torch.full((9, 8), math.nan)),
        "targets must be finite",
    ),
    "few tokens": (lambda: small(8).start_from(torch.randn(3, 8)), "4 prototypes for 3 distinct"),
    "no mlp": (lambda: replace_feedforward(nn.Linear(3, 3)), "no MLP was found in Linear: looked for .*'mlp'.*names"),
    "text": (lambda: replace_feedforward(bert(), blocks="last"), "'all', or a list of numbers or names; got 'last'"),
    "number": (lambda: replace_feedforward(bert(), blocks=[3]), r"in \[-3, 2\] for this model; got 3"),
    "twice": (lambda: replace_feedforward(bert(), blocks=[2, -1]), r"each once; got \[2, -1\]"),
    "none": (lambda: replace_feedforward(bert(), blocks=[]), r"at least one block.*got \[\]"),
    "name": (lambda: replace_feedforward(bert(), blocks=["mlp"]), "name modules of the model; got 'mlp'"),
    "half": (lambda: replace_feedforward(bert(), blocks=["encoder.layer.0.intermediate"]), "maps 16 to 64.*Number the"),
    "no linear": (lambda: replace_feedforward(bert(), blocks=["encoder.layer.0.output.LayerNorm"]), "has none"),
    "mask": (lambda: replace_feedforward(bert(), mask="padding"), "argument of BertModel.forward; got 'padding'"),
    "shared": (lambda: replace_feedforward(Shared()), "one name to be replaced; these share theirs: mlp, other.0"),
    "same": (lambda: replace_feedforward(bert(), lambda dim: ONE), "new module at each call"),
    "steps": (lambda: distill_feedforward(replace_feedforward(bert()), texts(), steps=0), "steps must be .*got 0"),
    "lr": (lambda: distill_feedforward(replace_feedforward(bert()), texts(), lr=0.0), "lr must be > 0; got 0.0"),
    "iterator": (
        lambda: distill_feedforward(replace_feedforward(bert()), iter(texts())),
        "readable once per block with sequential=True; got a list_iterator",
    ),
    "nothing": (lambda: distill_feedforward(replace_feedforward(bert()), []), "no valid token"),
    "restored": (lambda: distill_feedforward(restored(), texts()), "must be in place; got one that was restored"),
    "no start": (
        lambda: distill_feedforward(replace_feedforward(bert(), lambda dim: nn.Linear(dim, dim)), texts(), steps=1),
        "must have start_from.*got a Linear. Set initialize=False",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_replacement_and_distillation_refuse_what_does_not_fit(case: str) -> None:
    action, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        action()


def test_restoring_out_of_order_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 8)))
    first = replace_feedforward(model, small, blocks=["0"])
    second = replace_feedforward(model, lambda dim: nn.Linear(dim, dim), blocks=["0"])
    with pytest.raises(RuntimeError, match=r"no longer what this replacement put there.*Restore later"):
        first.restore()
    second.restore()
    first.restore()
    assert isinstance(model[0], nn.Sequential)
