"""Files to and from a bucket: whole folders up, and down again only what is as it was written."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from trainers.disk import DRAFT, digest_file, disk_named
from trainers.objects import BLOCK_BYTES, Location, ObjectPath

AT_ONCE = 8
CACHE_VARIABLE = "RMSWEEP_CACHE"
Given = TypeVar("Given")
Found = TypeVar("Found")


def cache_of(root: ObjectPath) -> Path:
    """The folder on this machine for what is fetched from a place in a bucket; $RMSWEEP_CACHE says where."""
    place = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rmsweep"
    digest = hashlib.sha256(f"{root.endpoint} {root}".encode()).hexdigest()
    return Path(place).absolute() / f"{root.bucket}-{digest[:12]}"


def upload(folder: Path, names: Iterable[str], target: ObjectPath) -> None:
    """Put the files `names` of a folder below `target`. Raises Unreachable; what is up by then stays."""
    _together(lambda name: _put(folder / name, target / name), names)


def fetch(source: ObjectPath, digests: Mapping[str, str], folder: Path) -> list[str]:
    """Have the objects `digests` (name → SHA-256) below `source` in a folder; names of those that are not as written.

    What the folder holds already is not fetched again. Raises Unreachable, StorageError where there is no room.
    """
    sound = _together(lambda name: _have(source / name, folder / name, digests[name]), digests)
    return [name for name, well in zip(digests, sound, strict=True) if not well]


def remove_tree(path: Location) -> None:
    """Remove a folder and all below it, as far as that goes: what stays is gc's."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.remove_below()


def files_below(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _together(act: Callable[[Given], Found], items: Iterable[Given]) -> list[Found]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(act, items))


def _put(file: Path, target: ObjectPath) -> None:
    with (
        file.open("rb") as source,
        target.named("written"),
        target.filesystem().open_output_stream(target.in_bucket) as sink,
    ):
        while block := source.read(BLOCK_BYTES):
            sink.write(block)


def _have(source: ObjectPath, file: Path, digest: str) -> bool:
    if file.is_file() and digest_file(file) == digest:
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        with disk_named(file):
            found = _get(source, draft)
        if found != digest:
            return False
        draft.replace(file)
    except FileNotFoundError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _get(source: ObjectPath, file: Path) -> str:
    """Write an object into a file: its SHA-256."""
    digest = hashlib.sha256()
    with (
        source.named("read"),
        source.filesystem().open_input_stream(source.in_bucket) as stream,
        file.open("wb") as sink,
    ):
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            sink.write(block)
    return digest.hexdigest()
