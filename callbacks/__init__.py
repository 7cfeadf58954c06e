"""Lightning callbacks for any LightningModule that holds a prototype bank."""

from ddcl_lightning._utils.distributed import (
    from_first_process,
    gather_rows,
    on_every_process,
    report,
    sum_over_processes,
)
from ddcl_lightning.callbacks._base import BankCallback
from ddcl_lightning.callbacks.adaptive_bank_size import AdaptiveBankSize
from ddcl_lightning.callbacks.assignment_writer import AssignmentWriter
from ddcl_lightning.callbacks.collapse_warning import CollapseWarning
from ddcl_lightning.callbacks.decomposition_check import DecompositionCheck, DecompositionViolationError
from ddcl_lightning.callbacks.descent_check import DescentCheck, DescentViolationError
from ddcl_lightning.callbacks.exact_resume import ExactResume
from ddcl_lightning.callbacks.fit_summary import FitSummary
from ddcl_lightning.callbacks.kmeans_initialization import KMeansInitialization
from ddcl_lightning.callbacks.level_figures import LevelFigures
from ddcl_lightning.callbacks.prototype_figures import PrototypeFigures
from ddcl_lightning.callbacks.ratio_guard import RatioGuard
from ddcl_lightning.callbacks.reconstruction_figures import ReconstructionFigures
from ddcl_lightning.callbacks.save_on_signal import SaveOnSignal
from ddcl_lightning.callbacks.temperature_annealing import TemperatureAnnealing
from ddcl_lightning.monitoring.findings import CollapseError

__all__ = [
    "AdaptiveBankSize",
    "AssignmentWriter",
    "BankCallback",
    "CollapseError",
    "CollapseWarning",
    "DecompositionCheck",
    "DecompositionViolationError",
    "DescentCheck",
    "DescentViolationError",
    "ExactResume",
    "FitSummary",
    "KMeansInitialization",
    "LevelFigures",
    "PrototypeFigures",
    "RatioGuard",
    "ReconstructionFigures",
    "SaveOnSignal",
    "TemperatureAnnealing",
    "from_first_process",
    "gather_rows",
    "on_every_process",
    "report",
    "sum_over_processes",
]
