"""What holds for every signal of collapse: a free name, a value for each head, and no trace on what it reads."""

import copy
import math
import pickle

import pytest
import torch
from registry import classes, make
from torch import Tensor

from ddcl_lightning import BankRecord, Signal
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.monitoring.additional import AdditionalSignals
from ddcl_lightning.monitoring.signals import read_sign, read_signal

SIGNALS = {kind.__name__: kind for kind in classes(Signal)}
each_signal = pytest.mark.parametrize("name", SIGNALS)


def record(heads: int = 2, garbage: float = 0.0) -> BankRecord:
    """Of 40 tokens, of which the last ten are padding, and five codes."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(heads, 40, 3, generator=generator)
    tokens[:, 30:] = garbage
    mask = (torch.arange(40) < 30).expand(heads, 40)
    ones = torch.ones(heads)
    return BankRecord(
        tokens, mask, torch.randn(heads, 5, 3, generator=generator), ones, Decomposition(ones, ones, 0 * ones)
    )


def test_the_plug_in_of_the_tests_ships_a_signal() -> None:
    assert "LargestShare" in SIGNALS


@each_signal
def test_its_name_is_free_and_can_be_logged(name: str) -> None:
    AdditionalSignals([make(SIGNALS[name])], 3)


@each_signal
def test_it_reads_a_number_for_each_head(name: str) -> None:
    for heads in (1, 2):
        values = read_signal(make(SIGNALS[name]), record(heads))
        assert len(values) == heads
        assert all(math.isfinite(value) for value in values)


@each_signal
def test_padding_never_matters(name: str) -> None:
    expected = read_signal(make(SIGNALS[name]), record())
    for garbage in (1e6, math.nan, math.inf):
        assert read_signal(make(SIGNALS[name]), record(garbage=garbage)) == pytest.approx(expected)


@each_signal
def test_it_leaves_what_it_reads_as_it_was(name: str) -> None:
    read, kept = record(), copy.deepcopy(record())
    read_signal(make(SIGNALS[name]), read)
    for field, value in vars(kept).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(read, field), value)


@each_signal
def test_its_sign_is_a_sentence_or_none_of_any_number(name: str) -> None:
    signal = make(SIGNALS[name])
    for value in (0.0, 1.0, -1e9, 1e9, math.nan, math.inf):
        for earlier in ([], [0.0], [math.nan] * 20):
            assert isinstance(read_sign(signal, value, earlier), str)


@each_signal
def test_copies_and_pickles_read_the_same(name: str) -> None:
    signal = make(SIGNALS[name])
    copies = [copy.deepcopy(signal), pickle.loads(pickle.dumps(signal))]
    expected = read_signal(signal, record())
    for twin in copies:
        assert read_signal(twin, record()) == pytest.approx(expected)
