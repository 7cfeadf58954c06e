"""The health of codebooks as plain numbers, and as a table."""

import math
from collections.abc import Callable
from dataclasses import dataclass

SHOWN_DEAD = 4  # indices of dead codes in a table


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
        commitment: Mean squared distance of tokens to their codes over their variance: 0 where they coincide, 1 where
            the codes tell no more than the mean.
        non_finite: Tokens and codes with NaN or infinity, and codes outside of [0, K), that were met.
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
    commitment: float = math.nan
    non_finite: int = 0


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
