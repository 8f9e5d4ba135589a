"""Files: digests, text that appears whole or not at all, and a disk without room as one named error."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainers.errors import StorageError
from trainers.objects import Location, ObjectPath

# Where a record holds its own digest, and how a file is called until it is whole.
SEAL = "sha256"
DRAFT = ".draft-"
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


def seal(record: dict[str, Any]) -> str:
    """Digest of what a record says, its own digest left out."""
    content = {name: value for name, value in record.items() if name != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish(file: Location, text: str, *, durable: bool = True) -> bool:
    """Make `file` appear whole or not at all; False where it was there first.

    What is not `durable` may be empty after a power cut. Of two that put the same object at once, both are told True,
    and the last one's stays.
    """
    if isinstance(file, ObjectPath):
        if file.is_file():
            return False
        file.write_text(text)
        return True

    def link(draft: Path) -> None:
        try:
            os.link(draft, file)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            raise StorageError(f"{file} cannot be written ({error}); choose another --storage.") from error

    try:
        _put(file, text, link, durable=durable)
    except FileExistsError:
        return False
    return True


def replace_bytes(file: Path, content: bytes) -> None:
    """`replace`, for what is no text."""
    with disk_named(file, len(content)):
        file.parent.mkdir(parents=True, exist_ok=True)
        _put(file, content, lambda draft: draft.replace(file))


def replace(file: Location, text: str) -> None:
    """Put `text` in the place of whatever `file` held, at once."""
    if isinstance(file, ObjectPath):
        file.write_text(text)
        return
    replace_bytes(file, text.encode())


def _put(file: Path, content: str | bytes, move: Callable[[Path], object], *, durable: bool = True) -> None:
    """Write a draft and `move` it to where it belongs; a second one where the first was taken for a dead driver's."""
    for again in (False, True):
        draft = _draft(file, content, durable=durable)
        try:
            move(draft)
            return
        except FileNotFoundError:
            if again:
                raise
        finally:
            draft.unlink(missing_ok=True)


def _draft(file: Path, text: str | bytes, *, durable: bool = True) -> Path:
    # Opened plainly, for the modes that the user's umask gives: a shared store is read by others.
    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        with disk_named(file, len(text)), draft.open("xb") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


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


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """One process of this machine at a time has to do with `file`; others wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
