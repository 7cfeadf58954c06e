"""Where the rows of a data set come from: their numbers in the user's file, and what else it says of them."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

LISTED = 20  # numbers in one line


class Origin(NamedTuple):
    """The file behind a data set of N rows.

    Attributes:
        numbers: Number of each row, ``(N,)`` int64: from 0, headers and blank lines not counted, and counting on from
            one file or split to the next.
        columns: What the file says of each row, N cells by column.
        dropped: Numbers of the rows that are in the file and not in the data set, by reason.
        dropped_cells: What the file says of such rows, cells by column by number, where it is kept.
    """

    numbers: Tensor
    columns: Mapping[str, Sequence[Any]] = {}
    dropped: Mapping[str, Sequence[int]] = {}
    dropped_cells: Mapping[int, Mapping[str, Any]] = {}


def listing(numbers: Sequence[int]) -> str:
    """Row numbers in words, such as ``"rows 3, 17, 40 and 12 more"``."""
    shown = ", ".join(map(str, sorted(numbers)[:LISTED]))
    more = f" and {len(numbers) - LISTED:,} more" if len(numbers) > LISTED else ""
    return f"row{'s' * (len(numbers) != 1)} {shown}{more}"


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ValueError that names the nearest unless all columns are known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"columns must be of {', '.join(known)}; got {name!r}.{hint}")


def writable(cell: Any) -> Any:
    """Value of a cell that every file format can hold: lone surrogates are escaped."""
    return cell.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(cell, str) else cell
