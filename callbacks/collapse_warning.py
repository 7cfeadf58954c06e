"""Early warning of a collapsing codebook, with the sign, its figures and what to do."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.compat import callbacks_of
from ddcl_lightning._utils.distributed import broadcast_object, gather_objects, inform
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._base import CodebookCallback, log_name
from ddcl_lightning.callbacks._probe_batches import (
    call_all,
    first_batches,
    forward_batch,
    is_ours,
    is_read_once,
    is_shuffled,
)
from ddcl_lightning.callbacks.temperature_annealing import TemperatureAnnealing
from ddcl_lightning.monitoring.additional import AdditionalSignals
from ddcl_lightning.monitoring.before_training import remarks_on
from ddcl_lightning.monitoring.findings import CollapseError, Finding
from ddcl_lightning.monitoring.health_report import MonitorReport
from ddcl_lightning.monitoring.monitor import CodebookMonitor
from ddcl_lightning.monitoring.plots import draw_course
from ddcl_lightning.monitoring.probe import Probe
from ddcl_lightning.monitoring.recording import BankRecord, CodebookRecord, is_due
from ddcl_lightning.monitoring.records import head_name
from ddcl_lightning.monitoring.rules import CollapseRules
from ddcl_lightning.monitoring.signals import Signal
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.finding import Named, Recordable, find_codebooks
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.tasks.readout_module import ReadoutModule

MAX_POINTS = 2000  # of a course; beyond, every second one goes
NO_NUMBERS = ("not finite", "overflow", "NaN", "infinite")  # words of errors


class CollapseWarning(CodebookCallback):
    """Monitor of every codebook and every set of prototypes of a module, ours or not, in two levels.

    A *notice* is a sign (:class:`~ddcl_lightning.CollapseRules` lists them); it is logged, kept in ``findings`` and
    shown at the end, and never stops a run, for what looks like a collapse may be what a task wants. An *alarm* is a
    sign together with harm that was measured: codes no longer tell apart the samples of a fixed probe that they told
    apart at the start, the loss rises or stalls, values are no numbers. It warns, stops or raises.

    The probe are 512 samples of the training data, of a loader that shuffles random ones, in evaluation mode and
    without a trace, at every 20th reading at most, and at every third while there is a sign; less often where it would
    take more than 1 % of the training, or 5 % while there is a sign; and once more at the end. A schedule of
    :class:`TemperatureAnnealing` that starts above the critical temperature and ends below it is no sign.

    The loss that is judged is what ``training_step`` returns; of a dictionary its ``task_loss`` where it has one: the
    part of the task or the reconstruction, without that of the codebooks.

    Every signal of a reading is logged as ``ddcl/SIGNAL/CODEBOOK``, those of banks (Delta, H, T / T_c) among them.

    Args:
        every_n_batches: Batches of which one is read, the first of all among them.
        on_collapse: On an alarm ``"warn"``, ``"stop"`` (end training after this batch) or ``"raise"``.
        named: Codebooks that are not recognised, see :func:`~ddcl_lightning.find_codebooks`.
        kinds: Kinds of codebooks of your own.
        rules: Thresholds.
        probe: Whether to run the probe, which reads some training batches once more. A module that is not a
            :class:`~ddcl_lightning.DDCLReadoutModule` is only probed by a function ``probe(module, batch)`` that calls
            it, since its training step may do anything. Data that can be read only once are not probed.
        additional: Signals of your own (:class:`~ddcl_lightning.Signal`) on banks, which are logged, and noticed where
            they give a sign.

    Attributes:
        report: Health of every codebook at the last reading.
        findings: Every notice and alarm so far.
        readings: Numbers of the readings so far, by the name of a codebook or head.

    Raises:
        ValueError: If an argument is out of its range, the module holds no codebook, or a signal of your own has no
            name, or that of another or of the callback's; in use, if it does not return what
            :class:`~ddcl_lightning.Signal` says.
        CollapseError: On an alarm, with ``on_collapse="raise"``.
    """

    @typed
    def __init__(
        self,
        every_n_batches: int = 10,
        on_collapse: Literal["warn", "stop", "raise"] = "warn",
        named: Named = (),
        kinds: Sequence[type[CodebookSource]] = (),
        rules: CollapseRules | None = None,
        probe: bool | Callable[..., Any] = True,
        additional: list[Signal] | None = None,
    ) -> None:
        super().__init__(every_n_batches)
        if on_collapse not in ("warn", "stop", "raise"):
            raise ValueError(
                f"on_collapse must be 'warn', 'stop' or 'raise'; got {on_collapse!r}. Pass 'warn' to go on "
                "after an alarm."
            )
        self.on_collapse, self.named, self.kinds, self.use_probe = on_collapse, named, tuple(kinds), probe
        self.rules = rules or CollapseRules()
        self.additional = AdditionalSignals(additional or [], self.rules.patience)
        self.forget()

    def forget(self) -> None:
        """Drop the signals and findings of an earlier run."""
        self.monitor = CodebookMonitor(rules=self.rules, on_collapse="ignore")
        self.report = MonitorReport()
        self._earlier_verdict = ""  # of a checkpoint, until there is a reading
        self.readings: dict[str, list[dict[str, float]]] = {}
        self.additional.forget()

    @property
    def findings(self) -> list[Finding]:
        """Every notice and alarm so far, the earliest first."""
        return sorted([*self.monitor.findings, *self.additional.findings], key=lambda finding: finding.step)

    def bank_resized(self, name: str) -> None:
        """Start the history of a resized bank anew, since readings of its earlier size would mislead."""
        self.monitor.forget(name)
        self.additional.forget(name)

    def find(self, pl_module: pl.LightningModule) -> Mapping[str, Recordable]:
        """Every codebook that is recognised or named.

        Raises:
            ValueError: If there is none.
        """
        codebooks = find_codebooks(pl_module, self.named, self.kinds)
        if codebooks and self.additional.signals and not _banks(codebooks):
            names = ", ".join(signal.name for signal in self.additional.signals)
            rank_zero_warn(
                f"{type(self).__name__}: additional signals read banks, and {type(pl_module).__name__} holds none, "
                f"only {', '.join(codebooks)}; {names} will have no value. Leave them out, or log them in the module."
            )
        if not codebooks and isinstance(pl_module, ReadoutModule):
            inform(f"{type(self).__name__} stays idle: {type(pl_module).__name__} holds no codebook.")
        elif not codebooks:
            raise ValueError(
                f"{type(self).__name__} found no codebook in {type(pl_module).__name__}. Name its module "
                "(named=['quantizer.embedding']), or leave the callback out."
            )
        return codebooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the recorder, and take the probe."""
        super().on_train_start(trainer, pl_module)
        self._num_batches = trainer.num_training_batches
        self._ordered = not is_shuffled(trainer.train_dataloader)
        self._tokens: Counter[str] = Counter()  # of the batch that is read
        forward = self.use_probe if callable(self.use_probe) else forward_batch if is_ours(pl_module) else None
        if forward is not None and self.use_probe and not is_read_once(trainer.train_dataloader):
            batches = first_batches(trainer)
            call = partial(call_all, trainer, pl_module, forward, batches)
            probe = Probe(pl_module, self._codebooks, call)
            # A forward pass takes a third of a step, and the probe 1 % of the training, 5 % while there is a sign.
            self.monitor.use_probe(probe, math.ceil(len(batches) / 3 / 0.05 / self.every_n_batches))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the probe before the first step of the run, when everything is initialized, and say what is known."""
        if not self._batches:
            self.monitor.read_probe()
            self._say_before_training(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _say_before_training(self, trainer: pl.Trainer) -> None:
        """Say once what can be said without training; problems are notices too."""
        probe = self.monitor.probe
        first = {} if probe is None else probe.state_dict()
        ends = _planned_ends(trainer, self._codebooks)
        for remark in remarks_on(self._codebooks, trainer.optimizers, first, ends):
            sentence = f"CollapseWarning: {remark.codebook}: {remark.text}"
            if remark.problem:
                rank_zero_warn(sentence)
                self.monitor.add_finding(Finding("notice", remark.sign, remark.codebook, 0, remark.text))
            else:
                inform(sentence)

    def is_due(self) -> bool:
        """True for one batch in each ``every_n_batches``, at places that follow no period of the data."""
        return is_due(self._batches, self.every_n_batches)

    def receive(self, name: str, record: CodebookRecord) -> None:
        """Add the record of a call on this process."""
        self.monitor.add(name, record)
        codes = record.tokens if record.codes is None else record.codes
        self._tokens[name] += 0 if codes is None else codes.shape[1]
        if isinstance(record, BankRecord):
            self.additional.receive(name, record)

    def _wait_for_a_pass(self) -> None:
        """Let codes of data in an order be dead only after a pass, of whose batches one in so many is read."""
        tokens, self._tokens = self._tokens, Counter()
        if not self._ordered or math.isinf(self._num_batches):
            return
        total: Counter[str] = sum(gather_objects(tokens), Counter())
        for name, number in total.items():
            self.monitor.lengthen(name, math.ceil(number * self._num_batches / self.every_n_batches))

    def has_read(self) -> bool:
        """True if there were calls since the last reading."""
        return self.monitor.is_due

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of the batch, where it is more than that of the codebooks, and read what was recorded."""
        loss = outputs.get("task_loss", outputs.get("loss")) if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and not (isinstance(pl_module, ReadoutModule) and pl_module.task.unsupervised):
            self.monitor.add_loss(loss if loss.numel() == 1 else loss.mean())  # of a step that optimizes by itself
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge, log and act on what was recorded on all processes together."""
        self._wait_for_a_pass()
        new = self.monitor.judge(
            trainer.global_step,
            planned_end=_planned_ends(trainer, self._codebooks),
            from_data=all(bool(bank.initialized) for bank in _banks(self._codebooks).values()),
        )
        self.report = self.monitor.latest
        values = {name: row.scalars() for name, row in self.report.items()}
        added, notices = self.additional.read(trainer.global_step)
        for name, numbers in added.items():
            values.setdefault(name, {}).update(numbers)
        for name, numbers in values.items():
            pl_module.log_dict({log_name(name, key): value for key, value in numbers.items()})
            course = self.readings.setdefault(name, [])
            course.append({"step": float(trainer.global_step), **numbers})
            if len(course) > MAX_POINTS:
                del course[1::2]
        # All have read the same; should rounding differ, they must still agree on whether to go on.
        self._act(trainer, broadcast_object([*new, *notices]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the probe of what was trained, for the verdict, and remove the recorder."""
        alarms = broadcast_object(self.monitor.conclude())
        self.report = self.monitor.latest
        super().on_train_end(trainer, pl_module)
        self._act(trainer, alarms)

    def _act(self, trainer: pl.Trainer, new: list[Finding]) -> None:
        alarms = [str(finding) for finding in new if finding.level == "alarm"]
        if not alarms:
            return
        if self.on_collapse == "raise":
            raise CollapseError("; ".join(alarms))
        for alarm in alarms:
            rank_zero_warn(f"CollapseWarning: {alarm}")
        if self.on_collapse == "stop":
            trainer.should_stop = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the recorder; an error about values that are no numbers is an alarm too."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, FloatingPointError) or any(word in str(exception) for word in NO_NUMBERS):
            text = f"training ended with {type(exception).__name__}: {exception}"[:500]
            self.monitor.add_finding(Finding("alarm", "non_finite", "", trainer.global_step, text))

    def verdict(self) -> str:
        """One line for every codebook: how it is, and what was found when."""
        return self.monitor.verdict(self.findings) or self._earlier_verdict

    def courses(self) -> dict[str, Figure]:
        """Pictures of the signals of every codebook over steps, with the moments of its findings."""
        return {
            name: draw_course(
                readings,
                [(find.step, find.sign, find.level == "alarm") for find in self.findings if find.codebook == name],
                name or "the codebook",
            )
            for name, readings in self.readings.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All that was read and found: a resumed run warns as the uninterrupted one would."""
        return {
            **super().state_dict(),
            "monitor": self.monitor.state_dict(),
            "additional": self.additional.state_dict(),
            "verdict": self.verdict(),
            "readings": {name: [dict(reading) for reading in readings] for name, readings in self.readings.items()},
        }

    @restores(batches=int)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was read and found."""
        super().load_state_dict(state_dict)
        if "monitor" not in state_dict:
            rank_zero_warn("CollapseWarning: the checkpoint is from before version 0.2; its histories start anew.")
            return
        self._restore(state_dict)

    @restores(monitor=Mapping, additional=Mapping, verdict=str, readings=Mapping)
    def _restore(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict["monitor"])
        self.additional.load_state_dict(state_dict["additional"])
        self._earlier_verdict = state_dict["verdict"]
        self.readings = {name: list(readings) for name, readings in state_dict["readings"].items()}


def _banks(codebooks: Mapping[str, Recordable]) -> dict[str, PrototypeBank]:
    return {name: codebook for name, codebook in codebooks.items() if isinstance(codebook, PrototypeBank)}


def _planned_ends(trainer: pl.Trainer, codebooks: Mapping[str, Recordable]) -> dict[str, float]:
    """Temperature of every bank and head at the end of its schedule, if there is one, by their names."""
    ends: dict[str, float] = {}
    annealings = [callback for callback in callbacks_of(trainer) if isinstance(callback, TemperatureAnnealing)]
    for name, bank in _banks(codebooks).items():
        for annealing in annealings:
            planned = annealing.end_of(name, bank)
            if planned is not None:
                ends |= {head_name(name, head, bank.num_heads): end for head, end in enumerate(planned)}
    return ends
