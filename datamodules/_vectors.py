"""Feature vectors from what a user has: an array, a table in memory, or a file."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddcl_lightning.datamodules._optional import require
from ddcl_lightning.datamodules._parquet import ParquetColumn, open_parquet, record_batches
from ddcl_lightning.datamodules._storage import Floats, StoredVectors, store_vectors, why_unreadable
from ddcl_lightning.datamodules._tables import Columns, check_names, frame_columns, read_columns, require_column

Source: TypeAlias = str | Path | npt.NDArray[Any] | Tensor | pd.DataFrame
FEATURES = "features"  # column, or array of a .npz, that is taken unasked
NUMBERS_OF_ROWS = ("id", "index")  # columns of numbers that are no features unless they are named
REMEDY = " Name the column of vectors, or list those of numbers, as features."
_ARRAY_RULE = "path must hold numbers of shape (N, F), a row per item"


class VectorTable(NamedTuple):
    """Vectors ``(N, F)``, and the columns beside them.

    Attributes:
        vectors: The features.
        columns: Cells of all other columns.
        separate: Whether each feature is a column of its own, which may have a unit of its own.
    """

    vectors: StoredVectors
    columns: Columns
    separate: bool = False


def read_vectors(source: Source, features: str | Sequence[str] | None, others: Sequence[str]) -> VectorTable:
    """Vectors of an array, a table in memory or a file, and the columns beside them.

    Args:
        source: Array, DataFrame or path of a file: .npy, .npz, or a table.
        features: Of a table the column of vectors or the columns of numbers, of a .npz the name of the array.
        others: Columns that are no features unless they are named.

    Raises:
        ValueError: If it holds no vectors of finite numbers, or the features cannot be told.
        FileNotFoundError: If there is no such file.
    """
    if isinstance(source, pd.DataFrame):
        return _from_columns(frame_columns("path", source), features, others, "the DataFrame")
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return VectorTable(_from_array(source, "the array"), {})
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        if not path.is_file():
            raise FileNotFoundError(f"path must be an existing file; got {path}. Correct the path.")
        return VectorTable(_from_npy(path) if suffix == ".npy" else _from_npz(path, features), {})
    if suffix == ".parquet" and path.is_file():
        return _from_parquet(path, features, others)
    return _from_columns(read_columns("path", path), features, others, path)


def is_table(source: Source) -> bool:
    """True if there may be columns beside the vectors."""
    if isinstance(source, (str, Path)):
        return Path(source).suffix.lower() not in (".npy", ".npz")
    return isinstance(source, pd.DataFrame)


# Arrays -----------------------------------------------------------------------------------------


def _from_npy(path: Path) -> StoredVectors:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error, "an array that numpy.save wrote") from None
    _check_form(array, path)
    vectors = StoredVectors(path)
    _check_finite(vectors, array, path)
    return vectors


def _from_npz(path: Path, name: str | Sequence[str] | None) -> StoredVectors:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array: name it .npy")
            names = list(file.files)
            if name is None:
                name = names[0] if len(names) == 1 else FEATURES
            if not isinstance(name, str) or name not in names:
                raise KeyError(name)
            return _from_array(file[name], f"{name!r} of {path}")
    except KeyError:
        raise ValueError(
            f"features must name an array of {path}, which has {', '.join(names) or 'none'}; got {name!r}. Name the "
            "array of the vectors."
        ) from None
    except (ValueError, OSError, EOFError) as error:
        if str(error).startswith(("path must", "features must")):
            raise
        raise _unreadable(path, error, "arrays that numpy.savez wrote") from None


def _unreadable(path: Path, error: Exception, what: str) -> ValueError:
    reason = why_unreadable(path, error)
    return ValueError(f"path must be {what}; {path} cannot be read ({reason}). Save it anew, as numbers (N, F).")


def _from_array(array: npt.NDArray[Any], where: Path | str) -> StoredVectors:
    _check_form(array, where)
    vectors = StoredVectors(array)
    _check_finite(vectors, array, where)
    return vectors


def _check_form(array: Any, where: Path | str) -> None:
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "fiu"
    if not numbers or array.ndim != 2 or not array.size:
        form = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        flat = isinstance(array, np.ndarray) and array.ndim == 1 and array.size
        remedy = "Reshape it to (N, 1) if it is one feature." if flat else "Convert it to such an array."
        raise ValueError(f"{_ARRAY_RULE}; {where} has {form}. {remedy}")


def _check_finite(vectors: StoredVectors, array: npt.NDArray[Any], where: Path | str) -> None:
    start = 0
    with np.errstate(over="ignore"):
        for chunk in vectors.chunks():
            _require_finite(chunk, array[start : start + len(chunk)], where, start)
            start += len(chunk)


def _require_finite(chunk: Floats, raw: npt.NDArray[Any], where: Path | str, start: int) -> None:
    """Refuse rows of which the first is number ``start``, as they are in float32 and before."""
    broken = ~np.isfinite(chunk)
    if broken.any():
        row, column = (int(place) for place in np.argwhere(broken)[0])
        raise ValueError(
            f"features must be finite numbers in float32; row {start + row}, column {column} of {where} (from 0) has "
            f"{raw[row, column]}. Correct or remove it."
        )


# Tables -----------------------------------------------------------------------------------------


def _chosen(
    features: str | Sequence[str] | None,
    columns: Mapping[str, Any],
    others: Sequence[str],
    kind: Callable[[str], str],
    where: Path | str,
) -> list[str]:
    """Columns of the features: those that are named, or the one of vectors, or all of numbers."""
    if features is not None:
        names = [features] if isinstance(features, str) else list(features)
        if not names:
            raise ValueError(f"features must name at least one column of {where}; got an empty list.{REMEDY}")
        for name in names:
            require_column(dict(columns), "features", name, where, REMEDY)
        return names
    if FEATURES in columns:
        return [FEATURES]
    kinds = {name: kind(name) for name in columns if name not in others}
    vectors = [name for name in kinds if kinds[name] == "vector"]
    if len(vectors) > 1:
        raise ValueError(
            f"features must name the column of vectors of {where}, which has {', '.join(vectors)}; got None. Name one."
        )
    names = vectors or [
        name for name in kinds if kinds[name] == "number" and name.strip().lower() not in NUMBERS_OF_ROWS
    ]
    if not names:
        raise ValueError(
            f"features must be columns of numbers, or one of vectors; {where} has none among "
            f"{', '.join(columns) or 'no columns'}.{REMEDY}"
        )
    shown = ", ".join(names if len(names) <= 6 else [*names[:5], "...", names[-1]])
    left = ", ".join(name for name in columns if name not in names) or "none"
    rank_zero_info(f"features: {shown} of {where} ({len(names)} columns); not features: {left}.")
    return names


def _kind(cells: Sequence[Any]) -> str:
    """Kind of the first cell that is not missing: a ``"vector"``, a ``"number"`` or something else."""
    cell = next((cell for cell in cells if cell is not None and cell != ""), None)
    if isinstance(cell, (list, tuple, np.ndarray)):
        return "vector"
    if isinstance(cell, bool) or not isinstance(cell, (int, float, str, np.number)):
        return "other"
    try:
        float(cell)
    except ValueError:
        return "other"
    return "number"


def _lists(cells: Sequence[Any]) -> Sequence[Any]:
    """Cells, or the lists that they are the text of, ``"[0.1, 0.2]"``, as pandas writes them to CSV."""
    if not (len(cells) and isinstance(cells[0], str) and cells[0].lstrip().startswith("[")):
        return cells
    try:
        lists = [json.loads(cell) for cell in cells]
    except (TypeError, ValueError):
        return cells
    return lists if all(isinstance(row, list) for row in lists) else cells


def _from_columns(
    columns: Columns, features: str | Sequence[str] | None, others: Sequence[str], where: Path | str
) -> VectorTable:
    columns = {name: _lists(cells) for name, cells in columns.items()}
    names = _chosen(features, columns, others, lambda name: _kind(columns[name]), where)
    cells = [columns[name] for name in names]
    vectors = len(names) == 1 and _kind(cells[0]) == "vector"
    rows = cells[0] if vectors else list(zip(*cells, strict=True))
    try:
        array = np.array([[float(value) for value in row] for row in rows])
        if array.ndim != 2:
            raise ValueError
    except (TypeError, ValueError):
        raise _misfit(rows, names, vectors, where) from None
    rest = {name: cell for name, cell in columns.items() if name not in names}
    return VectorTable(_from_array(array, where), rest, separate=not vectors)


def _misfit(rows: Sequence[Any], names: list[str], vectors: bool, where: Path | str) -> ValueError:
    """The error of the first row that is not as many numbers as the first."""
    rule = f"features must hold numbers, equally many in each row; row {{}} (from 0) of {where} has {{}}.{REMEDY}"
    width = len(rows[0]) if isinstance(rows[0], (list, tuple, np.ndarray)) else -1
    for number, row in enumerate(rows):
        if not isinstance(row, (list, tuple, np.ndarray)):
            return ValueError(rule.format(number, f"{row!r:.40} as {names[0]!r}"))
        for place, value in enumerate(row):
            try:
                float(value)
            except (TypeError, ValueError):
                column = names[0] if vectors else names[place]
                shown = "nothing" if value is None or value == "" else f"{value!r:.40}"
                return ValueError(rule.format(number, f"{shown} as {column!r}"))
        if len(row) != width or not width:
            return ValueError(rule.format(number, f"{len(row)} numbers, and row 0 {width}"))
    return ValueError(rule.format(0, "none"))


# Parquet ----------------------------------------------------------------------------------------


def _from_parquet(path: Path, features: str | Sequence[str] | None, others: Sequence[str]) -> VectorTable:
    types = require("pyarrow", "parquet").types
    with open_parquet(path) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
    check_names(schema.names, path)
    if not num_rows:
        raise ValueError(f"path must hold at least one row; {path} has none. Name a file that has.")
    fields = {field.name: field.type for field in schema}

    def kind(name: str) -> str:
        field = fields[name]
        if types.is_list(field) or types.is_large_list(field) or types.is_fixed_size_list(field):
            return "vector" if _is_number(field.value_type) else "other"
        return "number" if _is_number(field) else "other"

    def _is_number(field: Any) -> bool:
        return bool(types.is_integer(field) or types.is_floating(field))

    names = _chosen(features, fields, others, kind, path)
    kinds = {name: kind(name) for name in names}
    wrong = next((name for name in names if kinds[name] != ("vector" if len(names) == 1 else "number")), None)
    if wrong is not None and kinds[wrong] != "number":
        cell = next(iter(ParquetColumn(path, wrong)))
        raise ValueError(
            f"features must hold numbers, equally many in each row; row 0 of {path} has {cell!r:.40} as "
            f"{wrong!r}.{REMEDY}"
        )
    width = len(names) if "vector" not in kinds.values() else _first_length(path, names[0])
    chunks = _parquet_chunks(path, names, kinds[names[0]] == "vector", width)
    vectors = store_vectors(chunks, (num_rows, width), f"the vectors of {path}")
    rest: Columns = {name: ParquetColumn(path, name) for name in fields if name not in names}
    return VectorTable(vectors, rest, separate="vector" not in kinds.values())


def _first_length(path: Path, name: str) -> int:
    """Numbers in the first vector of a column."""
    first = next(record_batches(path, [name])).column(0)[0]
    return len(first.as_py() or ())


def _parquet_chunks(path: Path, names: list[str], vectors: bool, width: int) -> Iterator[Floats]:
    compute = require("pyarrow.compute", "parquet")
    start = 0
    for batch in record_batches(path, names):
        columns = batch.columns
        if vectors:
            lengths = compute.fill_null(compute.list_value_length(columns[0]), -1).to_numpy(zero_copy_only=False)
            values = columns[0].flatten()
            uneven = np.flatnonzero((lengths != width) | (lengths < 1))
            if len(uneven) or values.null_count:
                row = (
                    int(uneven[0])
                    if len(uneven)
                    else next(place for place, cell in enumerate(columns[0].to_pylist()) if None in cell)
                )
                size = f"{lengths[row]} numbers, and row 0 {width}" if len(uneven) else "a gap in its numbers"
                raise ValueError(
                    f"features must hold numbers, equally many in each row; row {start + row} (from 0) of {path} has "
                    f"{size if lengths[row] >= 0 else 'nothing'} as {names[0]!r}. Correct or remove it."
                )
            raw = values.to_numpy(zero_copy_only=False).reshape(len(lengths), width)
        else:
            for name, column in zip(names, columns, strict=True):
                if column.null_count:
                    row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
                    raise ValueError(
                        f"features must hold numbers, equally many in each row; row {row} (from 0) of {path} has "
                        f"nothing as {name!r}. Correct or remove it."
                    )
            raw = np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
        with np.errstate(over="ignore"):
            chunk = raw.astype(np.float32)
        _require_finite(chunk, raw, path, start)
        start += len(chunk)
        yield chunk
