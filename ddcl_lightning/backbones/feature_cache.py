"""Token features of samples on disk, by the content of the sample."""

import json
import os
import shutil
import time
import uuid
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import world_size
from ddcl_lightning._utils.files import write_text

CacheDtype = Literal["float16", "float32"]
Rows = npt.NDArray[Any]

SEGMENT_SAMPLES = 256  # samples that wait in memory before they are written, or
SEGMENT_BYTES = 64 * 2**20
INDEX_BYTES = 28  # of a sample beside its values: key, length and check sum
ABANDONED_SECONDS = 3600  # an unfinished segment of that age belongs to a process that was killed


def content_key(*pieces: bytes) -> bytes:
    """Key of a sample: 16 bytes that depend on its content alone."""
    digest = blake2b(digest_size=16)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.digest()


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)} ".encode())
        digest.update(data.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """Append-only store of token features ``(T, D)`` per sample, shared by any number of processes.

    Samples are kept in segments, folders with ``values.npy`` (all tokens of its samples, ``(sum T, D)``) and
    ``index.npz`` (their keys, lengths and check sums). A segment is written under a temporary name and renamed
    when it is complete, so that a process killed at any moment leaves complete segments only; a key that two processes
    have computed is stored twice, with equal values. A damaged segment is deleted, with a warning; one without the
    permission to read is left where it is.

    Where writing fails (a full disk), or more would be stored than ``max_bytes``, it warns once and stores nothing
    more: a cache must not end a run.

    Args:
        folder: Folder of all caches; each has a folder of its own in it.
        recipe: Everything that decides the features, as plain data: features of another recipe are never returned.
        dim: D.
        dtype: Of the stored values; 16 bits halve the space.
        max_bytes: Most that it may hold on disk, what earlier runs have stored included; None takes half of what is
            free besides that.

    Attributes:
        max_bytes: Most that it may hold on disk.
        added_bytes: What this process has added to it.
        path: Folder of this cache, ``folder / <hash of the recipe>``; its ``meta.json`` holds the recipe.

    Raises:
        OSError: If the folder cannot be created.
    """

    @typed
    def __init__(
        self,
        folder: str | Path,
        recipe: Mapping[str, Any],
        dim: int,
        dtype: CacheDtype = "float16",
        max_bytes: int | None = None,
    ) -> None:
        self.dim, self.dtype = dim, np.dtype(dtype)
        meta = json.dumps({**recipe, "embed_dim": dim, "dtype": dtype}, indent=2, sort_keys=True)
        self.path = Path(folder).expanduser() / content_key(meta.encode()).hex()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "meta.json", meta + "\n")
        except OSError as error:
            raise OSError(f"cache_dir {str(folder)!r} cannot be written: {error}. Choose another folder.") from None
        self._segments: dict[str, _Segment] = {}
        self._places: dict[bytes, tuple[str, int]] = {}  # key: name of the segment, number in it
        self._pending = _Pending(self.path)
        # What still waits is written when the cache is dropped, at the latest when the interpreter ends.
        weakref.finalize(self, self._pending.write)
        self._remove_abandoned()
        self.rescan()
        self._full = False
        self.added_bytes = 0  # by this process, of those that share the limit
        stored = self.stored_bytes
        self.max_bytes = stored + shutil.disk_usage(self.path).free // 2 if max_bytes is None else max_bytes
        self._room = max(0, self.max_bytes - stored) // world_size()

    def __len__(self) -> int:
        return len(self._places) + len(self._pending.rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._pending.rows

    @property
    def writable(self) -> bool:
        """True if new samples are kept: False once writing has failed, or the cache is full."""
        return self._pending.writable and not self._full

    @property
    def stored_bytes(self) -> int:
        """Size of the segments on disk that this process knows."""
        return sum(segment.num_bytes for segment in self._segments.values())

    def get(self, key: bytes) -> Rows | None:
        """Features ``(T, D)`` of a sample, None where there are none."""
        waiting = self._pending.rows.get(key)
        if waiting is not None:
            return waiting
        place = self._places.get(key)
        if place is None:
            return None
        name, number = place
        try:
            return self._segments[name].read(number)
        except (OSError, ValueError) as error:
            self._discard(name, error)
            return None

    def add(self, key: bytes, values: Rows) -> Rows:
        """Keep the features of a sample.

        Args:
            key: From :func:`content_key`.
            values: ``(T, D)``.

        Returns:
            The values as :meth:`get` will return them, rounded to the dtype of the cache.

        Raises:
            ValueError: If they have another dimension, or do not fit into 16 bits.
        """
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"values must have shape (T, {self.dim}); got {values.shape}. Give one vector per token.")
        with np.errstate(over="ignore"):
            rounded = np.ascontiguousarray(values, self.dtype)
        if self.dtype == np.float16 and not np.isfinite(rounded).all() and np.isfinite(values).all():
            raise ValueError(
                f"features of up to {np.abs(values).max():.3g} do not fit into cache_dtype='float16', whose largest "
                "number is 65504; use cache_dtype='float32'."
            )
        if key not in self and self.writable and self._has_room(rounded.nbytes + INDEX_BYTES):
            self._pending.put(key, rounded)
            if len(self._pending.rows) >= SEGMENT_SAMPLES or self._pending.bytes >= SEGMENT_BYTES:
                self.flush()
        return rounded

    def _has_room(self, num_bytes: int) -> bool:
        self.added_bytes += num_bytes
        self._full = self.added_bytes > self._room
        if self._full:
            warnings.warn(
                f"the cache in {self.path} is full, at {self.max_bytes / 2**30:.3g} GiB: samples beyond are encoded "
                "every time they are needed. Raise cache_gb, choose another cache_dir, or keep one token per sample.",
                stacklevel=3,
            )
        return not self._full

    def flush(self) -> None:
        """Write the features that wait in memory."""
        name = self._pending.write()
        if name is not None:
            self._open(name)

    def rescan(self) -> None:
        """Read the index of segments that other processes have written."""
        for entry in sorted(self.path.glob("segment-*")):
            if entry.name not in self._segments:
                self._open(entry.name)

    def _open(self, name: str) -> None:
        try:
            segment = _Segment(self.path / name, self.dim, self.dtype)
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            self._discard(name, error)
            return
        self._segments[name] = segment
        for number, key in enumerate(segment.keys()):
            self._places.setdefault(key, (name, number))

    def _discard(self, name: str, error: Exception) -> None:
        # Rights, too many open files, a network that is away: all of it may be whole.
        whole = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        if (self.path / name).exists():  # else somebody has deleted it
            what = "cannot be read" if whole else "are damaged"
            done = "computed again" if whole else "deleted and computed again"
            warnings.warn(f"the cached features in {self.path / name} {what} ({error}): {done}.", stacklevel=2)
            if not whole:
                shutil.rmtree(self.path / name, ignore_errors=True)
        self._segments.pop(name, None)
        self._places = {key: place for key, place in self._places.items() if place[0] != name}

    def _remove_abandoned(self) -> None:
        for entry in self.path.glob("tmp-*"):
            try:
                abandoned = time.time() - entry.stat().st_mtime > ABANDONED_SECONDS
            except OSError:
                continue  # it has just been finished
            if abandoned and entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif abandoned:
                entry.unlink(missing_ok=True)


class _Pending:
    """Samples that wait to become a segment."""

    def __init__(self, path: Path) -> None:
        self.path, self.writable = path, True
        self.rows: dict[bytes, Rows] = {}
        self.bytes = 0

    def put(self, key: bytes, values: Rows) -> None:
        self.rows[key] = values
        self.bytes += values.nbytes

    def write(self) -> str | None:
        """Write the waiting features as a segment and return its name; None where nothing was written."""
        if not self.rows:
            return None
        rows, self.rows, self.bytes = self.rows, {}, 0
        name = uuid.uuid4().hex
        unfinished, finished = self.path / f"tmp-{name}", self.path / f"segment-{name}"
        keys = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
        lengths = np.array([len(values) for values in rows.values()], np.int64)
        checks = np.array([zlib.crc32(values.data) for values in rows.values()], np.uint32)
        try:
            unfinished.mkdir(parents=True)
            _write(unfinished / "values.npy", lambda file: np.save(file, np.concatenate(list(rows.values()))))
            _write(unfinished / "index.npz", lambda file: np.savez(file, keys=keys, lengths=lengths, checks=checks))
            unfinished.rename(finished)
        except OSError as error:
            self.writable = False
            warnings.warn(
                f"features cannot be kept in {self.path} ({error}); the run goes on without keeping more of them. "
                "Make room, or choose another cache_dir.",
                stacklevel=3,
            )
            return None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return finished.name


class _Segment:
    """A complete segment; opening it checks the sizes, the first reading of a sample its content."""

    def __init__(self, path: Path, dim: int, dtype: "np.dtype[Any]") -> None:
        with (path / "index.npz").open("rb") as file, np.load(file, allow_pickle=False) as index:
            self._keys, self._lengths, self._checks = index["keys"], index["lengths"], index["checks"]
        if self._keys.dtype != np.uint8 or self._keys.shape != (len(self._lengths), 16):
            raise ValueError(f"keys of shape {self._keys.shape} for {len(self._lengths)} samples")
        # Mapping the file compares its size with its header; files are not kept open, there may be thousands.
        values = np.load(path / "values.npy", mmap_mode="r", allow_pickle=False)
        if values.shape != (int(self._lengths.sum()), dim) or values.dtype != dtype:
            raise ValueError(f"values of shape {values.shape} and type {values.dtype}")
        self._file, self._header, self._dim, self._dtype = path / "values.npy", int(values.offset), dim, dtype
        self.num_bytes = values.nbytes + INDEX_BYTES * len(self._lengths)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._checked = np.zeros(len(self._lengths), bool)

    def keys(self) -> list[bytes]:
        data = self._keys.tobytes()
        return [data[start : start + 16] for start in range(0, len(data), 16)]

    def read(self, number: int) -> Rows:
        row_bytes = self._dim * self._dtype.itemsize
        values = np.fromfile(
            self._file,
            self._dtype,
            count=int(self._lengths[number]) * self._dim,
            offset=self._header + int(self._starts[number]) * row_bytes,
        )
        if not self._checked[number]:
            if zlib.crc32(values.data) != self._checks[number]:
                raise ValueError(f"sample {number} has another check sum")
            self._checked[number] = True
        return values.reshape(-1, self._dim)


def _write(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    """Write a file that is on the disk, not only in the system's memory, when this returns."""
    with path.open("wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
