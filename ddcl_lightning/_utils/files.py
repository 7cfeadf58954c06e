"""Files that are written completely or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """Context manager of a temporary file in the same folder, which is renamed to ``path`` if no error occurs.

    ``path`` stays as it was until then, and after an error, an interruption or a kill.

    Args:
        path: File to write; its folder must exist. A symbolic link is followed.
        suffix: End of the name of the temporary file, by default that of ``path``, which some writers need to choose
            a format. A kill leaves the temporary file: choose a suffix that is not taken for a complete file.

    Raises:
        OSError: If it cannot be written, with the file, the reason and what to do; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    draft: Path | None = None
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{target.stem[:40]}-",
            suffix=f".part{target.suffix}" if suffix is None else suffix,
            dir=target.parent,
        )
        draft = Path(name)
        os.close(handle)
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        draft.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(draft, target)
        draft = None
    except OSError as error:
        raise _refusal(error, path) from error
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink()


def make_folder(path: str | Path, argument: str) -> None:
    """Make a folder, with those above it.

    Raises:
        OSError: If it cannot be made, naming the argument.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(_no_folder(path, argument, error)) from error


def check_folder(path: str | Path, argument: str) -> None:
    """Raise unless files can be written into a folder, which is made where it is missing; nothing is left behind.

    Raises:
        ValueError: Naming the argument.
    """
    target = Path(path)
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise ValueError(_no_folder(path, argument, error)) from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def check_file(path: str | Path, argument: str) -> None:
    """Raise unless a file can be written, into a folder that exists; nothing is left behind.

    Raises:
        ValueError: Naming the argument.
    """
    target = Path(path)
    if not target.parent.is_dir():
        folder = str(target.parent)
        raise ValueError(f"{argument} must lie in an existing folder; there is no {folder!r}. Create it first.")
    if target.is_dir():
        raise ValueError(f"{argument} must be a file; {str(path)!r} is a folder. Name a file in it.")
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=Path(os.path.realpath(target)).parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument} must be a file that you may write; {str(path)!r} is none ({error.strerror or error}). Choose "
            "another."
        ) from error


def _no_folder(path: str | Path, argument: str, error: OSError) -> str:
    return (
        f"{argument} must be a folder that may be written to; {str(path)!r} is none ({error.strerror or error}). "
        "Choose another."
    )


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole, in UTF-8; a lone surrogate, which has no encoding, is written as its escape.

    Raises:
        OSError: As :func:`whole_file`.
    """
    with whole_file(path) as draft:
        draft.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refusal(error: OSError, path: str | Path) -> OSError:
    reason = error.strerror or str(error)
    message = f"{str(path)!r} cannot be written ({reason}); what was there before is as it was. Make room or choose "
    return type(error)(f"{message}another place, and try again.")


def refuse_input(path: str | Path, owner: object, argument: str) -> None:
    """Raise if a file to write is one that is read.

    Args:
        path: File to write.
        owner: A data module, whose attributes name the files that it reads, or None.
        argument: Name of the argument that gave the path.

    Raises:
        ValueError: If the file is one that the data module reads.
    """
    target = Path(path)
    if owner is None or not target.exists():
        return
    for name, value in vars(owner).items():
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(entry, (str, Path)) and Path(entry).is_file() and target.samefile(entry):
                raise ValueError(
                    f"{argument} must not be a file that is read; {str(path)!r} is {name} of the data, and would be "
                    "overwritten. Name another file."
                )
