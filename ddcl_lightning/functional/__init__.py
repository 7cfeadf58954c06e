"""The mathematics of DDCL-Attention as pure functions: no state, no Lightning.

Shapes follow one convention: ``tokens`` are ``(..., N, d)``, ``prototypes`` ``(..., K, d)``, ``mask`` ``(..., N)`` with
True for valid tokens, and the leading dimensions (usually one, the heads) are shared.
"""

from ddcl_lightning.functional._common import masked_mean
from ddcl_lightning.functional.assignment import (
    BankOutput,
    Decomposition,
    nearest_prototype,
    prototype_attention,
    prototype_attention_reference,
    sample_codes,
    soft_assign,
)
from ddcl_lightning.functional.decomposition import DecompositionErrors, decompose, decomposition_errors
from ddcl_lightning.functional.diagnostics import (
    AssignmentStatistics,
    Separation,
    assignment_statistics,
    effective_dimension,
    repulsion_energy,
    separation,
    total_variance,
)
from ddcl_lightning.functional.effective_numbers import effective_number, effective_rank, nearest_codes
from ddcl_lightning.functional.id_collisions import TupleGroups, assign_balanced, disambiguate, group_tuples
from ddcl_lightning.functional.means import assign_codes, token_means
from ddcl_lightning.functional.phase_transition import (
    critical_factor,
    critical_temperature,
    prototype_critical_temperatures,
    split_margins,
)
from ddcl_lightning.functional.quantization import quantize
from ddcl_lightning.functional.split import SplitTest, split_test
from ddcl_lightning.functional.stability import descent_violation, free_energy, largest_stable_rate, lyapunov
from ddcl_lightning.functional.token_statistics import (
    Cells,
    Moments,
    TokenStatistics,
    cells_of,
    code_counts,
    moments_of,
)

__all__ = [
    "AssignmentStatistics",
    "BankOutput",
    "Cells",
    "Decomposition",
    "DecompositionErrors",
    "Moments",
    "Separation",
    "SplitTest",
    "TokenStatistics",
    "TupleGroups",
    "assign_balanced",
    "assign_codes",
    "assignment_statistics",
    "cells_of",
    "code_counts",
    "critical_factor",
    "critical_temperature",
    "decompose",
    "decomposition_errors",
    "descent_violation",
    "disambiguate",
    "effective_dimension",
    "effective_number",
    "effective_rank",
    "free_energy",
    "group_tuples",
    "largest_stable_rate",
    "lyapunov",
    "masked_mean",
    "moments_of",
    "nearest_codes",
    "nearest_prototype",
    "prototype_attention",
    "prototype_attention_reference",
    "prototype_critical_temperatures",
    "quantize",
    "repulsion_energy",
    "sample_codes",
    "separation",
    "soft_assign",
    "split_margins",
    "split_test",
    "token_means",
    "total_variance",
]
