"""Columns of a parquet file, read a few rows at a time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from ddcl_lightning.datamodules._optional import require

BATCH_ROWS = 256  # that are decoded together
BUFFER_BYTES = 2**20  # of the file that is read at once, in the place of a whole column chunk


class ParquetColumn(Sequence[Any]):
    """Cells of a column, None where one is missing; memory holds those around the last one that was read.

    Reading in order decodes each row once; a jump decodes the row group that it leads to.

    Args:
        path: The file.
        name: Of the column.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        with open_parquet(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self._starts: list[int] = [0, *accumulate(sizes)]
        self._first, self._cells = 0, list[Any]()
        self._rest: Iterator[list[Any]] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Any]:
        for cells in self._from_group(0):
            yield from cells

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        group = next(number for number, end in enumerate(self._starts[1:]) if row < end)
        ahead = self._first + len(self._cells)  # the row that comes next
        if self._rest is None or row < self._first or self._starts[group] > ahead:
            self._first, self._cells = self._starts[group], []
            self._rest = self._from_group(group)
        while row >= self._first + len(self._cells):
            self._first += len(self._cells)
            self._cells = next(self._rest)
        return self._cells[row - self._first]

    def _from_group(self, group: int) -> Iterator[list[Any]]:
        for batch in record_batches(self.path, [self.name], first_group=group):
            yield batch.column(0).to_pylist()

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_first": 0, "_cells": [], "_rest": None}


def open_parquet(path: Path) -> Any:
    """The file, to be closed by the caller.

    Raises:
        ImportError: If pyarrow is missing.
        ValueError: If it is no parquet file.
    """
    parquet, arrow = require("pyarrow.parquet", "parquet"), require("pyarrow", "parquet")
    try:
        return parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (arrow.ArrowInvalid, OSError) as error:
        raise unreadable(path, error) from None


def record_batches(path: Path, columns: Sequence[str], first_group: int = 0) -> Iterator[Any]:
    """Rows of some columns, ``BATCH_ROWS`` at a time, as record batches of pyarrow in the order of the columns.

    Raises:
        ValueError: If the file is damaged.
    """
    arrow = require("pyarrow", "parquet")
    with open_parquet(path) as file:
        groups = list(range(first_group, file.metadata.num_row_groups))
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns)):
                yield batch.select(list(columns))
        except (arrow.ArrowInvalid, OSError) as error:
            raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> ValueError:
    """The error of a damaged file."""
    reason = str(error).splitlines()[0].rstrip(".")
    return ValueError(f"{path} must be a parquet file; it cannot be read ({reason}). Write it once more.")


def uncompressed_bytes(path: Path, name: str) -> int:
    """Size of a column before compression; of repeated texts less than they take when decoded."""
    with open_parquet(path) as file:
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        columns = (group.column(place) for group in groups for place in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] == name)
