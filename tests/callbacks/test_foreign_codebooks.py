"""CollapseWarning on codebooks of others: found or named, read, and their collapse told."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_collapse_warning import Change, of_level, signs, warned
from torch import Tensor, nn
from torch.nn.functional import normalize
from toys import Project, fit, loader

from ddcl_lightning import Classification, DDCLReadoutModule, VQPooling
from ddcl_lightning.callbacks import CollapseWarning
from ddcl_lightning.heads import MeanPooling
from tests.tiny import LinearBackbone
from tests.tiny import loader as blob_batches


class Foreign(pl.LightningModule):
    """Somebody's module with a codebook, trained by hand: no loss is seen."""

    def __init__(self, book: nn.Module | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 4)
        nn.init.eye_(self.encoder.weight)
        self.encoder.requires_grad_(False)
        self.book = nn.Identity() if book is None else book
        self.progress = nn.Parameter(torch.ones(()))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.use(self.encoder(batch[0]))
        if torch.is_grad_enabled():
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.progress.square())
            optimizer.step()

    def use(self, tokens: Tensor) -> None:
        self.book(tokens.unsqueeze(0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Lookup(Foreign):
    """An ``nn.Embedding`` as a codebook, looked up by the nearest vector."""

    class Quantizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            codes: Tensor = self.table(torch.cdist(tokens, self.table.weight[None]).argmin(-1))
            return codes

    def __init__(self) -> None:
        super().__init__(Lookup.Quantizer())


class SwAV(Foreign):
    """Prototypes as the rows of a linear layer on directions."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4, bias=False))

    def use(self, tokens: Tensor) -> None:
        self.book(normalize(tokens, dim=-1))


def library(**options: Any) -> Foreign:
    quantizers = pytest.importorskip("vector_quantize_pytorch")
    return Foreign(quantizers.VectorQuantize(dim=4, codebook_size=4, **options))


def set_codes(module: Foreign, values: Tensor) -> None:
    """Put the codes on vectors ``(4, 4)``."""
    if isinstance(module, Lookup):
        module.book.table.weight.data.copy_(values)
    elif isinstance(module, SwAV):
        module.book.weight.data.copy_(normalize(values, dim=-1))
    else:
        book: Any = module.book
        book._codebook.embed.copy_(values)
        book._codebook.embed_avg.copy_(values)
        book._codebook.cluster_size.fill_(1.0)


MODULES = {
    "VectorQuantize": (lambda: library(freeze_codebook=True), (), "book"),
    "named Embedding": (Lookup, ["book.table"], "book.table"),
    "named Linear": (SwAV, ["book"], "book"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_healthy_codebook_of_others_is_read_without_a_finding(name: str) -> None:
    make, named, where = MODULES[name]
    module = make()
    set_codes(module, loader(shuffle=False).dataset.tensors[0][:4])
    watch = CollapseWarning(every_n_batches=1, named=named)
    trainer = fit(module, watch, max_epochs=6)
    assert watch.findings == []
    assert watch.report[where].usage == 1.0
    assert math.isnan(watch.report[where].explained)  # other people's modules are probed by a function only
    assert f"ddcl/perplexity/{where}" in trainer.callback_metrics
    assert f"ddcl/entropy/{where}" not in trainer.callback_metrics  # it has no temperature


@pytest.mark.parametrize("name", MODULES)
def test_a_codebook_of_others_that_becomes_one_vector_is_named(name: str) -> None:
    make, named, where = MODULES[name]
    module = make()
    start = loader(shuffle=False).dataset.tensors[0][:4]
    set_codes(module, start)
    watch = CollapseWarning(every_n_batches=1, named=named)
    merge = Change(12, lambda model: set_codes(model, start[:1].expand(4, -1)))
    with warned(f"in {where} at step .*Harm: "):
        fit(module, merge, watch, data=loader(batch_size=48), max_epochs=40)
    assert {"merged", "flat_codes", "dead"} <= set(signs(watch))
    assert {finding.codebook for finding in watch.findings} == {where}
    assert all(finding.step > 12 for finding in watch.findings)
    assert of_level(watch, "alarm")


def test_a_module_of_others_without_a_codebook_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"found no codebook in Foreign. Name its module \(named=\['quantizer"):
        fit(Foreign(None), CollapseWarning())
    with pytest.raises(ValueError, match=r"named must hold names of modules of Lookup; got 'book.tabel'. Did you mean"):
        fit(Lookup(), CollapseWarning(named=["book.tabel"]))


def test_a_readout_module_without_a_codebook_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watch = CollapseWarning(every_n_batches=1)
    module = DDCLReadoutModule(LinearBackbone(), MeanPooling(), Classification(4, quantization_weight=0.0))
    fit(module, watch, data=blob_batches())
    assert "CollapseWarning stays idle: DDCLReadoutModule holds no codebook" in caplog.text
    assert (watch.findings, watch.readings, watch.verdict()) == ([], {}, "")


def library_head() -> Any:
    pytest.importorskip("vector_quantize_pytorch")
    from ddcl_lightning.integrations.vector_quantize import LibraryVQ

    return LibraryVQ("VectorQuantize", {"codebook_size": 4, "kmeans_init": True})


@pytest.mark.filterwarnings("ignore:CollapseWarning")  # they start at random
@pytest.mark.parametrize(
    ("head", "where"),
    [(lambda: VQPooling(4), "head.quantizer"), (library_head, "head.quantizer.layer")],
    ids=["VQPooling", "LibraryVQ"],
)
def test_heads_with_hard_codes_are_watched(head: Any, where: str) -> None:
    watch = CollapseWarning(every_n_batches=1)
    module = DDCLReadoutModule(LinearBackbone(), head(), Classification(4))
    fit(module, watch, data=blob_batches(), max_epochs=3)
    assert list(watch.report) == [where]
    assert watch.report[where].num_codes == 4
    assert len(watch.readings[where]) == 12
    assert 0 <= watch.readings[where][-1]["explained"] <= 1


def test_a_bank_and_a_codebook_of_others_are_watched_side_by_side() -> None:
    class Both(Project):
        def __init__(self) -> None:
            super().__init__()
            self.book = Lookup.Quantizer()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.book(self.tokens(batch).unsqueeze(0))
            return super().training_step(batch, batch_idx)

    watch = CollapseWarning(every_n_batches=2, named=["book.table"])
    fit(Both(), watch, max_epochs=1)
    assert list(watch.report) == ["book.table", "layer.bank"]
    assert watch.report["layer.bank"].bank is not None
    assert watch.report["book.table"].bank is None
