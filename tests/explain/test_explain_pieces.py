"""The parts of an explanation: words, the nearest of a stream, samples and pictures."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from explain_toys import PointsDataModule, ToyDataModule, images

from ddcl_lightning.explain.nearest import Nearest
from ddcl_lightning.explain.png import data_uri, png_bytes
from ddcl_lightning.explain.samples import MAX_SIDE, Album, class_labels, positions, take, thumbnail, to_image
from ddcl_lightning.explain.typical_words import WordMass, words_at, words_of


def test_nearest_of_a_stream_are_the_nearest_of_all_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 6, (3, 40), generator=generator).double()  # with ties
    order = torch.randperm(40, generator=generator)
    for size in (1, 7, 40):
        nearest: Nearest[int] = Nearest(3, 5)
        for rows in order.split(size):
            nearest.add(distances[:, rows], rows, lambda prototype, row, rows=rows: 100 * prototype + int(rows[row]))
        for prototype in range(3):
            expected = sorted(range(40), key=lambda n: (float(distances[prototype, n]), n))[:5]
            assert [kept - 100 * prototype for _, kept in nearest.of(prototype)] == expected
            assert [distance for distance, _ in nearest.of(prototype)] == [
                float(distances[prototype, n]) for n in expected
            ]


def test_nearest_shows_winners_only_and_leaves_out_infinite_distances() -> None:
    nearest: Nearest[int] = Nearest(1, 2)
    shown: list[int] = []

    def show(prototype: int, row: int) -> int:
        shown.append(row)
        return row

    nearest.add(torch.tensor([[3.0, 1.0, 2.0, torch.inf]]), torch.arange(4), show)
    assert [kept for _, kept in nearest.of(0)] == [1, 2]
    assert sorted(shown) == [1, 2]
    nearest.add(torch.tensor([[9.0]]), torch.tensor([9]), show)
    assert len(shown) == 2
    few: Nearest[int] = Nearest(1, 5)
    few.add(torch.tensor([[torch.inf, 1.0]]), torch.arange(2), show)
    assert few.of(0) == [(1.0, 1)]


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


def test_rows_of_batches() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "text": ["a", "b", "c"], "y": torch.tensor([4, 5, 6]), "scale": 2.0}
    row = take(batch, 1)
    assert row["x"].tolist() == [[2, 3]]
    assert row["text"] == ["b"]
    assert row["y"].tolist() == [5]
    assert row["scale"] == 2.0
    x, y = take((batch["x"], batch["y"]), 2)
    assert (x.tolist(), y.tolist()) == ([[4, 5]], [6])
    assert take(batch["x"], 0).tolist() == [[0, 1]]
    assert positions(batch, 7) == ([7, 8, 9], False)
    assert positions({**batch, "index": torch.tensor([5, 1, 8])}, 7) == ([5, 1, 8], True)
    assert class_labels({"x": batch["x"], "y": torch.rand(3)}).tolist() == [-1, -1, -1]


def test_album_prefers_text_then_the_data_module_then_the_batch() -> None:
    album = Album(PointsDataModule())
    batch: dict[str, Any] = {"x": images(2), "y": torch.tensor([1, -1])}
    assert album.sample({**batch, "text": ["so", "what"]}, 1, 3, True).content == "what"
    shown = album.sample(batch, 0, 3, True)
    assert shown.label == "<i>high</i>"
    assert isinstance(shown.content, np.ndarray)
    assert (shown.content == 60).all()
    counted = album.sample(batch, 1, 3, False).content  # a counted place is not looked up
    assert isinstance(counted, np.ndarray)
    assert counted.shape == (8, 8)
    assert album.sample(batch, 1, 3, False).label is None
    bare = Album(ToyDataModule([], []))
    assert bare.sample({"x": torch.rand(2, 5), "y": torch.tensor([7, 8])}, 1, 0, True).content is None
    assert bare.class_name(8) == "8"


def test_example_must_be_a_picture_or_a_text() -> None:
    with pytest.raises(ValueError, match=r"str or a uint8 array.*float64 of shape \(2, 2\)"):
        thumbnail(np.zeros((2, 2)))


def test_pictures_keep_their_values_and_large_ones_shrink() -> None:
    assert to_image(torch.tensor([[[0.0, 1.0], [0.2, 0.4]]])).tolist() == [[0, 255], [51, 102]]
    assert to_image(torch.tensor([[[-2.0, 2.0]]])).tolist() == [[0, 255]]
    assert to_image(torch.rand(3, 4, 5)).shape == (4, 5, 3)
    large = thumbnail(np.full((4 * MAX_SIDE, 2 * MAX_SIDE, 3), 7, dtype=np.uint8))
    assert large.shape == (MAX_SIDE, MAX_SIDE // 2, 3)
    assert (large == 7).all()


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3)])
def test_png_is_read_back(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = png_bytes(image)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (shape[1], shape[0])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(shape[0], -1)
    assert (lines[:, 0] == 0).all()
    assert (lines[:, 1:].reshape(shape) == image).all()
    assert data_uri(image).startswith("data:image/png;base64,")
