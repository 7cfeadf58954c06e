"""Rows of a data set that need not fit in memory: kept there while they are few, in a temporary file otherwise."""

import os
import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

KEPT_BYTES = 2**27  # that a data set may hold in memory; what is larger is read from a file, row by row
CHUNK_BYTES = 2**22  # of rows that are looked at together
MAGIC = (b"\x93NUM", b"PK\x03\x04")  # first bytes of .npy and .npz
T = TypeVar("T")
Floats = npt.NDArray[np.float32]


def why_unreadable(path: Path, error: Exception) -> str:
    """Reason for which NumPy cannot read a file, in a few words: what it does not know it takes for a pickle."""
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    if "pickle" not in reason and "Python objects" not in reason:
        return reason
    with path.open("rb") as file:
        known = file.read(4) in MAGIC
    return "it holds Python objects, not numbers" if known else "it is a file of another kind under that name"


class TemporaryFolder:
    """Folder for rows on disk, deleted with the last object that reads them, in the process that made it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ddcl-data-"))
        self._remove = weakref.finalize(self, _remove_folder, self.path, os.getpid())


def _remove_folder(path: Path, process: int) -> None:
    if os.getpid() == process:  # worker processes read it too, and end earlier
        shutil.rmtree(path, ignore_errors=True)


def require_room(num_bytes: int, what: str) -> None:
    """Say how much disk is about to be used, and refuse if there is not as much.

    Raises:
        ValueError: Naming the folder and how to choose another.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{what} must fit into {folder} as a temporary file of {num_bytes / 2**30:.3g} GiB; {free / 2**30:.3g} GiB "
            "are free. Set TMPDIR to a larger disk, or write the vectors as a .npy file, which is read as it is."
        )
    rank_zero_info(f"{what}: {num_bytes / 2**30:.3g} GiB of {folder} for the run, a temporary file.")


class StoredVectors:
    """Vectors ``(N, F)`` of finite numbers, as an array in memory or in a ``.npy`` file that is read row by row.

    Args:
        source: The array, or the path of the file.
        folder: What keeps the file, if it is temporary.
    """

    def __init__(self, source: npt.NDArray[Any] | Path, folder: TemporaryFolder | None = None) -> None:
        self._source, self._folder = source, folder
        self._array: npt.NDArray[Any] | None = None
        self.shape: tuple[int, int] = (self._open().shape[0], self._open().shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, places: npt.NDArray[np.int64] | slice) -> Floats:
        """Some of the vectors, ``(B, F)``."""
        return np.array(self._open()[places], dtype=np.float32)

    def chunks(self, places: npt.NDArray[np.int64] | None = None) -> Iterator[Floats]:
        """All vectors, or those at places ``(M,)``, a few megabytes at a time."""
        size = chunk_rows(4 * self.shape[1])
        for start in range(0, len(self) if places is None else len(places), size):
            yield self.rows(slice(start, start + size) if places is None else places[start : start + size])

    def _open(self) -> npt.NDArray[Any]:
        if isinstance(self._source, np.ndarray):
            return self._source
        if self._array is None:
            self._array = np.load(self._source, mmap_mode="r", allow_pickle=False)
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        # A map of a file would be copied as a whole; another process opens it for itself.
        return {**self.__dict__, "_array": None}


def chunk_rows(row_bytes: int) -> int:
    """Rows of a size that are looked at together, at least 1."""
    return max(1, CHUNK_BYTES // max(1, row_bytes))


def store_vectors(chunks: Iterable[Floats], shape: tuple[int, int], what: str) -> StoredVectors:
    """Vectors from chunks of rows, in memory if they are few, else in a temporary file.

    Args:
        chunks: N rows of F numbers in all.
        shape: ``(N, F)``.
        what: Whose vectors they are, for what is said of the file.

    Raises:
        ValueError: If the disk has no room for the file.
    """
    num_bytes = 4 * shape[0] * shape[1]
    if num_bytes <= KEPT_BYTES:
        return StoredVectors(np.concatenate(list(chunks)))
    require_room(num_bytes, what)
    folder = TemporaryFolder()
    path = folder.path / "vectors.npy"
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, np.float32).data)
    return StoredVectors(path, folder)


class StoredTexts(Sequence[str]):
    """Texts in a temporary file, of which memory holds only where each begins.

    Made by :func:`store_texts`.
    """

    def __init__(self, folder: TemporaryFolder, offsets: npt.NDArray[np.int64]) -> None:
        self._folder, self._offsets = folder, offsets
        self._bytes: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        if self._bytes is None:
            self._bytes = np.memmap(self._folder.path / "texts", np.uint8, "r")
        row = range(len(self))[place]
        return self._bytes[self._offsets[row] : self._offsets[row + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}


def store_texts(texts: Iterable[str], what: str, size_hint: int = 0) -> Sequence[str]:
    """Texts from a stream, a list while they are few, else in a temporary file.

    Args:
        texts: In order.
        what: Whose texts they are, for what is said of the file.
        size_hint: Bytes that they will take, about.

    Raises:
        ValueError: If the disk has no room for the file.
    """
    kept: list[str] = []
    size = 0
    file: IO[bytes] | None = None
    lengths: list[npt.NDArray[np.int64]] = []
    folder: TemporaryFolder | None = None
    try:
        for text in texts:
            kept.append(text)
            size += len(text)
            if size > (KEPT_BYTES if file is None else CHUNK_BYTES):
                if file is None:
                    require_room(max(size, size_hint), what)
                    folder = TemporaryFolder()
                    file = (folder.path / "texts").open("wb")
                lengths.append(_write_texts(kept, file))
                kept, size = [], 0
        if file is None or folder is None:
            return kept
        lengths.append(_write_texts(kept, file))
    finally:
        if file is not None:
            file.close()
    return StoredTexts(folder, np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))]))


def _write_texts(texts: list[str], file: IO[bytes]) -> npt.NDArray[np.int64]:
    """Length of each text in bytes, once it is written."""
    lengths = np.empty(len(texts), np.int64)
    for place, text in enumerate(texts):
        lengths[place] = file.write(text.encode("utf-8", "surrogatepass"))
    return lengths


class View(Sequence[T]):
    """Sequence that is computed from others as it is read.

    Args:
        length: N.
        get: Gives the value of a place in [0, N).
    """

    def __init__(self, length: int, get: Callable[[int], T]) -> None:
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._get(row) for row in range(*place.indices(self._length))]
        return self._get(range(self._length)[place])


def picked(cells: Sequence[T], rows: npt.NDArray[np.int64]) -> Sequence[T]:
    """Cells at places ``(M,)``: of a list a list, of anything else as they are read."""
    if isinstance(cells, list):
        return [cells[row] for row in rows.tolist()]
    return View(len(rows), _Picked(cells, rows))


def joined(sequences: Sequence[Sequence[T]]) -> Sequence[T]:
    """Sequences one after the other: of lists a list, of anything else as they are read."""
    filled = [cells for cells in sequences if len(cells)]
    if len(filled) == 1:
        return filled[0]
    if all(isinstance(cells, list) for cells in filled):
        return [cell for cells in filled for cell in cells]
    return View(sum(map(len, filled)), _Joined(filled))


class _Picked:
    def __init__(self, cells: Sequence[Any], rows: npt.NDArray[np.int64]) -> None:
        self.cells, self.rows = cells, rows

    def __call__(self, place: int) -> Any:
        return self.cells[int(self.rows[place])]


class _Joined:
    def __init__(self, sequences: Sequence[Sequence[Any]]) -> None:
        self.sequences = sequences
        self.starts = [0, *accumulate(map(len, sequences))]

    def __call__(self, place: int) -> Any:
        number = bisect_right(self.starts, place) - 1
        return self.sequences[number][place - self.starts[number]]
