"""Observers of compiled and exported banks."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning import PrototypeBank
from ddcl_lightning.functional import BankOutput
from ddcl_lightning.nn.observer import BankObserver


class Counter(BankObserver):
    """Counts the calls that it is shown."""

    breaks_graphs = True

    def __init__(self) -> None:
        self.calls = 0

    @torch.compiler.disable
    def after(self, bank: PrototypeBank, tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        self.calls += 1
        return output


def watched(training: bool) -> tuple[PrototypeBank, Counter]:
    bank, counter = PrototypeBank(3, 4).train(training), Counter()
    bank.add_observer(counter)
    return bank, counter


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_bank_shows_its_calls_in_training() -> None:
    bank, counter = watched(training=True)
    torch.compile(bank, backend="eager")(torch.randn(5, 4))
    assert counter.calls == 1


def test_a_compiled_bank_is_one_graph_in_evaluation() -> None:
    torch.compiler.reset()  # or torch runs uncompiled what it could not compile for another bank
    tokens = torch.randn(5, 4)
    bank, counter = watched(training=False)
    compiled = torch.compile(bank, backend="eager", fullgraph=True)
    centroids = compiled(tokens).centroids
    assert counter.calls == 0
    torch.testing.assert_close(centroids, bank(tokens).centroids)
    assert counter.calls == 1


def test_an_export_in_training_mode_is_no_call() -> None:
    """Its tokens have no values, which a step must not take for statistics."""
    bank, counter = watched(training=True)
    torch.export.export(bank, (torch.randn(5, 4),), strict=False)
    assert counter.calls == 0
