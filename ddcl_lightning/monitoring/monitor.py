"""The health of any codebook in any loop, without Lightning."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.monitoring.argument_checks import (
    STATE,
    require_check,
    require_model,
    require_reaction,
    require_tensors,
)
from ddcl_lightning.monitoring.code_window import CodeWindow
from ddcl_lightning.monitoring.findings import CollapseError, Finding, verdict
from ddcl_lightning.monitoring.health_report import MonitorReport
from ddcl_lightning.monitoring.judge import Judge
from ddcl_lightning.monitoring.pending_losses import PendingLosses
from ddcl_lightning.monitoring.probe import Probe
from ddcl_lightning.monitoring.recording import record_codebooks
from ddcl_lightning.monitoring.records import CodebookRecord, Geometry, by_head
from ddcl_lightning.monitoring.rules import CollapseRules
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.finding import Named, find_codebooks

PROBE_INTERVAL = 20  # readings between two of the probe while there is no sign
SUSPICION_INTERVAL = 3  # and while there is one


class CodebookMonitor:
    """Monitor of the health of every codebook of a model, or of what it is given.

        monitor = CodebookMonitor(model)  # before the loop
        ...
        monitor.check(loss)  # after each step: warns where a codebook collapses
        ...
        print(monitor.report())  # whenever wanted

    It reads one call of each codebook that :func:`~ddcl_lightning.find_codebooks` finds in ``every_n_calls``, at places
    that follow no period; between them nothing is read, copied or synchronised. Its size is bounded: counts over the
    latest tokens, at least 50 for each code, and a sample of tokens. The model, its copies and its pickles stay as they
    are. Several processes have their own monitors; :meth:`report` and :meth:`check` put them together and are to be
    called on all.

    Args:
        model: Where to look for codebooks, or None to use :meth:`update` alone.
        named: Codebooks that are not recognised, by the names of their modules, see
            :func:`~ddcl_lightning.find_codebooks`.
        kinds: Kinds of codebooks of your own.
        every_n_calls: Calls of a codebook of which one is read, at least 1.
        tokens_per_pass: Tokens of one pass over the data, if codes are to count as dead only after a whole pass: for
            data in an order, such as by class. Of calls that are read, the share of it is waited for that is read.
        probe: A function that calls the model with some 512 samples, always the same, as
            ``lambda: model(images[:512])``. It lets the monitor measure whether codes still tell apart what they told
            apart at the start, and is called in evaluation mode, without gradients, at every 20th reading, and at every
            third while there is a sign.
        rules: Thresholds; a mapping of some of them will do.
        on_collapse: What :meth:`check` does on an alarm: ``"warn"``, ``"raise"``, or ``"ignore"`` beyond returning it.

    Attributes:
        armed: Whether calls are read. Set it to False for an evaluation that is not to count.
        codebooks: What was found, by name.
        findings: All notices and alarms so far.
        latest: The report of the last check.

    Raises:
        ValueError: If there is no codebook in the model, a name is wrong, or a number out of its range.
    """

    @typed
    def __init__(
        self,
        model: nn.Module | None = None,
        named: Named = (),
        kinds: Sequence[type[CodebookSource]] = (),
        *,
        every_n_calls: int = 10,
        tokens_per_pass: int | None = None,
        probe: Callable[[], Any] | None = None,
        rules: CollapseRules | None = None,
        on_collapse: Literal["warn", "raise", "ignore"] = "warn",
    ) -> None:
        require_at_least(1, every_n_calls=every_n_calls, tokens_per_pass=tokens_per_pass)
        require_reaction(on_collapse)
        self.rules, self.on_collapse = rules or CollapseRules(), on_collapse
        self.tokens_per_pass = tokens_per_pass or 0
        self._windows: dict[str, CodeWindow] = {}
        self._judge = Judge(self.rules)
        self._unread = False  # whether there is something to judge
        self._losses = PendingLosses()
        self._steps = self._step = 0  # the second of the last reading
        self._readings = 0
        self._probed = 0  # reading of the last probe
        self._probed_step: int | None = None
        self._probe_interval = 1  # readings
        self._first: dict[str, Tensor] = {}  # first embeddings of a probe that is not there yet
        self._explained: dict[str, list[float]] = {}
        self.latest = MonitorReport()
        self.codebooks = {} if model is None else find_codebooks(model, named, kinds)
        require_model(model, self.codebooks, probe)
        self.probe: Probe | None = None
        self.every_n_calls = every_n_calls
        self._recorder = record_codebooks(self.codebooks, self._receive, armed=True, every_n_calls=every_n_calls)
        if probe is not None and model is not None:
            self.use_probe(Probe(model, self.codebooks, probe))
            self.read_probe()

    @property
    def armed(self) -> bool:
        """True if calls are read."""
        return self._recorder.armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._recorder.armed = armed

    @property
    def findings(self) -> list[Finding]:
        """All notices and alarms so far, the earliest first."""
        return list(self._judge.findings)

    def update(
        self,
        tokens: Tensor | None,
        codebook: Tensor | None,
        indices: Tensor,
        mask: Tensor | None = None,
        name: str = "codebook",
        *,
        geometry: Geometry = "euclidean",
        num_codes: int = 0,
    ) -> None:
        """Add what a codebook saw and returned.

        Args:
            tokens: ``(*, d)``, for H heads ``(*, H * d)``, or None.
            codebook: ``(K, d)`` or ``(H, K, d)``, or None of an implicit one.
            indices: Integers ``(*)`` or ``(*, H)`` in [0, K), -1 at padding.
            mask: ``(*)`` boolean, True for valid tokens.
            name: Of the codebook in the report.
            geometry: ``"cosine"`` where only directions are compared.
            num_codes: K of an implicit codebook.

        Raises:
            TypeError: If something is no tensor, the indices are not integers or the mask is not boolean.
            ValueError: If sizes do not fit.
        """
        require_tensors(["indices"], tokens=tokens, codebook=codebook, indices=indices, mask=mask)
        self.add(name, CodebookRecord.of_codes(tokens, codebook, indices, mask, num_codes=num_codes, geometry=geometry))

    def _receive(self, name: str, record: CodebookRecord) -> None:
        self.add(name, record, math.ceil(self.tokens_per_pass / self.every_n_calls))

    def add(self, name: str, record: CodebookRecord, tokens_per_pass: int | None = None) -> None:
        """Add the record of a call of a codebook, of so many tokens in a pass (by default those of the monitor)."""
        window = self._windows.get(name)
        if window is None or not window.fits(record):  # one that was resized starts anew
            in_pass = self.tokens_per_pass if tokens_per_pass is None else tokens_per_pass
            window = self._windows[name] = CodeWindow(record, in_pass)
            self._judge.forget(name)
        window.add(record)
        self._unread = True

    def lengthen(self, name: str, tokens: int) -> None:
        """Wait for so many tokens at least before codes of a codebook count as dead."""
        if name in self._windows:
            self._windows[name].lengthen(tokens)

    def check(
        self,
        loss: Tensor | float | None = None,
        *,
        step: int | None = None,
        planned_end: Mapping[str, float] | None = None,
        from_data: bool = True,
    ) -> list[Finding]:
        """Judge what was read since the last time, and warn of alarms; to be called after every step.

        Args:
            loss: Of this step, of the task or the reconstruction. Leave it out where the codebook's own loss is all
                that is trained: that one falls when everything collapses.
            step: Number of the step, by default that of the calls of this method.
            planned_end: Temperature that a schedule ends at, by the name of the bank in the report.
            from_data: Whether codes started from tokens; others have to travel to them first.

        Returns:
            What is new: notices, which may be harmless, and alarms. Nothing where no call was read.

        Raises:
            CollapseError: On an alarm, with ``on_collapse="raise"``.
            TypeError, ValueError: If an argument is something else.
        """
        require_check(step, planned_end)
        if loss is not None:
            self.add_loss(loss)
        self._steps = self._steps + 1 if step is None else step
        return self.judge(self._steps, planned_end=planned_end, from_data=from_data) if self._unread else []

    def judge(
        self, step: int, *, planned_end: Mapping[str, float] | None = None, from_data: bool = True
    ) -> list[Finding]:
        """Judge what was read, as :meth:`check` does where there is something; on all processes, or on none."""
        self._unread, self._step = False, step
        self._readings += 1
        if self._probe_is_due():
            self.read_probe()
        self.latest = self.report().with_explained(self._explained)
        loss = self._losses.take()
        return self._tell(self._judge.judge(step, self.latest, loss, planned_end=planned_end, from_data=from_data))

    def conclude(self) -> list[Finding]:
        """Read the probe at the end of a run, so that the verdict is on what was trained; on all processes.

        Returns:
            Alarms of signs that hold, where the probe shows harm that it did not show before.
        """
        if self.probe is None or not self.latest:
            return []
        self.latest, self._probed_step = self.latest.with_explained(self.probe.read()), None
        return self._tell(self._judge.judge_probe(self._step, self.latest))

    def _tell(self, new: list[Finding]) -> list[Finding]:
        alarms = [str(finding) for finding in new if finding.level == "alarm"]
        if alarms and self.on_collapse == "raise":
            raise CollapseError("; ".join(alarms))
        if self.on_collapse == "warn":
            for alarm in alarms:
                rank_zero_warn(f"CodebookMonitor: {alarm}")
        return new

    def add_loss(self, loss: Tensor | float) -> None:
        """Keep the loss of a step, a number or a tensor of one, until the next reading, without waiting for it."""
        self._losses.add(loss)

    @property
    def is_due(self) -> bool:
        """True if there is something that :meth:`check` has not judged."""
        return self._unread

    def use_probe(self, probe: Probe, readings: int = 1) -> None:
        """Take a probe; it goes on from the first embeddings of the one before, or of a state that was loaded.

        Args:
            probe: The probe.
            readings: Its cost: so many readings apart it takes as long as 5 % of the training between them.
        """
        first = self._first if self.probe is None else self.probe.state_dict()
        self.probe, self._probe_interval, self._first = probe, readings, {}
        probe.load_state_dict(first)

    def add_finding(self, finding: Finding) -> None:
        """Add what was found by other means."""
        self._judge.findings.append(finding)

    def read_probe(self) -> None:
        """Read the probe now; all processes have to call it."""
        if self.probe is not None:
            self._probed, self._explained, self._probed_step = self._readings, self.probe.read(), self._step

    def _probe_is_due(self) -> bool:
        """True now and then, more often while there is a sign."""
        suspicious = any(self._judge.holding(name) for name in self._judge.histories)
        patience = SUSPICION_INTERVAL if suspicious else PROBE_INTERVAL
        return self._readings - self._probed >= max(patience, self._probe_interval * (1 if suspicious else 5))

    def report(self) -> MonitorReport:
        """Health of every codebook that was called, by name, one entry per head; ``print`` shows a table.

        Heads are ``name/head0`` and so on. Where several processes train, all have to call it.
        """
        called = gather_objects(list(self._windows))
        rows = {
            name: window.report(self.rules.duplicate_distance)
            for name in called[0]  # in one order everywhere
            if (window := self._windows.get(name)) and all(name in names for names in called)
        }
        return MonitorReport(by_head(rows))

    def verdict(self, findings: Sequence[Finding] | None = None) -> str:
        """One line for every codebook: how it was at the last reading, and what was found when."""
        given = self.findings if findings is None else findings
        return "\n".join(
            verdict(name, row, given, self._judge.holding(name), self._judge.best_explained(name), self._probed_step)
            for name, row in self.latest.items()
        )

    def forget(self, name: str) -> None:
        """Start the history of a codebook anew, after it was changed from outside."""
        self._windows.pop(name, None)
        self._judge.forget(name)

    def reset(self) -> None:
        """Forget what was read and found."""
        self._windows.clear()
        self._judge = Judge(self.rules)
        self._losses, self._unread, self._probed_step = PendingLosses(), False, None
        self._readings = self._probed = self._steps = self._step = 0
        self.latest = MonitorReport()

    def close(self) -> None:
        """Read no further calls."""
        self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        """State with which a resumed loop goes on as the uninterrupted one would: tensors and plain values."""
        return {
            "windows": {name: window.state_dict() for name, window in self._windows.items()},
            "judge": self._judge.state_dict(),
            "counts": [self._steps, self._readings, self._probed],
            "steps": [self._step, self._probed_step],
            "calls": dict(self._recorder.calls),
            "probe": self._first if self.probe is None else self.probe.state_dict(),
            "explained": {name: list(values) for name, values in self._explained.items()},
            "losses": self._losses.state(),
        }

    @restores(**STATE)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; a ValueError for anything else."""
        self._windows = {name: CodeWindow.from_state(saved) for name, saved in state["windows"].items()}
        self._judge.load_state_dict(state["judge"])
        self._steps, self._readings, self._probed = state["counts"]
        self._step, self._probed_step = state.get("steps", [self._steps, None])
        self._recorder.calls.update(state.get("calls", {}))
        self._losses = PendingLosses(state["losses"])
        self._first, self._explained = dict(state["probe"]), dict(state["explained"])
        if self.probe is not None:
            self.probe.load_state_dict(self._first)

    def __getstate__(self) -> dict[str, Any]:
        """State without the model: a copy, as of a module that holds a monitor, keeps the numbers and reads nothing."""
        return {**self.__dict__, "codebooks": {}, "probe": None}

    def __enter__(self) -> "CodebookMonitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
