"""Which tokens a DDCL readout reads: all, the first, or their mean."""

import pytest
import torch
from tiny import LinearBackbone, loader, quiet_trainer

from ddcl_lightning import Clustering, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.heads import CLSPooling, MeanPooling
from ddcl_lightning.heads.ddcl import Pooling, TokenChoice
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from ddcl_lightning.nn.discovery import find_banks

TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()


@pytest.mark.parametrize("pooling", ["centroid", "histogram", "both", "slots"])
@pytest.mark.parametrize(("choice", "summary"), [("first", CLSPooling), ("mean", MeanPooling)])
def test_one_vector_per_sample_reaches_the_bank(
    choice: TokenChoice, summary: type[CLSPooling] | type[MeanPooling], pooling: Pooling
) -> None:
    head = DDCLReadout(6, num_heads=2, pooling=pooling, tokens=choice, embed_dim=8).eval()
    whole = DDCLReadout(6, num_heads=2, pooling=pooling, embed_dim=8).eval()
    whole.load_state_dict(head.state_dict())
    assert (head.pooled_dim, head.num_parameters()) == (whole.pooled_dim, whole.num_parameters())
    vectors = summary(embed_dim=8)(TOKENS, MASK).pooled.unsqueeze(1)
    records: list[CodebookRecord] = []
    with record_codebooks(find_banks(head), lambda _, observed: records.append(observed)):
        readout = head(TOKENS, MASK)
    expected = whole(vectors)
    assert records[0].tokens.shape == (2, 3, 4)
    assert records[0].mask is None
    torch.testing.assert_close(readout.pooled, expected.pooled)
    torch.testing.assert_close(readout.assignments, expected.assignments)
    torch.testing.assert_close(readout.quantization_loss(), expected.quantization_loss())
    assert readout.tokens.shape[:2] == (3, 1)
    assert not torch.allclose(readout.pooled, whole(TOKENS, MASK).pooled)


@pytest.mark.parametrize("choice", ["first", "mean"])
def test_clusters_samples_under_the_callbacks(choice: TokenChoice) -> None:
    module = DDCLReadoutModule(
        LinearBackbone(), DDCLReadout(4, tokens=choice), Clustering(4), lr_prototypes=0.01, rho=0.1
    )
    callbacks = [TemperatureAnnealing(), KMeansInitialization(), DecompositionCheck(every_n_batches=2)]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(module, loader(), loader())
    assert bool(module.head.attention.bank.initialized)
    assert trainer.callback_metrics["val/acc"] > 0.9


def test_ddcl_readout_refuses_unknown_tokens_and_two_widths() -> None:
    with pytest.raises(ValueError, match=r"tokens must be one of \('all', 'first', 'mean'\); got 'last'"):
        DDCLReadout(4, tokens="last")
    with pytest.raises(ValueError, match="max_parameters chooses prototype_dim, so give one of them"):
        DDCLReadout(4, prototype_dim=3, max_parameters=100)
