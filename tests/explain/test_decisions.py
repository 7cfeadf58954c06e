"""Predictions as sums: what is collected and what is printed adds up to the logits of the model."""

import re
from decimal import Decimal
from typing import Any

import pytest
import torch
from explain_toys import PointsDataModule, ToyDataModule, Words, images, points_module, text_data, with_prototypes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ddcl_lightning import (
    Classification,
    DDCLReadout,
    DDCLReadoutModule,
    HierarchicalReadout,
    IdentityBackbone,
    PatchBackbone,
)
from ddcl_lightning.explain import Explanation, collect, render
from ddcl_lightning.explain.signed import MINUS, apportioned, digits_for, level, signed
from ddcl_lightning.heads import Head
from ddcl_lightning.tasks import Task
from tests.tiny import absolute

HEADS: dict[str, Any] = {
    "histogram": {"pooling": "histogram"},
    "both": {"pooling": "both", "num_heads": 2},
    "centroid": {"pooling": "centroid"},
    "residual": {"pooling": "centroid", "residual": True},
    "slots": {"pooling": "slots"},
    "slots of two heads": {"pooling": "slots", "num_heads": 2},
    "tokens_histogram": {"pooling": "tokens_histogram"},
    "salience": {"pooling": "histogram", "token_weights": "salience"},
    "mass": {"pooling": "both", "token_weights": "mass"},
    "mean": {"pooling": "both", "tokens": "mean"},
}
READS_SHARES = ("histogram", "both", "centroid", "salience", "mass", "mean", "levels")


def head_of(name: str) -> Head:
    if name.startswith("levels"):
        return HierarchicalReadout([7, 3], pooling="all" if name == "levels, all" else "last")
    return DDCLReadout(7, prototype_dim=2, temperature=absolute(0.3), **HEADS[name])


def words_module(name: str, task: Task | None = None) -> DDCLReadoutModule:
    """A random classifier of three classes on words."""
    torch.manual_seed(3)
    module = DDCLReadoutModule(Words(), head_of(name), task or Classification(3)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.fixture(scope="module", params=[*HEADS, "levels", "levels, all"])
def case(request: pytest.FixtureRequest) -> tuple[str, DDCLReadoutModule, Explanation]:
    module = words_module(request.param)
    return request.param, module, collect(module, text_data(), inputs=8, evaluated=12)


def logits_of(module: DDCLReadoutModule, index: int) -> Tensor:
    batch = next(iter(DataLoader([text_data().rows[index]])))
    with torch.no_grad():
        logits: Tensor = module.task.logits(module(batch))[0]  # type: ignore[operator]
    return logits


def number(text: str) -> Decimal:
    return Decimal(text.replace(MINUS, "-").replace(",", ""))


def test_terms_and_bias_are_the_difference_of_two_logits(case: Any) -> None:
    _, module, explanation = case
    assert explanation.no_contributions is None
    for view in explanation.inputs:
        decision, logits = view.decision, logits_of(module, view.sample.index)
        first, second = logits.topk(2).values.tolist()
        assert (decision.predicted, decision.runner_up) == tuple(str(int(c)) for c in logits.topk(2).indices)
        total = decision.bias + decision.terms.sum() + (decision.below or 0.0)
        assert total == pytest.approx(first - second, abs=1e-4)
        assert decision.margin == pytest.approx(first - second, abs=1e-4)
        assert decision.probability == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_numbers_on_the_page_add_up(case: Any) -> None:
    _, module, explanation = case
    html = render(explanation)
    cards = re.findall(r'<article class="card input.*?</article>', html, re.DOTALL)
    assert len(cards) == 8
    for card, view in zip(cards, explanation.inputs, strict=True):
        values = [number(text) for text in re.findall(r'<tr class="term">.*?class="value">([^<]*)<', card)]
        (total,) = re.findall(r'<tr class="total">.*?class="value">([^<]*)<', card)
        assert len(values) >= 3
        assert sum(values) == number(total)
        first, second = logits_of(module, view.sample.index).topk(2).values.tolist()
        assert float(number(total)) == pytest.approx(first - second, abs=0.006)
        # Every printed term is the term, within one last place.
        decision = view.decision
        terms = sorted(decision.terms.sum(0).flatten().tolist(), key=lambda x: -abs(x))
        for printed, term in zip(values[: min(5, len(terms))], terms, strict=False):
            assert float(printed) == pytest.approx(term, abs=0.0101)
        special = re.findall(r'legend special">Special tokens: (.*?)</div>', card)
        if special:
            words = re.sub(r"<[^>]*>", " ", special[0])
            shown = [number(x) for x in re.findall(rf" ([+{MINUS}]?\d[\d,]*\.\d+)", words)]
            below = 2 if decision.below is not None else 1
            assert sum(shown[:-1]) == shown[-1] == sum(values[:-below])


def test_special_tokens_are_shown_with_their_terms(case: Any) -> None:
    name, _, explanation = case
    html = render(explanation)
    if name in ("mean", "levels", "levels, all"):  # one token per sample, which stands for all
        assert all(view.decision.places == [] for view in explanation.inputs)
        return
    assert html.count("Special tokens:") == 8
    for view in explanation.inputs:
        assert view.decision.places[0].name == "special token"
        assert len(view.decision.places) == len(view.decision.terms) == 1 + len(str(view.sample.content).split())


def test_shares_stand_beside_a_prediction_only_where_it_reads_them(case: Any) -> None:
    name, _, explanation = case
    cards = "".join(re.findall(r'<article class="card input.*?</article>', render(explanation), re.DOTALL))
    reads = name in READS_SHARES
    assert explanation.reads_shares is reads
    assert ("Shares, which the prediction reads" in cards) is reads
    assert ('class="bar"' in cards) is reads
    assert not re.search(r'class="without">[^<]*</span>\s*,', cards)  # it would stand apart from the chip
    if not reads:
        assert not re.search(r"\d+\xa0% <a[^>]*>prototype", cards)


def test_knock_outs_are_those_of_the_head(case: Any) -> None:
    name, module, explanation = case
    html = render(explanation)
    if name.startswith("levels"):
        assert "without it" not in html
        assert explanation.effects == (12, 0)
        return
    for view in explanation.inputs[:3]:
        batch = next(iter(DataLoader([text_data().rows[view.sample.index]])))
        tokens, mask = module.backbone(batch)
        without = module.head.logits_without(tokens, mask, module.task.classifier)
        chosen = int(logits_of(module, view.sample.index).argmax())
        expected = without.softmax(-1)[0, ..., chosen]
        torch.testing.assert_close(torch.tensor(view.decision.without).float(), expected.detach(), atol=1e-4, rtol=0)
    decision = explanation.inputs[0].decision
    pairs = [(h, k) for h in range(decision.terms.shape[1]) for k in range(7)]
    head, k = max(pairs, key=lambda at: abs(decision.terms.sum(0)[at]))
    assert f"without it {decision.probability:.2f} → {decision.without[head, k]:.2f}" in html


def test_means_over_inputs_are_means_of_terms(case: Any) -> None:
    name, module, _ = case
    if name == "levels, all":
        return
    rows = [text_data().rows[index] for index in range(24)]
    total = 0.0
    for row in rows:
        tokens, mask = module.backbone(next(iter(DataLoader([row]))))
        total = total + module.head.contributions(tokens, mask, module.task.classifier)[0].sum(0).detach()  # type: ignore[arg-type]
    mean = total / len(rows)  # type: ignore[operator]
    mean = mean - mean.mean(-1, keepdim=True)
    everything = collect(module, text_data(), inputs=0, evaluated=100)
    assert everything.effects[0] == 24
    for head, view in enumerate(everything.heads):
        for k, prototype in enumerate(view.prototypes):
            assert [term.term for term in prototype.speaks] == pytest.approx(mean[head, k].tolist(), abs=1e-4)
            assert sum(term.term for term in prototype.speaks) == pytest.approx(0.0, abs=1e-4)
    assert "Speaks for and against" in render(everything)


def test_learned_weights_of_tokens_are_shown() -> None:
    module = words_module("salience")
    explanation = collect(module, text_data(), inputs=2, evaluated=0)
    for view in explanation.inputs:
        batch = next(iter(DataLoader([text_data().rows[view.sample.index]])))
        expected = module(batch).token_weights[0].detach()
        torch.testing.assert_close(torch.tensor(view.decision.weights).float(), expected)  # type: ignore[union-attr]
    assert "Largest weights of tokens" in render(explanation)
    plain = collect(words_module("histogram"), text_data(), inputs=2, evaluated=0)
    assert "weights of tokens" not in render(plain)


class NoSum(DDCLReadout):
    """A head that keeps what it adds to itself."""

    @property
    def pools_assignments(self) -> bool:
        return False

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        return Head.contributions(self, tokens, mask, classifier)


class WrongSum(DDCLReadout):
    """A head whose contributions are another model's."""

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        return 2 * super().contributions(tokens, mask, classifier)


class NotLinear(Classification):
    """A task whose classifier is a network."""

    def build(self, head: Head) -> None:
        self.classifier = nn.Sequential(nn.Linear(head.pooled_dim, 3), nn.Tanh())  # type: ignore[assignment]

    def logits(self, readout: Any) -> Tensor:
        scores: Tensor = self.classifier(readout.pooled)
        return scores


@pytest.mark.parametrize(
    ("head", "task", "sentence"),
    [
        (NoSum, None, "NoSum has no exact contributions: its summary is not a sum over tokens and prototypes."),
        (WrongSum, None, "The contributions of WrongSum do not add up to the logits"),
        (DDCLReadout, NotLinear, "NotLinear has no linear classifier of the pooled readout"),
    ],
)
def test_a_prediction_that_is_no_sum_gets_a_sentence_and_no_shares(head: Any, task: Any, sentence: str) -> None:
    module = DDCLReadoutModule(Words(), head(4), (task or Classification)(3)).eval()
    explanation = collect(module, text_data(), inputs=3)
    assert all(view.decision is None for view in explanation.inputs)
    html = render(explanation)
    assert "No reasons are given for the predictions." in html
    assert sentence in html
    cards = "".join(re.findall(r'<article class="card input.*?</article>', html, re.DOTALL))
    assert "Predicted <b>" in cards
    assert "prototype" not in cards
    assert "%" not in cards
    assert explanation.faithfulness is None


class Copies(ToyDataModule):
    """Inputs of 1, 9 and 99 tokens at one prototype, and one token at another: to slots they are one input."""

    class_names = ("neg", "pos")

    def __init__(self) -> None:
        super().__init__([], [])

    def batches(self) -> list[dict[str, Tensor]]:
        rows = []
        for copies in (1, 9, 99):
            x, mask = torch.zeros(1, 100, 4), torch.zeros(1, 100, dtype=torch.bool)
            x[0, :copies, 0], x[0, copies, 1], mask[0, : copies + 1] = 1.0, 1.0, True
            rows.append({"x": x, "mask": mask, "y": torch.tensor([0])})
        return rows

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches(), batch_size=None)

    predict_dataloader = train_dataloader


def test_slots_that_predict_alike_are_not_explained_by_different_shares() -> None:
    torch.manual_seed(0)
    head = DDCLReadout(2, pooling="slots", temperature=absolute(1e-3))
    module = with_prototypes(
        DDCLReadoutModule(IdentityBackbone(4), head, Classification(2)).eval(), torch.eye(4)[:2].tolist()
    )
    explanation = collect(module, Copies(), inputs=3)
    assert [round(float(view.shares[0, 0]), 2) for view in explanation.inputs] == [0.5, 0.9, 0.99]
    decisions = [view.decision for view in explanation.inputs]
    assert len({round(decision.probability, 6) for decision in decisions if decision}) == 1
    cards = re.findall(r'<article class="card input.*?</article>', render(explanation), re.DOTALL)
    assert len(cards) == 3
    tables = [re.findall(r'class="value">([^<]*)<', card) for card in cards]
    assert tables[0] == tables[1] == tables[2]  # what explains is as equal as what is predicted
    for card in cards:
        assert "%" not in card.replace('style="', "").split("</table>")[1]
        for share in ("50", "90", "99", "80"):
            assert not re.search(rf"\b{share}\xa0%", card)
        assert "bar" not in re.findall(r'class="(\w+)"', card)
    assert "keeps something else of a sample than its shares" in render(explanation)


def test_tokens_of_images_lie_over_the_picture() -> None:
    torch.manual_seed(0)
    module = DDCLReadoutModule(PatchBackbone(1, 4), DDCLReadout(3, pooling="slots"), Classification(2)).eval()
    explanation = collect(module, ToyDataModule(images(), [0, 1] * 3), inputs=2)
    decision = explanation.inputs[0].decision
    assert decision is not None
    assert decision.grid == (0, 2, 2)
    assert [place.name for place in decision.places][1:3] == ["row 0, column 1", "row 1, column 0"]
    html = render(explanation)
    assert html.count('<svg class="map"') == 2
    assert html.count('<rect class="cell"') == 2 * 4
    terms = decision.terms.sum((1, 2))
    assert f"<title>row 1, column 1: {signed(terms[3], digits_for(terms.tolist()))}</title>" in html


def test_tokens_without_a_grid_are_a_line() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(2, pooling="slots"), Classification(2)).eval()
    assert "Biggest tokens: " in render(collect(module, Copies(), inputs=1))


def test_a_clustering_keeps_its_page() -> None:
    html = render(collect(points_module(), PointsDataModule(), inputs=2))
    assert "What each input is made of" in html
    assert "Contribution" not in html
    assert 'class="bar"' in html


def test_printed_numbers_sum_to_the_printed_total() -> None:
    assert apportioned([1 / 3, 1 / 3, 1 / 3], 2) == [0.34, 0.33, 0.33]
    assert apportioned([-1 / 3, -1 / 3, -1 / 3], 2) == [-0.33, -0.33, -0.34]
    assert apportioned([0.004, 0.004], 2, total=0.0) == [0.0, 0.0]
    assert apportioned([0.006, 0.002], 2, total=0.0) == [0.0, 0.0]
    assert sum(apportioned([0.5, -0.25], 2, total=0.24)) == pytest.approx(0.24)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        values = torch.randn(7, generator=generator, dtype=torch.float64).tolist()
        printed = apportioned(values, 2)
        assert round(sum(printed), 9) == round(sum(values), 2)
        assert all(abs(a - b) < 0.0101 for a, b in zip(printed, values, strict=True))


def test_signs_and_digits() -> None:
    assert [signed(x) for x in (0.314, -0.5, 0.001, -0.001)] == ["+0.31", f"{MINUS}0.50", "0.00", "0.00"]
    assert [digits_for([x]) for x in (12.0, 1.0, 0.5, 0.05, 1e-9, 0.0)] == [2, 2, 3, 4, 6, 2]
    assert [level(x, 1.0) for x in (0.1, 0.2, -1.0)] == [0.0, 0.25, 1.0]
