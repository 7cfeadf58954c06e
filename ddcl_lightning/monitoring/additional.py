"""Signals of a user's own beside those of a monitor."""

import copy
import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ddcl_lightning.monitoring.findings import Finding
from ddcl_lightning.monitoring.health_report import LOGGED
from ddcl_lightning.monitoring.history import TREND_READINGS
from ddcl_lightning.monitoring.recording import BankRecord, over_processes
from ddcl_lightning.monitoring.records import belongs_to, head_name
from ddcl_lightning.monitoring.signals import HeadSignals, Signal, check_signals, read_sign, read_signal
from ddcl_lightning.monitoring.signs import SIGNS

TAKEN = (*HeadSignals.logged, *LOGGED, "dead", "near_duplicates", "temperature", *SIGNS)


class AdditionalSignals:
    """Signals of a user's own on banks, their latest values and their signs.

    Args:
        signals: The signals.
        patience: Readings for which a sign must hold.

    Raises:
        ValueError: If a signal has no name, or that of another one or of a monitor's.
    """

    def __init__(self, signals: Sequence[Signal], patience: int) -> None:
        self.signals, self.patience = list(signals), patience
        check_signals("additional", self.signals, TAKEN)
        self.forget()

    def forget(self, name: str | None = None) -> None:
        """Drop what is remembered of one bank, or of all."""
        if name is None:
            self.findings: list[Finding] = []
            self._records: dict[str, BankRecord] = {}
            self._values: dict[str, dict[str, list[float]]] = {}
            self._streaks: dict[str, dict[str, int]] = {}
            return
        for remembered in (self._values, self._streaks):
            for key in [key for key in remembered if belongs_to(key, name)]:
                del remembered[key]

    def receive(self, name: str, record: BankRecord) -> None:
        """Keep the last record of a bank, if there is a signal to read it."""
        if self.signals:
            self._records[name] = record

    def read(self, step: int) -> tuple[dict[str, dict[str, float]], list[Finding]]:
        """Values by the name of a bank or head and of the signal, and new notices; all processes take part."""
        values: dict[str, dict[str, float]] = {}
        new: list[Finding] = []
        if not self.signals:
            return values, new
        records, self._records = over_processes(self._records), {}
        for name, record in records.items():
            for signal in self.signals:
                for head, value in enumerate(read_signal(signal, record)):
                    where = head_name(name, head, record.num_heads)
                    values.setdefault(where, {})[signal.name] = value
                    new += self._judge(step, where, signal, value)
        self.findings += new
        return values, new

    def _judge(self, step: int, where: str, signal: Signal, value: float) -> list[Finding]:
        earlier = self._values.setdefault(where, {}).get(signal.name, [])
        self._values[where][signal.name] = [*earlier, value][-TREND_READINGS:]
        text = read_sign(signal, value, earlier)
        new = []
        known = [*earlier, value]  # of 21 readings at most
        if len(known) == min(self.patience, TREND_READINGS) and all(map(math.isnan, known)):
            nothing = (
                f"its value was NaN in each of its first {len(known)} readings, so it tells nothing. Correct "
                f"{type(signal).__name__}.read(), or leave the signal out."
            )
            rank_zero_warn(f"CollapseWarning: the signal {signal.name!r} of {where or 'the codebook'}: {nothing}")
            new.append(Finding("notice", signal.name, where, step, nothing))
        streaks = self._streaks.setdefault(where, {})
        streaks[signal.name] = streaks.get(signal.name, 0) + 1 if text else 0
        due = bool(text) and streaks[signal.name] == self.patience
        return [*new, Finding("notice", signal.name, where, step, text)] if due else new

    def state_dict(self) -> dict[str, Any]:
        """Values, streaks and findings as plain numbers and text."""
        return {
            "values": {where: dict(values) for where, values in self._values.items()},
            "streaks": {where: dict(streaks) for where, streaks in self._streaks.items()},
            "findings": [vars(finding).copy() for finding in self.findings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._values, self._streaks = copy.deepcopy(state["values"]), copy.deepcopy(state["streaks"])
        self.findings = [Finding(**saved) for saved in state["findings"]]
