"""The decomposition L_q = L_OLS + V, checked by a check that can fail."""

from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._base import BankCallback, log_name
from ddcl_lightning.functional import DecompositionErrors, decompose, decomposition_errors
from ddcl_lightning.monitoring.recording import BankRecord

# Relative to the energy of the batch; measured worst cases over random problems are in docs/measurements.md.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Four units of the last of 10 or 7 bits, where the user lets products of float32 matrices have no more.
REDUCED = {"highest": 0.0, "high": 2e-3, "medium": 1.6e-2}


class DecompositionViolationError(RuntimeError):
    """Error that the loss terms of a layer do not satisfy the decomposition."""


class _Check(NamedTuple):
    """Result of the check of one bank on one process."""

    failures: list[str]
    error: float  # of the identity and of L_q, relative to the energy
    variance: float  # smallest V of a head
    coinciding: list[int]  # heads whose prototypes are one point
    num_prototypes: int
    temperature: list[float]


class DecompositionCheck(BankCallback):
    """Callback that checks the loss terms of every bank against the decomposition in float64 (eq. 3).

    ``L_q`` is recomputed from pairwise distances, ``L_OLS`` from the centroids and ``V`` from the spread of prototypes
    around them, each on its own, for the very tokens of the batch, and held against the terms that entered the loss.
    A wrong softmax, padding inside a mean, assignments that do not sum to one or a NaN make it fail.

    So does a bank of several prototypes that coincide: at every level of a hierarchy V must be > 0 (Proposition 5).
    Where prototypes differ and V is 0 all the same, assignments are hard to the last bit of float64; that is said once
    for each bank, and is no violation.

    Args:
        every_n_batches: Interval between checks; nothing is read in between.
        on_violation: ``"raise"`` stops the run, ``"warn"`` goes on and counts.
        tolerance: Largest error relative to the energy of the batch; by default 1e-12 for float64 and 1e-5 for
            float32 and for half precisions, whose terms are computed in float32 (2e-3 and 1.6e-2 under
            ``torch.set_float32_matmul_precision("high")`` and ``"medium"``).

    Attributes:
        checks: Checks made so far.
        violations: Checks that failed so far.
        smallest_variance: Smallest V seen so far of any head, by bank.

    Raises:
        ValueError: If an argument is out of its range.
        DecompositionViolationError: On a violation, with ``on_violation="raise"``.
    """

    @typed
    def __init__(
        self,
        every_n_batches: int = 50,
        on_violation: Literal["raise", "warn"] = "raise",
        tolerance: float | None = None,
    ) -> None:
        super().__init__(every_n_batches)
        if on_violation not in ("raise", "warn"):
            raise ValueError(f"on_violation must be 'raise' or 'warn'; got {on_violation!r}. Choose one of them.")
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(
                f"tolerance must be in (0, 1), relative to the energy; got {tolerance}. Leave it out for the default."
            )
        self.on_violation, self.tolerance = on_violation, tolerance
        self.checks = self.violations = 0
        self.smallest_variance: dict[str, float] = {}

    def forget(self) -> None:
        """Set the counts of checks and violations to zero."""
        self.checks = self.violations = 0
        self.smallest_variance = {}

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, records: dict[str, BankRecord]) -> None:
        """Check the terms of one batch."""
        local = {name: self._check(observed) for name, observed in records.items()}
        # Each process checks the terms that it trained with; a violation of one is one of all, so that none waits.
        checks = gather_objects(local)
        for name in dict.fromkeys(name for results_of_process in checks for name in results_of_process):
            results = [results_of_process[name] for results_of_process in checks if name in results_of_process]
            self.checks += 1
            variance = min(result.variance for result in results)
            pl_module.log(log_name(name, "decomposition_error"), max(result.error for result in results))
            pl_module.log(log_name(name, "variance"), variance)
            failures = list(dict.fromkeys(failure for result in results for failure in result.failures))
            failures += self._without_spread(name, trainer, results[0], variance)
            if failures:
                self.violations += 1
                self._report(name, trainer, failures)

    def _check(self, observed: BankRecord) -> _Check:
        errors = decomposition_errors(
            observed.tokens, observed.codebook, observed.temperature, observed.terms, observed.mask
        )
        return _Check(
            find_violations(errors, observed.terms.loss.dtype, self.tolerance),
            max(errors.identity, errors.loss),
            float(exact_variance(observed, errors, self.tolerance).min()),
            torch.nonzero(coincide(observed.codebook)).flatten().tolist(),
            observed.codebook.shape[1],
            observed.temperature.tolist(),
        )

    def _without_spread(self, name: str, trainer: pl.Trainer, check: _Check, variance: float) -> list[str]:
        """Remember the smallest V, and say where it is 0 without need."""
        before = self.smallest_variance.get(name, float("inf"))
        self.smallest_variance[name] = now = min(before, variance)
        if check.num_prototypes == 1:
            return []
        if check.coinciding:
            return [
                f"V > 0: its {check.num_prototypes} prototypes coincide in heads {check.coinciding}, and get the same "
                "gradients for ever; lower the temperature below the critical one of this bank's tokens "
                "(CollapseWarning shows T / T_c) and start anew"
            ]
        if now <= 0 < before:
            rank_zero_info(
                f"DecompositionCheck: V = 0 at step {trainer.global_step} in bank {name!r}, whose prototypes differ: "
                f"at T = {check.temperature} every token of the batch is on one prototype to the last bit of "
                "float64, as in k-means, and nothing moves prototypes apart. End the temperature higher to change it."
            )
        return []

    def _report(self, name: str, trainer: pl.Trainer, failures: list[str]) -> None:
        message = f"decomposition violated at step {trainer.global_step} in bank {name!r}: {'; '.join(failures)}."
        if not failures[0].startswith("V > 0"):
            message += (
                " The terms that entered the loss are not those of eq. 3 for these tokens: check a changed softmax, "
                "the mask, or arithmetic in too low a precision."
            )
        if self.on_violation == "raise":
            raise DecompositionViolationError(message)
        rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Counts of checks and violations."""
        return {
            **super().state_dict(),
            "checks": self.checks,
            "violations": self.violations,
            "smallest_variance": self.smallest_variance,
        }

    @restores(batches=int, checks=int, violations=int)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        super().load_state_dict(state_dict)
        self.checks, self.violations = state_dict["checks"], state_dict["violations"]
        self.smallest_variance = dict(state_dict.get("smallest_variance", {}))  # version 0.1.0 did not keep it


def find_violations(errors: DecompositionErrors, dtype: torch.dtype, tolerance: float | None = None) -> list[str]:
    """Violations of a decomposition, one phrase per wrong term; empty if all terms are right.

    Args:
        errors: Errors from :func:`~ddcl_lightning.functional.decomposition_errors`.
        dtype: Precision in which the trained terms were computed.
        tolerance: Largest error relative to the energy; by default that of the precision.
    """
    allowed = _allowed(dtype, tolerance)
    # Rounding of the logits moves loss between L_OLS and V in proportion to energy / T; their sum does not feel it.
    split = allowed * max(1.0, errors.sharpness)
    rows = max(allowed, TOLERANCES[torch.float64])
    limits = {
        # Weights that were handed over carry the rounding of their own precision.
        "|L_q - (L_OLS + V)| from the definitions": (
            errors.identity,
            TOLERANCES[torch.float64] + min(errors.rows, rows),
        ),
        "L_q against the trained value": (errors.loss, allowed),
        "L_OLS against the trained value": (errors.ols, split),
        "V against the trained value": (errors.variance, split),
        "|sum_k q - 1|": (errors.rows, rows),
    }
    return [
        f"{name}: relative error {error:.3g} > {limit:.3g}"
        for name, (error, limit) in limits.items()
        if not error <= limit  # a NaN is a violation
    ]


def exact_variance(record: BankRecord, errors: DecompositionErrors, tolerance: float | None = None) -> Tensor:
    """V ``(H,)`` float64: the trained one where it is far above its rounding, else that of the definitions.

    Args:
        record: What the bank read.
        errors: Its errors.
        tolerance: That of :func:`find_violations`.
    """
    trained = record.terms.variance.double()
    rounding = _allowed(record.terms.loss.dtype, tolerance)
    if bool((trained > 100 * rounding * max(1.0, errors.sharpness) * errors.energy).all()):
        return trained
    return decompose(record.tokens, record.codebook, record.temperature, record.mask).variance


def coincide(prototypes: Tensor) -> Tensor:
    """True for heads ``(H,)`` whose prototypes ``(H, K, d)`` are one point up to rounding."""
    spread = (prototypes - prototypes[:, :1]).abs().amax((1, 2))
    return spread <= 4 * torch.finfo(prototypes.dtype).eps * prototypes.abs().amax((1, 2))


def _allowed(dtype: torch.dtype, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    reduced = 0.0 if dtype == torch.float64 else REDUCED[torch.get_float32_matmul_precision()]
    return max(TOLERANCES[dtype], reduced)
