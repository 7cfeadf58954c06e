"""The library's quantizers as heads: the same codes and values as by themselves, trained in the module."""

from typing import Any

import pytest
import torch
from tiny import quiet_trainer

from ddcl_lightning import ConvBackbone, ConvDecoder, DDCLReadoutModule, Reconstruction
from ddcl_lightning.datamodules import DigitsDataModule

pytest.importorskip("vector_quantize_pytorch")
from ddcl_lightning.integrations.vector_quantize import LibraryVQ

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ema": ("VectorQuantize", {"codebook_size": 16, "kmeans_init": True, "threshold_ema_dead_code": 2}, 16),
    "rotation": ("VectorQuantize", {"codebook_size": 16, "rotation_trick": True}, 16),
    "two heads": ("VectorQuantize", {"codebook_size": 16, "heads": 2, "separate_codebook_per_head": True}, 16),
    "simvq": ("SimVQ", {"codebook_size": 16}, 16),
    "fsq": ("FSQ", {"levels": [4, 4]}, 16),
    "lfq": ("LFQ", {"codebook_size": 16}, 16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_library(name: str) -> None:
    quantizer, args, size = CASES[name]
    torch.manual_seed(0)
    head = LibraryVQ(quantizer, args, embed_dim=8).eval()
    tokens = torch.randn(3, 10, 8)
    readout, reference = head(tokens), head.quantizer.layer(tokens)
    assert head.num_codes == size
    torch.testing.assert_close(readout.tokens, reference[0])
    assert torch.equal(readout.codes.squeeze(-1), reference[1].long())
    assert readout.codes.shape == (3, 10, head.num_codebooks)
    torch.testing.assert_close(readout.assignments.sum(-1), torch.ones(3, head.num_codebooks))
    torch.testing.assert_close(readout.pooled, reference[0].mean(1))


@pytest.mark.parametrize("name", CASES)
def test_trains_in_the_module(name: str) -> None:
    quantizer, args, size = CASES[name]
    torch.manual_seed(0)
    task = Reconstruction(ConvDecoder(1, (8,)))
    module = DDCLReadoutModule(ConvBackbone(1, 8, (8,)), LibraryVQ(quantizer, args), task, rho=0.2, lr_task=2e-3)
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64, val_fraction=0.2, as_images=True, limit=300, seed=0))
    assert 1 < float(trainer.callback_metrics["val/perplexity"]) <= size
    assert float(trainer.callback_metrics["val/mse"]) < 0.2


def test_padding_takes_no_part_or_is_refused() -> None:
    tokens, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    head = LibraryVQ("VectorQuantize", {"codebook_size": 4}, embed_dim=8).eval()
    readout = head(tokens, mask)
    assert torch.equal(readout.codes[~mask], torch.full((2, 1), -1))
    with pytest.raises(ValueError, match="FSQ takes no mask; got padding"):
        LibraryVQ("FSQ", {"levels": [4, 4]}, embed_dim=8)(tokens, mask)


def test_library_vq_refuses_unknown_quantizers_and_arguments() -> None:
    with pytest.raises(ValueError, match=r"quantizer must be one of .* Did you mean 'VectorQuantize'"):
        LibraryVQ("VectorQuantizer")
    with pytest.raises(ValueError, match="weight must be > 0; got 0"):
        LibraryVQ("FSQ", weight=0.0)
    with pytest.raises(ValueError, match=r"quantizer_args do not fit FSQ: .*level"):
        LibraryVQ("FSQ", embed_dim=8)
