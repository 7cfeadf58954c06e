"""What is collected is what is there."""

from typing import Any

import pytest
import torch
from explain_toys import (
    TEXTS,
    PointsDataModule,
    ToyDataModule,
    images,
    points_module,
    text_data,
    texts_module,
    with_prototypes,
)

from ddcl_lightning import (
    Backbone,
    Classification,
    Clustering,
    DDCLReadout,
    DDCLReadoutModule,
    IdentityBackbone,
    Tokens,
)
from ddcl_lightning.explain import collect
from ddcl_lightning.explain.collection import choose_inputs
from ddcl_lightning.heads import Head, ReadoutOutput
from tests.tiny import absolute


def test_nearest_samples_shares_and_classes() -> None:
    explanation = collect(points_module(), PointsDataModule(), examples=3, inputs=0)
    low, high = explanation.heads[0].prototypes
    assert [neighbour.sample.index for neighbour in low.nearest] == [1, 0, 2]  # a tie goes to the smaller place
    assert [neighbour.distance for neighbour in low.nearest] == [0.0, 1.0, 1.0]
    assert [neighbour.sample.index for neighbour in high.nearest] == [10, 9, 11]
    assert (low.samples, low.share, low.token_share, low.dead) == (6, 0.5, 0.5, False)
    assert low.weight == pytest.approx(0.5)
    assert [(c.name, c.share, c.base) for c in low.classes] == [("low", 1.0, 0.5)]
    assert [c.name for c in high.classes] == ["<i>high</i>"]
    assert explanation.heads[0].metrics == {"usage": 1.0, "perplexity": 2.0, "acc": 1.0, "nmi": 1.0, "ari": 1.0}
    assert explanation.heads[0].temperature == 1.0
    assert (explanation.data, explanation.samples, explanation.tokens, explanation.complete) == ("Points", 12, 12, True)
    assert explanation.model == ["IdentityBackbone", "DDCLReadout", "Clustering"]
    assert (low.words, low.tokens, explanation.inputs, explanation.accuracy) == ([], [], [], None)


def test_the_order_and_size_of_batches_change_nothing() -> None:
    first, other = (collect(points_module(), PointsDataModule(batch_size=size), inputs=4) for size in (5, 12))
    for a, b in zip(first.heads[0].prototypes, other.heads[0].prototypes, strict=True):
        assert [n.sample.index for n in a.nearest] == [n.sample.index for n in b.nearest]
        assert a.weight == pytest.approx(b.weight)
    assert [view.sample.index for view in first.inputs] == [view.sample.index for view in other.inputs]


def test_dead_prototypes_are_dead() -> None:
    module = with_prototypes(points_module(), [[50.0, 0.0], [9e3, 0.0]])
    alive, dead = collect(module, PointsDataModule(), inputs=0).heads[0].prototypes
    assert (alive.dead, dead.dead) == (False, True)
    assert (dead.samples, dead.weight, dead.classes) == (0, 0.0, [])
    assert len(dead.nearest) == 5


def test_every_head_has_its_own_view() -> None:
    explanation = collect(points_module(heads=2), PointsDataModule(), inputs=1)
    first, second = explanation.heads
    assert [prototype.samples for prototype in first.prototypes] == [6, 6]
    assert [prototype.samples for prototype in second.prototypes] == [12, 0]
    assert second.prototypes[1].dead
    assert explanation.inputs[0].shares.shape == (2, 2)


def test_inputs_have_shares_labels_and_predictions() -> None:
    module = points_module(Classification(2))
    with torch.no_grad():
        module.task.classifier.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))  # type: ignore[union-attr,operator]
        module.task.classifier.bias.copy_(torch.tensor([3.5, 0.0]))  # type: ignore[union-attr,operator]
    module.head.attention.bank.set_temperature(absolute(100.0))  # type: ignore[union-attr,operator]
    explanation = collect(module, PointsDataModule(), indices=[9, 4])
    assert [view.sample.index for view in explanation.inputs] == [9, 4]
    assert [(view.sample.label, view.predicted, view.wrong) for view in explanation.inputs] == [
        ("<i>high</i>", "<i>high</i>", False),
        ("low", "low", False),
    ]
    x = torch.tensor([[4.0, 0.0]])
    expected = torch.softmax(-torch.cdist(x, torch.tensor([[1.0, 0.0], [104.0, 0.0]])).square() / 100, 1)
    assert explanation.inputs[1].shares[0] == pytest.approx(expected[0].numpy(), abs=1e-6)
    assert explanation.accuracy == 1.0
    with torch.no_grad():
        module.task.classifier.bias.copy_(torch.tensor([-3.5, 0.0]))  # type: ignore[union-attr,operator]
    wrong = collect(module, PointsDataModule(), indices=[4])
    assert wrong.inputs[0].wrong
    assert wrong.accuracy == 0.5


def test_tokens_of_texts_words_and_spans() -> None:
    explanation = collect(texts_module(), text_data(), examples=2, indices=[2])
    animals, fruits, rest, far = explanation.heads[0].prototypes
    assert explanation.token_level
    assert explanation.tokens == sum(len(text.split()) + 1 for text in TEXTS)
    assert {word.word for word in animals.words} == {"cat", "dog", "cow"}
    assert {word.word for word in fruits.words} == {"fig", "plum", "pear"}
    assert "the" in {word.word for word in rest.words}
    assert far.dead
    assert far.words == []
    animal = sum(any(a in word for a in ("cat", "dog", "cow")) for text in TEXTS for word in text.split())
    assert animals.token_share == pytest.approx(animal / explanation.tokens)
    marked = [str(n.sample.content)[slice(*n.span)] for n in animals.tokens if n.span]
    assert marked == ["cat", "cat"]
    assert [n.sample.index for n in animals.tokens] == [0, 2]
    assert [(n.sample.index, round(n.share, 3)) for n in animals.strongest] == [(0, 0.333), (2, 0.333)]
    assert far.strongest == []
    (view,) = explanation.inputs
    text = TEXTS[2]
    assert [(text[slice(*token.span)], token.prototype) for token in view.tokens[0]] == [
        *[("the", 2), ("<b>cow</b>", 0), ("and", 2), ("the", 2), ("cat", 0), ("&", 2), ("the", 2), ("dog", 0)]
    ]
    assert all(token.weight > 0.99 for token in view.tokens[0])
    assert view.shares[0] == pytest.approx([3 / 9, 0, 6 / 9, 0], abs=1e-3)


def test_texts_read_as_a_whole_have_words_too() -> None:
    module = with_prototypes(texts_module(tokens=False), [[-0.4, -0.5], [0.5, -0.5], [50.0, 50.0], [60.0, 60.0]])
    module.head.attention.bank.set_temperature(absolute(0.01))  # type: ignore[union-attr,operator]
    explanation = collect(module, text_data(), indices=[0])
    assert not explanation.token_level
    animals, fruits = explanation.heads[0].prototypes[:2]
    assert {"cat", "dog", "cow"} <= {word.word for word in animals.words}
    assert {"fig", "plum", "pear"} <= {word.word for word in fruits.words}
    assert "and" not in {word.word for word in (*animals.words, *fruits.words)}  # in both
    assert (animals.tokens, animals.strongest) == ([], [])
    assert explanation.inputs[0].tokens == []


def test_spans_that_do_not_fit_the_tokens_of_the_bank_are_not_used() -> None:
    class Pooled(DDCLReadout):
        def forward(self, tokens: Any, mask: Any = None) -> ReadoutOutput:
            return super().forward(tokens[:, :1])

    module = texts_module()
    head = Pooled(4, temperature=absolute(0.1), embed_dim=2)
    head.load_state_dict(module.head.state_dict())
    module.head = head
    explanation = collect(module, text_data(), inputs=1)
    assert explanation.heads[0].prototypes[0].tokens == []
    assert explanation.inputs[0].tokens == []


def test_padding_on_the_left_is_aligned() -> None:
    module = texts_module()
    forward = type(module.backbone).forward

    def flipped(batch: Any) -> Tokens:
        values, mask = forward(module.backbone, batch)
        assert mask is not None
        turned = [torch.cat([v[~m], v[m]]) for v, m in zip(values, mask, strict=True)]
        return Tokens(torch.stack(turned), mask.flip(1))

    module.backbone.forward = flipped  # type: ignore[method-assign,assignment]
    animals = collect(module, text_data(), inputs=0).heads[0].prototypes[0]
    assert {word.word for word in animals.words} == {"cat", "dog", "cow"}


def test_modes_weights_and_the_random_state_stay() -> None:
    module = points_module()
    module.train()
    module.backbone.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    collect(module, PointsDataModule())
    assert torch.equal(torch.rand(3), expected)
    assert module.training
    assert not module.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.head.attention.bank._active_observers()  # type: ignore[union-attr]


def test_part_of_the_data() -> None:
    explanation = collect(points_module(), PointsDataModule(batch_size=4), max_samples=7, inputs=0)
    assert (explanation.samples, explanation.complete) == (8, False)
    whole = collect(points_module(), PointsDataModule(batch_size=4), max_samples=12, inputs=0)
    assert (whole.samples, whole.complete) == (12, True)


def test_data_without_labels_places_or_pictures() -> None:
    class Bare(ToyDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.rows.content, batch_size=5)  # type: ignore[arg-type]

        predict_dataloader = train_dataloader

    explanation = collect(points_module(Clustering()), Bare(PointsDataModule().rows.content, []), inputs=2)
    assert set(explanation.heads[0].metrics) == {"usage", "perplexity"}
    assert explanation.heads[0].prototypes[0].nearest[0].sample.index == 1
    assert explanation.heads[0].prototypes[0].nearest[0].sample.content is None
    assert all(view.sample.label is None for view in explanation.inputs)


def test_pictures_of_the_batch_serve_where_the_data_module_shows_none() -> None:
    class Flat(Backbone):
        embed_dim = 64

        def forward(self, batch: Any) -> Tokens:
            return Tokens(batch["x"].flatten(1).unsqueeze(1))

    module = DDCLReadoutModule(Flat(), DDCLReadout(2), Clustering(2), rho=0.0)
    explanation = collect(module, ToyDataModule(images(), [0, 1] * 3), inputs=1)
    assert explanation.inputs[0].sample.content.shape == (8, 8)  # type: ignore[union-attr]


def test_sample_of_inputs_is_spread_and_independent_of_the_order() -> None:
    def batches(order: Any, size: int) -> list[dict[str, Any]]:
        return [{"x": rows.float().unsqueeze(1), "index": rows} for rows in torch.as_tensor(order).split(size)]

    places = [place for place, _, _ in choose_inputs(batches(range(1000), 64), 50, None, 10)]
    assert places == sorted(places)
    assert len(places) == 50
    assert 300 < sum(places) / 50 < 700
    mixed = torch.randperm(1000)
    chosen = choose_inputs(batches(mixed, 7), 50, None, 10)
    assert [place for place, _, _ in chosen] == places
    assert all(batch["x"].tolist() == [[float(place)]] for place, _, batch in chosen)
    assert choose_inputs(batches(range(9), 4), 0, None, 10) == []
    assert [place for place, _, _ in choose_inputs(batches(range(9), 4), 1, [7, 2, 7], 10)] == [7, 2]


def test_an_endless_stream_is_read_up_to_the_limit() -> None:
    def endless() -> Any:
        number = 0
        while True:
            yield {"x": torch.zeros(4, 1), "index": torch.arange(4 * number, 4 * number + 4)}
            number += 1

    assert len(choose_inputs(endless(), 3, None, 100)) == 3
    assert choose_inputs(endless(), 3, [50], 100)[0][0] == 50
    with pytest.raises(ValueError, match=r"\[250\] are not among the 100 samples"):
        choose_inputs(endless(), 3, [250], 100)


class WithoutBank(Head):
    def build(self, embed_dim: int) -> None:
        super().build(embed_dim)
        self.pooled_dim = embed_dim

    def forward(self, tokens: Any, mask: Any = None) -> ReadoutOutput:
        return ReadoutOutput(tokens, tokens.mean(1))


class TwoLoaders(PointsDataModule):
    def train_dataloader(self) -> Any:
        return [super().train_dataloader()] * 2


def test_collect_refuses_arguments_out_of_range_and_heads_without_prototypes() -> None:
    module, data = points_module(), PointsDataModule()
    bankless = DDCLReadoutModule(
        IdentityBackbone(2), WithoutBank(), Classification(2, quantization_weight=0.0), rho=0.0
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"module": bankless}, "head WithoutBank has no prototypes. Use a head with a prototype bank"),
        ({"examples": 0}, "examples must be at least 1; got 0"),
        ({"inputs": -1}, "inputs must be at least 0; got -1"),
        ({"max_samples": 0}, "max_samples must be at least 1; got 0"),
        ({"indices": [3, -2]}, "indices must be places in the data, >= 0; got -2"),
        ({"indices": [3, 99, 12]}, r"\[12, 99\] are not among the 12 samples"),
        ({"datamodule": TwoLoaders()}, "train_dataloader of the data module must give one data loader.*got list"),
        ({"datamodule": ToyDataModule([], [])}, "gave no batch|num_samples"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            collect(**{"module": module, "datamodule": data, **arguments})


def test_examples_are_members_or_marked() -> None:
    module = with_prototypes(points_module(), [[1.0, 0.0], [3.9, 0.0]])
    first, second = collect(module, PointsDataModule(), examples=4, inputs=0).heads[0].prototypes
    assert [n.sample.index for n in first.nearest] == [1, 0, 2]
    assert [n.sample.index for n in second.nearest] == [4, 3, 5, 6]
    assert all(n.member for n in (*first.nearest, *second.nearest))
    far = with_prototypes(points_module(), [[50.0, 0.0], [9e3, 0.0]])
    _, dead = collect(far, PointsDataModule(), inputs=0).heads[0].prototypes
    assert not any(n.member for n in dead.nearest)


def test_nearest_tokens_are_a_prototypes_own() -> None:
    explanation = collect(texts_module(), text_data(), examples=3, inputs=0)
    for prototype in explanation.heads[0].prototypes:
        assert all(neighbour.member is not prototype.dead for neighbour in prototype.tokens)


def test_positions_are_principal_components() -> None:
    head = collect(points_module(), PointsDataModule(), inputs=0).heads[0]
    assert head.positions is not None
    assert head.explained == pytest.approx(1.0)
    assert abs(head.positions[0, 0] - head.positions[1, 0]) == pytest.approx(103.0)
    assert head.positions[:, 1] == pytest.approx([0.0, 0.0])
