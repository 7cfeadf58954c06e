"""The step of the prototypes, checked on the batch that it was made from."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._base import BankCallback, log_name
from ddcl_lightning.functional import (
    assignment_statistics,
    decompose,
    descent_violation,
    largest_stable_rate,
    lyapunov,
)
from ddcl_lightning.monitoring.recording import BankRecord
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.optim.token_normalized import TokenNormalized


class DescentViolationError(RuntimeError):
    """Error that a step has raised what it was to lower."""


class _Reading(NamedTuple):
    """A step of one bank on the tokens of one process, ``(H,)`` each."""

    before: Tensor
    after: Tensor
    loss: Tensor  # L_q before the step
    mass: Tensor  # (H, K)
    tokens: int


class DescentCheck(BankCallback):
    """Callback that compares what the prototypes descend before and after their step, on the tokens of its batch.

    That is ``L_q``, or the free energy ``L_q - T H`` where the bank holds assignments constant or
    :class:`~ddcl_lightning.TokenNormalized` steps (:func:`~ddcl_lightning.functional.lyapunov`), at the T of the batch,
    for the tokens as the bank read them. A step that raises it is too large: its rate is at its limit. No forward pass
    of the model is needed, only two readings of the bank in float64, so nothing of the training changes.

    It judges plain gradient steps and token-normalized ones. Momentum, Adam, and another loss that reaches the
    prototypes may raise it a little at any rate; ``tolerance`` leaves room for them (figures: ``docs/stability.md``).
    Where a batch calls a bank several times, the last call counts.

    Args:
        every_n_batches: Interval between checks; nothing is read in between.
        on_violation: ``"warn"`` once per run and bank, and go on and count, or ``"raise"``.
        tolerance: Largest rise relative to ``L_q``, finite and >= 0.

    Attributes:
        checks: Steps checked so far; a batch after which the prototypes have not moved has none.
        violations: Steps that raised it by more than the tolerance.

    Raises:
        ValueError: If an argument is out of its range, or gradients are accumulated over batches at the start: one
            batch then says nothing of their step.
        DescentViolationError: On a violation, with ``on_violation="raise"``.
    """

    @typed
    def __init__(
        self,
        every_n_batches: int = 50,
        on_violation: Literal["warn", "raise"] = "warn",
        tolerance: float = 0.05,
    ) -> None:
        super().__init__(every_n_batches)
        if on_violation not in ("warn", "raise"):
            raise ValueError(f"on_violation must be 'warn' or 'raise'; got {on_violation!r}. Choose one of them.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, relative to L_q; got {tolerance}. Pass 0 or more.")
        self.on_violation, self.tolerance = on_violation, tolerance
        self._reported: set[str] = set()
        self.checks = self.violations = 0

    def forget(self) -> None:
        """Set the counts of checks and violations to zero."""
        self.checks = self.violations = 0
        self._reported = set()

    def bank_resized(self, name: str) -> None:
        """Drop the record of a bank whose prototypes have been replaced since."""
        self._records.pop(name, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse accumulated gradients, and attach the recorder."""
        window = _window(trainer, pl_module)
        if self._banks and window > 1:
            raise ValueError(
                f"accumulate_grad_batches must be 1 for DescentCheck, which compares a step with its batch; got "
                f"{window}. Remove one of them."
            )
        super().on_train_start(trainer, pl_module)

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, records: dict[str, BankRecord]) -> None:
        """Compare before and after the step of one batch."""
        local = {}
        if _window(trainer, pl_module) == 1:
            for name, record in records.items():
                reading = _read(self._banks[name], record, self._constant(trainer.optimizers, self._banks[name]))
                local.update({} if reading is None else {name: reading})
        # One step of all processes together descends the mean over all of their tokens.
        readings = gather_objects(local)
        for name in dict.fromkeys(name for of_process in readings for name in of_process):
            joint = _joint([of_process[name] for of_process in readings if name in of_process])
            self.checks += 1
            rise = (joint.after - joint.before) / joint.loss.clamp(min=torch.finfo(torch.float64).tiny)
            pl_module.log(log_name(name, "descent"), float(rise.max()))
            heads = descent_violation(joint.before, joint.after, joint.loss, self.tolerance)
            if bool(heads.any()):
                self.violations += 1
                self._report(trainer, name, float(rise[heads].max()), joint)

    def _constant(self, optimizers: list[Optimizer], bank: PrototypeBank) -> bool:
        """True if the step of a bank holds assignments constant."""
        groups = [group for each in optimizers if isinstance(each, TokenNormalized) for group in each.param_groups]
        normalized = any(parameter is bank.prototypes for group in groups for parameter in group["params"])
        return bank.detach_assignments or normalized

    def _report(self, trainer: pl.Trainer, name: str, rise: float, reading: _Reading) -> None:
        constant = self._constant(trainer.optimizers, self._banks[name])
        limit = float(largest_stable_rate(reading.mass).min())
        message = (
            f"DescentCheck: the step before step {trainer.global_step} raised {'L_q - T H' if constant else 'L_q'} of "
            f"bank {name!r} on its own batch by {rise:.2g} of L_q, more than {self.tolerance:g}: its rate is at its "
            "limit. Lower lr_prototypes. Plain gradient steps on L_q with detached assignments are stable below "
            f"{limit:.3g}, divided by the weight of L_q in the loss; another loss that reaches the prototypes, or "
            "momentum, can raise it too."
        )
        if self.on_violation == "raise":
            raise DescentViolationError(message)
        if name not in self._reported:
            self._reported.add(name)
            rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Counts of checks and violations, and the banks that were reported."""
        counts = {"checks": self.checks, "violations": self.violations}
        return {**super().state_dict(), **counts, "reported": sorted(self._reported)}

    @restores(batches=int, checks=int, violations=int, reported=Sequence)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        super().load_state_dict(state_dict)
        self.checks, self.violations = state_dict["checks"], state_dict["violations"]
        self._reported = set(state_dict["reported"])


def _window(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    """Batches per step of the optimizers."""
    if module.automatic_optimization:
        return int(trainer.accumulate_grad_batches)
    return int(getattr(module, "accumulate_grad_batches", 1))


@torch.no_grad()
def _read(bank: PrototypeBank, record: BankRecord, constant: bool) -> _Reading | None:
    """The last step of a bank, or None if it has not moved, or is another bank by now."""
    latest = bank.prototypes.detach()
    if latest.shape != record.codebook.shape or torch.equal(latest, record.codebook):
        return None
    z, temperature = record.tokens.double(), record.temperature.double()
    values, losses, masses = [], [], []
    for prototypes in (record.codebook.double(), latest.double()):
        loss = decompose(z, prototypes, temperature, record.mask).loss
        statistics = assignment_statistics(z, prototypes, temperature, record.mask)
        values.append(lyapunov(loss, temperature, statistics.entropy, detach_assignments=constant).cpu())
        losses.append(loss.cpu())
        masses.append(statistics.mass.cpu())
    return _Reading(values[0], values[1], losses[0], masses[0], record.valid_tokens().shape[1])


def _joint(readings: list[_Reading]) -> _Reading:
    """Means over the tokens of all processes."""
    total = sum(reading.tokens for reading in readings)
    before, after, loss, mass = (
        torch.stack([values * (reading.tokens / total) for values, reading in zip(field, readings, strict=True)]).sum(0)
        for field in zip(*((each.before, each.after, each.loss, each.mass) for each in readings), strict=True)
    )
    return _Reading(before, after, loss, mass, total)
