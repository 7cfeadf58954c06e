"""The health of codebooks as plain numbers, and as a table."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ddcl_lightning.functional import effective_number, effective_rank, nearest_codes, total_variance
from ddcl_lightning.monitoring.records import by_head
from ddcl_lightning.monitoring.remedies import GENERIC, Advice
from ddcl_lightning.monitoring.signals import HeadSignals

SHOWN_DEAD = 4  # indices of dead codes in a table
MAX_COMPARED = 4096  # codes whose nearest other is looked for; of more codes every n-th


@dataclass(frozen=True)
class CodebookReport:
    """Health of one codebook, or of one head or group of it, over its latest tokens. NaN and None: not known.

    Distances are relative to the spread of the tokens, their root mean squared distance to their mean; where tokens are
    not known, to the root mean squared norm of the codes. With cosine geometry both are normalised first.

    Attributes:
        num_codes: K.
        num_tokens: Tokens that were counted.
        usage: Share of the codes that a token has, in [0, 1].
        perplexity: Exponential of the entropy of the counts, in [1, K].
        dead: Codes without a token, or None as long as fewer tokens were counted than would tell.
        separation: Relative distance of the closest pair of codes.
        closest: That pair.
        duplicates: Codes with another one closer than the monitor's ``duplicate_distance``.
        token_rank: Effective rank of the tokens (:func:`~ddcl_lightning.functional.effective_rank`), in [1, d].
        code_rank: That of the codes.
        dim: d, or 0.
        spread: Root mean squared distance of the tokens to their mean.
        commitment: Mean squared distance of tokens to their codes over their variance: 0 where they coincide, 1 where
            the codes tell no more than the mean.
        extent: Relative distance of the farthest code to the mean of the tokens.
        farthest: That code.
        non_finite: Tokens and codes with NaN or infinity, and indices outside of [0, K), that were met.
        out_of_range: These indices.
        explained: Share of the variance that a fixed probe's embeddings had at the start which its codes of now
            explain, adjusted for K; of a level of a residual quantizer, with the codes of the levels before it.
        quantizes: Whether the calls returned hard codes, rather than soft assignments alone.
        bank: Signals of a bank, which has a temperature.
        enough: Tokens from which on it is known which codes are dead, at least 50 K.
        advice: What can be done about codes of its kind.
    """

    num_codes: int
    num_tokens: int = 0
    usage: float = math.nan
    perplexity: float = math.nan
    dead: tuple[int, ...] | None = None
    separation: float = math.nan
    closest: tuple[int, int] | None = None
    duplicates: int | None = None
    token_rank: float = math.nan
    code_rank: float = math.nan
    dim: int = 0
    spread: float = math.nan
    commitment: float = math.nan
    extent: float = math.nan
    farthest: int | None = None
    non_finite: int = 0
    out_of_range: int = 0
    explained: float = math.nan
    quantizes: bool = False
    bank: HeadSignals | None = None
    enough: int = 0
    advice: Advice = GENERIC

    @classmethod
    def of_counts(cls, counts: Tensor, num_tokens: int, non_finite: int, dead: Tensor | None) -> "CodebookReport":
        """The report of counts ``(K,)`` alone, with the codes that are dead, ``(K,)`` boolean, where that is known."""
        return cls(
            num_codes=len(counts),
            num_tokens=num_tokens,
            usage=float((counts > 0).double().mean()),
            perplexity=float(effective_number(counts)),
            dead=None if dead is None else tuple(torch.nonzero(dead).flatten().tolist()),
            non_finite=non_finite,
        )

    def of_bank(self, signals: HeadSignals) -> "CodebookReport":
        """This report with the signals of a bank."""
        return replace(self, bank=signals)

    def scalars(self) -> dict[str, float]:
        """Its numbers that are known, by name, for a logger; the signals of a bank among them."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name in LOGGED}
        if self.dead is not None:
            values["dead"] = len(self.dead) / self.num_codes
        if self.duplicates is not None:
            values["near_duplicates"] = self.duplicates / self.num_codes
        if self.bank is not None:
            values |= self.bank.scalars()
        return {name: float(value) for name, value in values.items() if not math.isnan(value)}


LOGGED = (
    "num_codes",
    "usage",
    "perplexity",
    "separation",
    "token_rank",
    "code_rank",
    "spread",
    "commitment",
    "extent",
    "explained",
)


def report_of_tokens(report: CodebookReport, rows: Tensor) -> CodebookReport:
    """A report with the values of tokens ``(M, d + 1)`` in float64, whose last number is the distance to their code."""
    if not len(rows):
        return report
    tokens, errors = rows[:, :-1], rows[:, -1].square()
    variance = float(total_variance(tokens))
    return replace(
        report,
        token_rank=float(effective_rank(tokens)),
        dim=tokens.shape[1],
        spread=math.sqrt(variance),
        commitment=float(errors.nanmean()) / variance if variance > 0 else math.nan,
    )


def report_of_codes(report: CodebookReport, tokens: Tensor, codes: Tensor, duplicate_distance: float) -> CodebookReport:
    """A report with the values of codes ``(K, d)`` beside tokens ``(M, d)``, both in float64."""
    finite = torch.nonzero(torch.isfinite(codes).all(-1)).flatten()
    report = replace(report, dim=codes.shape[1], non_finite=report.non_finite + len(codes) - len(finite))
    codes = codes[finite]
    if not len(codes):
        return report
    report = replace(report, code_rank=float(effective_rank(codes)))
    spread = report.spread if len(tokens) else float(codes.square().sum(-1).mean().sqrt())
    if len(tokens) and spread > 0:
        distances = (codes - tokens.mean(0)).norm(dim=-1)
        last = int(distances.argmax())
        report = replace(report, extent=float(distances[last]) / spread, farthest=int(finite[last]))
    if len(codes) < 2:
        return report
    step = math.ceil(len(codes) / MAX_COMPARED)
    distances, others = nearest_codes(codes, torch.arange(0, len(codes), step))
    first = int(distances.argmin())
    least = float(distances[first])
    pair = sorted((int(finite[first * step]), int(finite[others[first]])))
    close = float((distances <= duplicate_distance * spread).double().mean())
    return replace(
        report,
        separation=0.0 if least == 0 else least / spread if spread > 0 else math.nan,
        closest=(pair[0], pair[1]),
        duplicates=round(close * len(codes)),
    )


COLUMNS: dict[str, Callable[[CodebookReport], str]] = {
    "tokens": lambda row: str(row.num_tokens),
    "used": lambda row: _number(row.usage, ".1%"),
    "perplexity": lambda row: f"{_number(row.perplexity, '.1f')} of {row.num_codes}",
    "dead": lambda row: _dead(row.dead),
    "separation": lambda row: _number(row.separation, ".3g"),
    "near-duplicates": lambda row: "-" if row.duplicates is None else str(row.duplicates),
    "rank of tokens": lambda row: _rank(row.token_rank, row.dim),
    "rank of codes": lambda row: _rank(row.code_rank, row.dim),
    "commitment": lambda row: _number(row.commitment, ".3g"),
    "non-finite": lambda row: str(row.non_finite),
}


class MonitorReport(dict[str, CodebookReport]):
    """Health of every codebook by name; ``str`` makes a table of it."""

    def with_explained(self, explained: Mapping[str, Sequence[float]]) -> "MonitorReport":
        """This report with what a probe told, by the name of a codebook, of each head."""
        values = by_head(explained)
        return MonitorReport({name: replace(row, explained=values.get(name, math.nan)) for name, row in self.items()})

    def __str__(self) -> str:
        if not self:
            return "no codebook was called"
        rows = [["codebook", *COLUMNS]]
        rows += [[name or "(itself)", *(show(row) for show in COLUMNS.values())] for name, row in self.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(cells))
            for cells in (zip(row, widths, strict=True) for row in rows)
        ]
        return "\n".join(line.rstrip() for line in lines)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _rank(value: float, dim: int) -> str:
    return "-" if math.isnan(value) else f"{value:.1f} of {dim}"


def _dead(dead: tuple[int, ...] | None) -> str:
    if not dead:
        return "-" if dead is None else "0"
    shown = ", ".join(map(str, dead[:SHOWN_DEAD])) + (", ..." if len(dead) > SHOWN_DEAD else "")
    return f"{len(dead)} ({shown})"
