"""The artifact store: content key → committed directory, on the local (or a shared) file system.

    <root>/artifacts/<stage>/<key>/manifest.json     written last and at once: no manifest, no artifact
    <root>/artifacts/<stage>/<key>/<attempt>/…       the files that the manifest names, with sizes and digests

Two writers of one key do no harm: each has an attempt folder of its own, and the first manifest stays.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from trainers.errors import StorageError

MANIFEST = "manifest.json"


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A folder to fill; `info` goes into the manifest when the attempt is committed."""

    directory: Path
    info: dict[str, Any] = field(default_factory=dict)


class Store:
    """Artifacts under one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._verified: set[tuple[str, str]] = set()

    def __getstate__(self) -> dict[str, Any]:
        # What this process has checked says nothing to the process that it is sent to.
        return {"root": self.root, "_verified": set()}

    def sweep_dir(self, sweep: str) -> Path:
        """Where a sweep keeps its table, report and logs."""
        return self.root / "sweeps" / sweep

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest of a committed artifact, None where there is none. Raises StorageError."""
        file = self._folder(stage, key) / MANIFEST
        try:
            loaded: dict[str, Any] = json.loads(file.read_text())
            _ = [loaded[name] for name in ("attempt", "files", "info", "started", "seconds")]
            _require_inside(loaded["attempt"], *loaded["files"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{file} is unreadable ({error}); delete its folder to compute it again."
            ) from error
        return loaded

    def complete(self, stage: str, key: str) -> bool:
        """Whether the artifact is committed."""
        return (self._folder(stage, key) / MANIFEST).is_file()

    def read(self, stage: str, key: str) -> Path:
        """The artifact's folder, its files checked against their digests once per process. Raises StorageError."""
        manifest = self.manifest(stage, key)
        if manifest is None:
            raise StorageError(f"artifact {stage}/{key} is not in {self.root}.")
        folder = self._folder(stage, key) / manifest["attempt"]
        if (stage, key) not in self._verified:
            for name, expected in manifest["files"].items():
                if not (folder / name).is_file() or digest_file(folder / name) != expected["sha256"]:
                    raise StorageError(
                        f"{folder / name} is missing or not what was written; delete {folder.parent} and run again."
                    )
            self._verified.add((stage, key))
        return folder

    @contextlib.contextmanager
    def write(self, stage: str, key: str, **inputs: Any) -> Iterator[Attempt]:
        """An attempt at an artifact; committed when the block ends well, removed otherwise."""
        parent = self._folder(stage, key)
        folder = parent / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be written to ({error}); choose another --storage."
            ) from error
        attempt = Attempt(directory=folder)
        started = time.time()
        try:
            yield attempt
            committed = self._commit(stage, key, attempt, started, inputs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if not committed:
            shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, stage: str, key: str, attempt: Attempt, started: float, inputs: dict[str, Any]) -> bool:
        files = sorted(file for file in attempt.directory.rglob("*") if file.is_file())
        manifest = {
            "stage": stage,
            "key": key,
            "attempt": attempt.directory.name,
            "inputs": inputs,
            "files": {
                str(file.relative_to(attempt.directory)): {
                    "size": file.stat().st_size,
                    "sha256": digest_file(file),
                }
                for file in files
            },
            "info": attempt.info,
            "started": started,
            "seconds": time.time() - started,
            "versions": versions(),
            "host": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        return publish(self._folder(stage, key) / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))

    def _folder(self, stage: str, key: str) -> Path:
        return self.root / "artifacts" / stage / key


def _require_inside(*names: str) -> None:
    """Refuse names that lead out of the folder they are relative to. Raises ValueError."""
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} leads out of the artifact's folder")


def publish(file: Path, text: str) -> bool:
    """Make `file` appear whole or not at all; False where it was there first."""
    draft = _draft(file, text)
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"{file} cannot be written ({error}); choose another --storage.") from error
    finally:
        draft.unlink()
    return True


def replace(file: Path, text: str) -> None:
    """Put `text` in the place of whatever `file` held, at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _draft(file, text).replace(file)


def _draft(file: Path, text: str) -> Path:
    # Opened plainly, for the modes that the user's umask gives: a shared store is read by others.
    draft = file.with_name(f".draft-{uuid.uuid4().hex}")
    with draft.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return draft


def digest_file(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a result may owe its last digits to."""
    names = ("rmsweep", "torch", "transformers", "deepspeed", "ray", "tokenizers", "pyarrow", "mlflow")
    return {name: metadata.version(name) for name in names}
