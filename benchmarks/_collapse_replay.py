"""The monitor on a recorded run: it gets the records in their order, and gives its first notice and alarm."""

import math
from typing import Any

import torch

from ddcl_lightning import CodebookMonitor
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.monitoring.findings import Finding
from ddcl_lightning.monitoring.probe import explained_variance
from ddcl_lightning.monitoring.records import BankRecord, CodebookRecord

Recording = dict[str, Any]
TERMS = ("loss", "ols", "variance")
SOFT = ("clustering", "classification")  # models with a readout, whose calls return soft assignments alone


class RecordedProbe:
    """The probe of a recorded run: the latest one at every moment, on the first embeddings."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.step = recording, 0

    def read(self) -> dict[str, list[float]]:
        probes = self.recording["probes"]
        latest = max((probe for probe in probes if probe["step"] <= self.step), key=lambda probe: probe["step"])
        first = probes[0]["records"]
        return {
            name: [
                explained_variance(tokens, codes, record["num_codes"])
                for tokens, codes in zip(first[name]["tokens"], record["codes"], strict=True)
            ]
            for name, record in latest["records"].items()
            if name in first and first[name]["tokens"] is not None
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


def record_of(fields: dict[str, Any], soft: bool) -> CodebookRecord:
    """One record of a reading; the calls of soft readouts returned no codes."""
    shared = [fields[name] for name in ("tokens", "mask", "codebook")]
    if fields.get("temperature") is None:
        codes, size, geometry = fields["codes"], fields["num_codes"], fields["geometry"]
        return CodebookRecord(*shared, codes=codes, num_codes=size, geometry=geometry)
    terms = Decomposition(*(fields["terms"][name] for name in TERMS))
    detach = bool(fields["detach_assignments"])
    codes = None if soft else fields["codes"]
    return BankRecord(*shared, fields["temperature"], terms, codes, detach_assignments=detach)


def replay(recording: Recording, monitor: CodebookMonitor | None = None) -> list[Finding]:
    """Findings of the monitor in a recorded run, as it would have had them in the loop."""
    monitor = monitor or CodebookMonitor(on_collapse="ignore")
    probe = RecordedProbe(recording)
    monitor.use_probe(probe)  # type: ignore[arg-type]
    losses, before = recording["task_losses"], 0
    for number, reading in enumerate(recording["readings"]):
        probe.step = reading["step"]
        if number == 0:
            monitor.read_probe()
        ends: dict[str, float] = {}
        for name, fields in reading["records"].items():
            record = record_of(fields, recording["config"]["model"] in SOFT)
            monitor.add(name, record)
            if fields.get("planned_end") is not None:
                ends |= _planned(name, record, fields["planned_end"])
        for loss in [] if losses is None else losses[before : reading["step"] + 1]:
            monitor.add_loss(loss)
        before = reading["step"] + 1
        monitor.check(step=reading["step"], planned_end=ends)
    if recording["error"]:
        text = f"training ended: {recording['error']}"
        last = recording["readings"][-1]["step"] if recording["readings"] else 0
        monitor.add_finding(Finding("alarm", "non_finite", "", last, text))
    return monitor.findings


def _planned(name: str, record: CodebookRecord, ratio: float) -> dict[str, float]:
    """Temperature at the end of the schedule, by head: T_end / T_c of the recording on the tokens of now."""
    from ddcl_lightning.functional import critical_temperature

    assert isinstance(record, BankRecord)
    critical = critical_temperature(record.valid_tokens(), detach_assignments=record.detach_assignments)
    labels = [name] if record.num_heads == 1 else [f"{name}/head{head}" for head in range(record.num_heads)]
    return {label: ratio * float(value) for label, value in zip(labels, critical, strict=True)}


def judge(recording: Recording) -> dict[str, int | None]:
    """First step of a notice and of an alarm, None where there is none."""
    findings = replay(recording)
    steps = {
        level: min((finding.step for finding in findings if finding.level == level), default=math.inf)
        for level in ("notice", "alarm")
    }
    steps["notice"] = min(steps.values())
    return {level: None if math.isinf(step) else int(step) for level, step in steps.items()}
