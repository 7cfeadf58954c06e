"""How exactly the decomposition L_q = L_OLS + V holds, and whether its check notices what is broken.

A million random problems, of every shape, scale, offset, temperature and mask, are solved by the fused layer in
float64, float32 and bfloat16, and held against the float64 decomposition as ``DecompositionCheck`` does it. In a tenth
of them the layer is then broken on purpose, in five ways.

    python benchmarks/decomposition.py            # a few minutes on two cores
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from _random_problems import Problems, draw
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table
from torch import Tensor

from ddcl_lightning.callbacks.decomposition_check import TOLERANCES, find_violations
from ddcl_lightning.functional import (
    Decomposition,
    DecompositionErrors,
    decompose,
    decomposition_errors,
    masked_mean,
    prototype_attention,
    soft_assign,
)
from ddcl_lightning.functional.decomposition import energy_floor

CASES = {  # chunks have one shape and precision; some have the size of a real batch
    "random": Case(
        "random problems", {"problems": 1_000_000, "chunk": 2_000, "large_chunks": 60, "large": [4096, 512, 64]}
    )
}
QUICK = {
    "random": Case("random problems", {"problems": 3_000, "chunk": 100, "large_chunks": 3, "large": [512, 64, 16]})
}
LARGE_CHUNK = 2
BROKEN_EVERY = 10  # chunks
NOTICEABLE = 1e-3  # a breakage that moves a term by this fraction of the energy
FIELDS = DecompositionErrors._fields
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def solve(p: Problems) -> Decomposition:
    """Loss terms of the fused layer."""
    return prototype_attention(p.tokens, p.prototypes, p.temperature, p.mask).terms


@torch.no_grad()
def errors_of_each(p: Problems, trained: Decomposition, exact: Decomposition, energy: Tensor) -> Tensor:
    """:func:`decomposition_errors` without the maximum over leading dimensions: ``(B, 7)``, columns as there."""
    weights = soft_assign(p.tokens.double(), p.prototypes.double(), p.temperature.double())
    rows = (weights.sum(-1) - 1).abs()
    if p.mask is not None:
        rows = rows.masked_fill(~p.mask, 0.0)
    columns = [
        (exact.loss - exact.ols - exact.variance).abs() / energy,
        *((term.double() - true).abs() / energy for term, true in zip(trained, exact, strict=True)),
        rows.amax(-1),
        energy,
        energy / p.temperature.double(),
    ]
    return torch.stack(columns, -1)


@torch.no_grad()
def energy_of_each(p: Problems) -> Tensor:
    """The energy that errors are relative to, ``(B,)``; see :class:`DecompositionErrors`."""
    tokens, prototypes = p.tokens.double(), p.prototypes.double()
    weights = soft_assign(tokens, prototypes, p.temperature.double())
    center = prototypes.mean(-2, keepdim=True)
    spread = (tokens - center).square().sum(-1)
    spread = spread + (weights @ (prototypes - center).square().sum(-1, keepdim=True)).squeeze(-1)
    computed = torch.float64 if p.tokens.dtype == torch.float64 else torch.float32
    return masked_mean(spread, p.mask) + energy_floor(p.prototypes, computed)


def compare_with_library(p: Problems, trained: Decomposition, errors: Tensor) -> None:
    """The vectorised errors of a problem must be those of the library; a difference is a bug of this script."""
    mask = None if p.mask is None else p.mask[:1]
    first = Decomposition(*(term[:1] for term in trained))
    expected = decomposition_errors(p.tokens[:1], p.prototypes[:1], p.temperature[:1], first, mask)
    for name, error, reference in zip(FIELDS, errors[0].tolist(), expected, strict=True):
        if abs(error - reference) > 1e-6 * abs(reference) + 1e-13:
            raise AssertionError(f"{name} is {error} here and {reference} in decomposition_errors.")


# Breakages -----------------------------------------------------------------------------------------


def plain_terms(p: Problems, weights: Tensor, centre_of_variance: Tensor | None = None) -> Decomposition:
    """Terms from given assignments, in the precision of the layer; optionally with V around another point."""
    center = p.prototypes.to(weights.dtype).mean(-2, keepdim=True)
    z, prototypes = p.tokens.to(weights.dtype) - center, p.prototypes.to(weights.dtype) - center
    centroids = weights @ prototypes
    around = centroids if centre_of_variance is None else centre_of_variance
    compute = "donot_use_mm_for_euclid_dist"
    ols = (z - centroids).square().sum(-1)
    variance = (weights * torch.cdist(around, prototypes, compute_mode=compute).square()).sum(-1)
    ols, variance = (masked_mean(term, p.mask) for term in (ols, variance))
    return Decomposition(ols + variance, ols, variance)


def wrong_temperature(p: Problems) -> Decomposition:
    """The layer uses a temperature 10 % too high."""
    return prototype_attention(p.tokens, p.prototypes, 1.1 * p.temperature, p.mask).terms


def mask_leak(p: Problems) -> Decomposition:
    """Padding enters the means."""
    return prototype_attention(p.tokens, p.prototypes, p.temperature).terms


def rows_off(p: Problems) -> Decomposition:
    """Assignments sum to 1.01."""
    return plain_terms(p, 1.01 * soft_assign(p.tokens, p.prototypes, p.temperature))


def wrong_centroid(p: Problems) -> Decomposition:
    """V is taken around the mean of the prototypes, not around each token's soft centroid."""
    weights = soft_assign(p.tokens, p.prototypes, p.temperature)
    return plain_terms(p, weights, torch.zeros_like(p.tokens, dtype=weights.dtype))


def not_a_number(p: Problems) -> Decomposition:
    """One of the terms is NaN."""
    terms = list(solve(p))
    broken = int(p.temperature.sum() * 1e6) % 3
    terms[broken] = torch.full_like(terms[broken], math.nan)
    return Decomposition(*terms)


BREAKAGES: dict[str, Callable[[Problems], Decomposition]] = {
    "temperature": wrong_temperature,
    "mask": mask_leak,
    "rows": rows_off,
    "centroid": wrong_centroid,
    "nan": not_a_number,
}


# Accounting ----------------------------------------------------------------------------------------


class Tally:
    """Errors of all problems of one precision."""

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.violations = 0
        self.examples: list[str] = []
        self.broken = {name: [0, 0, 0, 0] for name in BREAKAGES}  # tried, caught, noticeable, caught of these

    def add(self, errors: Tensor, exact: Decomposition, dtype: torch.dtype) -> None:
        """Count the problems of a chunk."""
        for row in errors.tolist():
            if failures := find_violations(DecompositionErrors(*row), dtype):
                self.violations += 1
                self.examples += failures[: max(0, 5 - len(self.examples))]
        self.errors.append(errors)
        self.losses.append(exact.loss)

    def add_broken(self, name: str, errors: Tensor, dtype: torch.dtype) -> None:
        """Count what is caught of a breakage."""
        counts = self.broken[name]
        for row in errors.tolist():
            caught = bool(find_violations(DecompositionErrors(*row), dtype))
            moved = not max(row[1:4]) <= NOTICEABLE or any(map(math.isnan, row[1:4]))
            for place, true in enumerate((True, caught, moved, moved and caught)):
                counts[place] += true

    def summary(self) -> dict[str, Any]:
        """Worst and 99.99th percentile of every error, and the tolerances that nothing would have violated."""
        errors = torch.cat(self.errors)
        losses = torch.cat(self.losses)
        column = dict(zip(FIELDS, errors.unbind(-1), strict=True))
        softened = column["sharpness"].clamp(min=1.0)
        positive = losses > torch.finfo(torch.float64).tiny
        relative = column["energy"][positive] / losses[positive]
        by_name = {
            "identity": column["identity"],
            "loss": column["loss"],
            "ols": column["ols"],
            "variance": column["variance"],
            "ols_softened": column["ols"] / softened,
            "variance_softened": column["variance"] / softened,
            "identity_relative": column["identity"][positive] * relative,
            "loss_relative": column["loss"][positive] * relative,
        }
        return {
            "problems": len(errors),
            "violations": self.violations,
            "examples_of_violations": self.examples,
            "sharpness": {"lowest": float(column["sharpness"].min()), "highest": float(column["sharpness"].max())},
            "errors": {
                name: {"worst": float(values.max()), "p99.99": percentile(values, 0.9999)}
                for name, values in by_name.items()
            },
            "broken": {
                name: {"problems": tried, "caught": caught, "noticeable": moved, "caught_of_noticeable": both}
                for name, (tried, caught, moved, both) in self.broken.items()
            },
        }


def percentile(values: Tensor, fraction: float) -> float:
    """Empirical percentile; ``torch.quantile`` refuses more than 16 million entries and interpolates."""
    return float(values.sort().values[min(len(values) - 1, math.ceil(fraction * len(values)) - 1)])


def random_shape(generator: torch.Generator) -> tuple[int, int, int]:
    """N, K and d, each log-uniform up to 128, 64 and 64."""
    exponents = torch.rand(3, generator=generator).tolist()
    n, k, d = (int(limit**exponent) for limit, exponent in zip((129, 65, 65), exponents, strict=True))
    return n, k, d


def run(config: Config, seed: int, options: Options) -> Run:
    """Errors, violations and what is caught, by precision."""
    problems, size = config["problems"], config["chunk"]
    generator = torch.Generator().manual_seed(seed)
    tallies = {name: Tally() for name in DTYPES}
    chunks = math.ceil(problems / size)
    for number in range(chunks + config["large_chunks"]):
        name = list(DTYPES)[number % len(DTYPES)]
        dtype, tally = DTYPES[name], tallies[name]
        torch.set_flush_denormal(number // len(DTYPES) % 2 == 1)  # as in fit, and as outside of it
        if number < chunks:
            p = draw(min(size, problems - number * size), random_shape(generator), dtype, generator)
        else:
            p = draw(LARGE_CHUNK, config["large"], dtype, generator)
        trained = solve(p)
        precision = trained.loss.dtype
        exact, energy = decompose(p.tokens, p.prototypes, p.temperature, p.mask), energy_of_each(p)
        errors = errors_of_each(p, trained, exact, energy)
        compare_with_library(p, trained, errors)
        tally.add(errors, exact, precision)
        if number // len(DTYPES) % BROKEN_EVERY == 0:
            for breakage, broken in BREAKAGES.items():
                if broken is mask_leak and (p.mask is None or bool(p.mask.all())):
                    continue
                # A problem without padding has nothing to leak.
                leaks = slice(None) if broken is not mask_leak else ~p.mask.all(-1)  # type: ignore[union-attr]
                tally.add_broken(breakage, errors_of_each(p, broken(p), exact, energy)[leaks], precision)
    torch.set_flush_denormal(False)
    return {"precisions": {name: tally.summary() for name, tally in tallies.items()}}


PRECISIONS = {"float64": "float64", "float32": "float32", "bfloat16": "bfloat16 tokens"}
ERRORS = {  # of what, relative to what
    "identity": "L_q = L_OLS + V among the float64 terms (energy)",
    "loss": "trained L_q (energy)",
    "ols_softened": "trained L_OLS (energy times max(1, energy / T))",
    "variance_softened": "trained V (the same)",
    "ols": "trained L_OLS (energy)",
    "variance": "trained V (energy)",
    "loss_relative": "trained L_q (L_q itself)",
}
LABELS = {
    "temperature": "temperature 10 % too high",
    "mask": "padding enters the means",
    "rows": "assignments sum to 1.01",
    "centroid": "V around the mean of the prototypes",
    "nan": "NaN in one term",
}


def scientific(value: float) -> str:
    """``1.5e-7`` for 1.5e-07."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def errors_table(results: Results) -> Table:
    by_precision = results.of("random")[0]["precisions"]
    rows = [["error of (relative to)", *(f"{label}: worst, 99.99 %" for label in PRECISIONS.values())]]
    for error, label in ERRORS.items():
        pairs = (by_precision[name]["errors"][error] for name in PRECISIONS)
        rows.append([label, *(f"{scientific(pair['worst'])}, {scientific(pair['p99.99'])}" for pair in pairs)])
    tallies = (by_precision[name] for name in PRECISIONS)
    counts = (f"{tally['violations']} of {tally['problems']:,}" for tally in tallies)
    return [*rows, ["violations under the default tolerances", *counts]]


def breakages_table(results: Results) -> Table:
    by_precision = results.of("random")[0]["precisions"]
    rows = [["breakage", *(f"{label}: all, noticeable" for label in PRECISIONS.values())]]
    for breakage, label in LABELS.items():
        tallies = (by_precision[name]["broken"][breakage] for name in PRECISIONS)
        cells = (
            f"{100 * tally['caught'] / max(tally['problems'], 1):.1f} %, "
            f"{100 * tally['caught_of_noticeable'] / max(tally['noticeable'], 1):.2f} %"
            for tally in tallies
        )
        rows.append([label, *cells])
    return rows


STUDY = Study(
    "decomposition",
    CASES,
    run,
    {"errors": errors_table, "breakages": breakages_table},
    settings={
        "tolerances": {str(dtype).removeprefix("torch."): value for dtype, value in TOLERANCES.items()},
        "noticeable": NOTICEABLE,
    },
    quick=QUICK,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
