"""Heads as the pooling of a SentenceTransformer: encode, save, load, train."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LinearBackbone
from tiny_models import tiny_bert
from torch import Tensor

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.heads import Head, MeanPooling, PMAPooling, VQPooling

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

from ddcl_lightning.integrations.sentence_transformers import PrototypePooling  # noqa: E402

TEXTS = ["a good film", "the plot was very dull and boring , not good", "great", "bad acting of a wonderful story"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def model(encoder: Path, head: Head) -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer

    transformer = Transformer(str(encoder), model_kwargs={"local_files_only": True})
    return sentence_transformers.SentenceTransformer(modules=[transformer, PrototypePooling(head)], device="cpu")


def test_mean_is_the_library_s_own(encoder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    reference = sentence_transformers.SentenceTransformer(
        modules=[Transformer(str(encoder)), Pooling(32, "mean")], device="cpu"
    )
    embeddings = model(encoder, MeanPooling(embed_dim=32)).encode(TEXTS)
    np.testing.assert_allclose(embeddings, reference.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    "create",
    [
        lambda: DDCLReadout(5, num_heads=2, pooling="both", tokens="all", embed_dim=32),
        lambda: PMAPooling(2, 2, max_parameters=3000, embed_dim=32),
        lambda: VQPooling(4, embed_dim=32),
    ],
)
def test_encodes_saves_and_loads(create: Any, encoder: Path, tmp_path: Path) -> None:
    head = create()
    whole = model(encoder, head)
    assert whole.get_embedding_dimension() == head.pooled_dim
    embeddings = whole.encode(TEXTS)
    assert embeddings.shape == (4, head.pooled_dim)
    # Padding depends on what else is in the batch; the embedding does not.
    np.testing.assert_allclose(whole.encode(TEXTS[:1])[0], embeddings[0], atol=1e-5)
    whole.save_pretrained(str(tmp_path / "saved"))
    # sentence-transformers asks for this flag for every module that is not its own.
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert isinstance(again[1], PrototypePooling)
    assert type(again[1].head) is type(head)
    np.testing.assert_array_equal(again.encode(TEXTS), embeddings)


def test_assignments_are_features(encoder: Path) -> None:
    head = DDCLReadout(5, num_heads=2, embed_dim=32)
    whole = model(encoder, head)
    rows = whole.encode(TEXTS, output_value=None)
    assert [tuple(row["prototype_assignments"].shape) for row in rows] == [(2, 5)] * 4
    for row in rows:
        torch.testing.assert_close(row["prototype_assignments"].sum(-1), torch.ones(2))
    features = model(encoder, MeanPooling(embed_dim=32))[1]({"token_embeddings": torch.randn(2, 3, 32)})
    assert set(features) == {"token_embeddings", "sentence_embedding"}


def test_a_loss_of_the_library_trains_encoder_and_head(encoder: Path) -> None:
    """A step of a loss of the library moves the encoder and the head."""
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    head = DDCLReadout(5, num_heads=2, repulsion=0.1, embed_dim=32)
    whole = model(encoder, head).train()
    loss = CosineSimilarityLoss(whole)
    pairs = [whole.preprocess(TEXTS[:2]), whole.preprocess(TEXTS[2:])]
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-3)
    values = []
    torch.nn.Module.train(whole[0], False)  # no dropout: the loss must fall for good
    for _ in range(5):
        optimizer.zero_grad()
        value: Tensor = loss([dict(pair) for pair in pairs], torch.tensor([0.9, 0.1]))
        value.backward()
        assert all(p.grad is not None for p in head.parameters())
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0]
    features = whole(dict(pairs[0]))
    again = head(features["token_embeddings"], features["attention_mask"].bool())
    torch.testing.assert_close(features["quantization_loss"], again.quantization_loss())
    torch.testing.assert_close(features["regularization"], again.regularization)
    assert features["quantization_loss"].requires_grad
    assert features["regularization"].requires_grad
    assert "quantization_loss" not in whole.eval()(dict(pairs[0]))


def test_flat_tokens_are_padded_again() -> None:
    """The library may drop padding altogether: (1, N, D) and where each text starts."""
    pooling = PrototypePooling(DDCLReadout(3, embed_dim=4)).eval()
    tokens = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = pooling({"token_embeddings": tokens, "attention_mask": mask})
    flat = pooling({"token_embeddings": tokens[mask.bool()].unsqueeze(0), "cu_seq_lens_q": torch.tensor([0, 3, 8])})
    torch.testing.assert_close(flat["sentence_embedding"], padded["sentence_embedding"])
    torch.testing.assert_close(flat["prototype_assignments"], padded["prototype_assignments"])


def test_from_a_trained_module() -> None:
    module = DDCLReadoutModule(LinearBackbone(embed_dim=8), DDCLReadout(3), Classification(2))
    pooling = PrototypePooling.from_module(module)
    assert pooling.head is module.head
    assert pooling.get_embedding_dimension() == 8
    assert "DDCLReadout" in repr(pooling)


def test_prototype_pooling_refuses_unbuilt_heads_and_masks_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DDCLReadout must be built for the encoder: pass embed_dim, or call build"):
        PrototypePooling(DDCLReadout(3))
    pooling = PrototypePooling(MeanPooling(embed_dim=4))
    with pytest.raises(ValueError, match="mask must have the shape of tokens"):
        pooling({"token_embeddings": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 2)})
    additive = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="attention_mask must be 1 for tokens and 0 for padding; got values from -inf"):
        pooling({"token_embeddings": torch.randn(2, 3, 4), "attention_mask": additive})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must name the 'class' and 'init_args' of a head"):
        PrototypePooling.load(str(tmp_path))
