"""Texts as vectors without a model: what comes together, what is kept, and what is refused."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from ddcl_lightning import LSABackbone
from ddcl_lightning.backbones import lsa

SUBJECTS = (
    ("oven", "flour", "butter", "recipe", "bake", "sugar", "dough"),
    ("engine", "wheel", "brake", "clutch", "petrol", "gear", "tyre"),
    ("violin", "sonata", "chord", "melody", "choir", "tempo", "opera"),
)


def corpus(size: int = 150) -> tuple[list[str], list[int]]:
    """Texts about three subjects, among words that all of them have."""
    generator = torch.Generator().manual_seed(0)
    labels = [number % 3 for number in range(size)]
    rows = []
    for label in labels:
        words = [SUBJECTS[label][place] for place in torch.randint(7, (4,), generator=generator).tolist()]
        rows.append(f"This is the text about {words[0]} and {words[1]}, or with the {words[2]} of a {words[3]}.")
    return rows, labels


def test_texts_of_a_subject_come_together() -> None:
    rows, labels = corpus()
    backbone = LSABackbone(num_components=8)
    backbone.prepare([{"text": rows[:100]}, {"text": rows[100:]}])
    values, mask = backbone({"text": rows})
    assert mask is None
    assert values.shape == (150, 1, 8)
    torch.testing.assert_close(values.norm(dim=-1), torch.ones(150, 1))
    clusters = KMeans(3, n_init=3, random_state=0).fit_predict(values[:, 0].numpy())
    assert normalized_mutual_info_score(labels, clusters) > 0.9


def test_a_fit_does_not_depend_on_batches_or_order() -> None:
    rows, _ = corpus()
    first, second, third = LSABackbone(4), LSABackbone(4), LSABackbone(4)
    first.fit(rows)
    second.prepare([{"text": rows[start : start + 7]} for start in range(0, 150, 7)])
    third.fit(rows[::-1])
    for other in (second, third):
        assert torch.equal(other.components, first.components)
        assert torch.equal(other.word_weights, first.word_weights)


def test_words_of_all_texts_weigh_nothing_and_unknown_ones_are_zero() -> None:
    backbone = LSABackbone(4)
    backbone.fit(corpus()[0])
    values = backbone({"text": ["This is the text", "zzzz", ""]}).values
    assert not values.any()


def test_components_beyond_those_of_the_texts_are_zero() -> None:
    backbone = LSABackbone(64)
    backbone.fit(["red car", "blue bird", "red bird"])
    values = backbone({"text": ["red car", "blue bird"]}).values
    assert bool(values[..., :3].any())
    assert not values[..., 3:].any()


def test_memory_holds_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsa, "FIT_TEXTS", 30)
    rows, _ = corpus(3000)
    held: list[int] = []
    add = lsa._TextSample.add

    def counting(sample: lsa._TextSample, counts: object) -> None:
        add(sample, counts)  # type: ignore[arg-type]
        held.append(len(sample.rows))

    monkeypatch.setattr(lsa._TextSample, "add", counting)
    backbone = LSABackbone(8)
    backbone.prepare([{"text": rows[start : start + 100]} for start in range(0, 3000, 100)])
    assert max(held) == 30
    # The idf is that of all texts: words of one subject are in about a third of them, each in fewer.
    assert 0 < float(backbone.word_weights[backbone.word_weights > 0].min()) < 9


def test_what_lsa_cannot_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match="LSABackbone is not fitted"):
        LSABackbone(4)({"text": ["a b"]})
    with pytest.raises(ValueError, match="texts must differ in their words to fit LSABackbone; 3 texts have no word"):
        LSABackbone(4).fit(["same words"] * 3)
    with pytest.raises(ValueError, match="num_components must be at least 1; got 0"):
        LSABackbone(0)
