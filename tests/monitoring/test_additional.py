"""Signals of a user's own that fail, say nothing or cannot be logged: one sentence each, that names the signal."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddcl_lightning import BankRecord, Signal
from ddcl_lightning.monitoring.additional import AdditionalSignals
from ddcl_lightning.monitoring.history import TREND_READINGS


class Own(Signal):
    """A signal of functions."""

    def __init__(
        self,
        read: Callable[[BankRecord], Any] = lambda record: record.codebook.mean((1, 2)),
        sign: Callable[[float], Any] = lambda value: None,
        name: Any = "own",
    ) -> None:
        self.name, self._read, self._sign = name, read, sign

    def read(self, record: BankRecord) -> Tensor:
        return self._read(record)  # type: ignore[no-any-return]

    def sign(self, value: float, earlier: Sequence[float]) -> str | None:
        return self._sign(value)  # type: ignore[no-any-return]


RECORD = BankRecord.without_call(torch.randn(2, 9, 3), torch.randn(2, 4, 3), torch.ones(2))


def read(signals: AdditionalSignals, step: int = 1) -> Any:
    signals.receive("bank", RECORD)
    return signals.read(step)


@pytest.mark.parametrize("name", ["largest share", " share", "share\n", "share\tof", "largest/share"])
def test_a_name_that_a_logger_cannot_hold_is_refused(name: str) -> None:
    message = (
        f"additional must hold signals whose names have no spaces and no '/', .*; got {re.escape(repr(name))} of Own"
    )
    with pytest.raises(ValueError, match=f"{message}. Write '_' in their place."):
        AdditionalSignals([Own(name=name)], 3)


@pytest.mark.parametrize(
    "failing",
    [lambda record: record.codes.sum(), lambda record: record.tokens[7], lambda record: {}["missing"]],
    ids=["attribute", "index", "key"],
)
def test_a_signal_that_fails_is_named_with_the_place_in_its_code(failing: Callable[[BankRecord], Any]) -> None:
    message = (
        r"read of the signal 'own' must work on every record of a bank; got (Attribute|Index|Key)Error: .* "
        rf"\(line {failing.__code__.co_firstlineno} of {re.escape(__file__)}\)\. Correct it, or leave Own out\."
    )
    with pytest.raises(ValueError, match=message) as error:
        read(AdditionalSignals([Own(failing)], 3))
    assert error.value.__cause__ is not None


def test_a_sign_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match=r"sign of the signal 'own' must work on every record .*ZeroDivisionError"):
        read(AdditionalSignals([Own(sign=lambda value: str(1 / 0))], 3))


@pytest.mark.parametrize("patience", [1, 3, 2 * TREND_READINGS])
def test_a_signal_that_is_never_a_number_is_noticed_once(patience: int) -> None:
    signals = AdditionalSignals([Own(lambda record: torch.tensor([math.nan, 1.0]))], patience)
    due = min(patience, TREND_READINGS)
    for step in range(1, due):
        assert read(signals, step)[1] == []
    message = (
        rf"the signal 'own' of bank/head0: its value was NaN in each of its first {due} readings.*Correct Own\.read"
    )
    with pytest.warns(UserWarning, match=message):
        _, notices = read(signals, due)
    assert [(notice.codebook, notice.sign, notice.level, notice.step) for notice in notices] == [
        ("bank/head0", "own", "notice", due)
    ]
    for step in range(due + 1, due + 2 * TREND_READINGS):
        assert read(signals, step)[1] == []  # and the other head is fine


def test_a_signal_that_is_a_number_at_times_is_not_noticed() -> None:
    values = iter([math.nan, 1.0] * 40)
    signals = AdditionalSignals([Own(lambda record: torch.full((2,), next(values)))], 3)
    for step in range(40):
        assert read(signals, step)[1] == []
