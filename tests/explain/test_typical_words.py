"""Words of texts, and which of them are typical of a prototype."""

import numpy as np
import pytest

from ddcl_lightning.explain.typical_words import WordMass, words_at, words_of


def test_words_of_a_text() -> None:
    assert words_of("The cat's CAT-like, über-cat 42 a <b> the") == ["the", "cat's", "cat-like", "über-cat"]
    assert words_of("x" * 41) == []


def test_pieces_of_a_word_stand_for_the_word() -> None:
    text = "Unbelievable, it is 42!"
    spans = [(0, 0), (0, 2), (2, 7), (7, 12), (12, 13), (14, 16), (17, 19), (20, 22), (22, 23)]
    assert words_at(text, spans) == [None, *["unbelievable"] * 3, None, "it", "is", None, None]
    assert words_at(text, [(17, 19), (0, 2)]) == ["is", "unbelievable"]
    assert words_at("字" * 60, [(0, 2), (50, 52)]) == ["字字", "字字"]


def test_characteristic_words_are_those_beyond_the_base_rate() -> None:
    mass = WordMass(2)
    for _ in range(50):
        mass.add(["the", "cat", "sat"], np.array([[0.5, 0.5], [1.0, 0.0], [0.7, 0.3]]))
        mass.add(["the", "fig"], np.array([[0.5, 0.5], [0.0, 1.0]]))
    mass.add(["once"], np.array([[1.0, 0.0]]))
    assert [share.word for share in mass.top(0, 9, 1.2)] == ["cat", "sat"]
    assert [share.word for share in mass.top(1, 9, 1.2)] == ["fig"]
    # 50 of the 135 in prototype 0 are cats, and 50 of all 251 words.
    assert mass.top(0, 1, 1.2)[0].lift == pytest.approx((50 / 136) / (50 / 251))
    assert WordMass(2).top(0, 3, 1.0) == []


def test_table_of_words_forgets_the_rarest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddcl_lightning.explain.typical_words.TABLE_ELEMENTS", 1)
    mass = WordMass(1)
    for chunk in range(40):
        rare = [f"rare{chunk}_{i}" for i in range(100)]
        mass.add(["often", *rare], np.ones((101, 1)))
        assert len(mass) <= 1101
    assert mass._counts[mass._rows["often"]] == 40
