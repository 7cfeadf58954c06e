"""Word pieces cut out of a text are those that the encoder never sees."""

import pytest
import torch
from torch import nn

from ddcl_lightning import DDCLReadout
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.explain.faithfulness import deletion_curves, insertion_curves
from ddcl_lightning.explain.reencoding import reencoded_logits, word_pieces
from ddcl_lightning.explain.token_scores import leave_one_out, margins, readout_logits
from tests.tiny_models import tiny_bert

TEXTS = ["a good film", "the plot was very dull"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> TransformersBackbone:
    return TransformersBackbone(str(tiny_bert(tmp_path_factory.mktemp("encoder"))))


@pytest.fixture(scope="module")
def model() -> tuple[DDCLReadout, nn.Linear]:
    torch.manual_seed(0)
    head = DDCLReadout(4, 2, pooling="both", token_weights="salience", embed_dim=32).eval()
    return head, nn.Linear(head.pooled_dim, 3)


def test_word_pieces_tell_special_tokens_and_padding_apart(backbone: TransformersBackbone) -> None:
    pieces, mask = word_pieces(backbone, TEXTS)
    assert pieces.shape == (2, 7, 2)
    assert mask.tolist() == [[False] + [True] * 3 + [False] * 3, [False] + [True] * 5 + [False]]
    assert pieces[..., 1].tolist() == [[1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]]
    assert backbone.tokenizer is not None
    assert backbone.tokenizer.convert_ids_to_tokens(pieces[0, :5, 0]) == ["[CLS]", "a", "good", "film", "[SEP]"]


def test_what_is_left_is_read_as_a_text_of_its_own(
    backbone: TransformersBackbone, model: tuple[DDCLReadout, nn.Linear]
) -> None:
    pieces, mask = word_pieces(backbone, TEXTS)
    logits = reencoded_logits(backbone.encode, *model)

    def expected(*texts: str) -> torch.Tensor:
        return readout_logits(*model)(*backbone({"text": list(texts)})).detach()

    torch.testing.assert_close(logits(pieces, mask), expected(*TEXTS))
    left = mask.clone()
    left[0, 2] = left[1, 4] = False
    torch.testing.assert_close(logits(pieces, left), expected("a film", "the plot was dull"))
    # Not what masking at the head's input does.
    tokens, valid = backbone({"text": TEXTS})
    assert valid is not None
    masked = readout_logits(*model)(tokens, valid & (left | ~mask)).detach()
    assert not torch.allclose(masked, logits(pieces, left), atol=1e-3)


def test_curves_and_scores_take_word_pieces_for_tokens(
    backbone: TransformersBackbone, model: tuple[DDCLReadout, nn.Linear]
) -> None:
    pieces, mask = word_pieces(backbone, TEXTS)
    logits, classes = reencoded_logits(backbone.encode, *model), torch.tensor([0, 1])
    scores = torch.arange(7.0).expand(2, -1)  # the last word first; special tokens do not take part
    deleted, inserted = (
        curves(logits, pieces, mask, scores, classes, 2) for curves in (deletion_curves, insertion_curves)
    )

    def probabilities(texts: list[str], number: int) -> list[float]:
        values = readout_logits(*model)(*backbone({"text": texts})).detach().double()
        return values.softmax(-1)[:, number].tolist()

    assert deleted[0].tolist() == pytest.approx(probabilities(["a good film", "a good", "a"], 0), abs=1e-5)
    assert inserted[1].tolist() == pytest.approx(
        probabilities(["dull", "was very dull", "the plot was very dull"], 1), abs=1e-5
    )
    falls = leave_one_out(logits, pieces, mask, classes)
    assert not bool(falls[~mask].any())
    without = margins(readout_logits(*model)(*backbone({"text": ["good film"]})).detach(), classes[:1])
    whole = margins(logits(pieces, mask), classes)
    assert float(falls[0, 1]) == pytest.approx(float(whole[0] - without[0]), abs=1e-5)


def test_texts_without_word_pieces_are_refused(backbone: TransformersBackbone) -> None:
    with pytest.raises(ValueError, match="texts must have at least one word piece each; number 1 has none"):
        word_pieces(backbone, ["a film", ""])
