"""Files: their digests, and a disk without room as one named error, whichever library met it."""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainers.errors import StorageError

# What libraries say when a write comes back short: Rust's, PyTorch's zip writer, Arrow's.
_NO_ROOM = (
    "no space left",
    "os error 28",
    "disk quota",
    "file write failed",
    "pytorchstreamwriter",
    "iostream error",
)


def digest_file(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Room on the file system of `path`, or of the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_room(path: Path, need: int) -> None:
    """Raise StorageError where fewer than `need` bytes are free at `path`."""
    free = free_bytes(path)
    if free < need:
        raise StorageError(_message(path, need))


@contextlib.contextmanager
def disk_named(path: Path, need: int = 0) -> Iterator[None]:
    """Turn a write that found no room into a StorageError with `path` and what it needs (bytes)."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not _says_no_room(error):
            raise
        raise StorageError(_message(path, need)) from error


def _says_no_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error).lower() for sign in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def _message(path: Path, need: int) -> str:
    wanted = f" about {need / 1e6:,.1f} MB are needed," if need else ""
    return (
        f"no room to write {path}:{wanted} {free_bytes(path) / 1e6:,.1f} MB are free; make room (`gc` lists what no "
        "sweep needs) and run the same command again."
    )
