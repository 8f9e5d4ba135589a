"""The artifact store: content key → files, committed atomically and never edited, in a folder or a bucket.

    <root>/artifacts/<stage>/<key>/manifest.json     written last: without a manifest there is no artifact
    <root>/artifacts/<stage>/<key>/<attempt>/…       the files that the manifest names, with sizes and digests

A training has two artifacts under its key: `train` holds its log, `weights` its models, which can be evicted.

Two writers of one key do no harm: each writes its own attempt folder, and the first manifest stays. Only the manifest of
a damaged artifact is ever replaced.

For a bucket (docs/storage.md) the files are written below `local`, uploaded, and then the manifest is put; files that are
read are downloaded to `local` and checked against their digests there.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from trainers.errors import Damaged, StorageError, Unreachable
from trainers.storage import (
    CACHE_VARIABLE,
    DRAFT,
    SEAL,
    Location,
    ObjectPath,
    at_once,
    cache_of,
    digest_file,
    disk_named,
    fetch,
    files_below,
    is_written,
    publish,
    remove_tree,
    replace,
    seal,
    upload,
)

MANIFEST = "manifest.json"
WEIGHTS = "weights"
# The index of manifests already read from a bucket. With more than MANY still to read, the index in the bucket helps.
INDEX = "manifests.json"
MANY = 200
# How long a listing of a bucket is trusted. A manifest that it lacks is requested; a removed one shows by its missing files.
LOOK_S = 30.0


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A folder to fill; `info` goes into the manifest."""

    directory: Path
    info: dict[str, Any] = field(default_factory=dict)


class Store:
    """Artifacts below one root."""

    def __init__(self, root: Location) -> None:
        self.root = root.absolute() if isinstance(root, Path) else root
        # On this machine: the store itself, or the cache of a bucket.
        self.local: Path = self.root if isinstance(self.root, Path) else cache_of(self.root)
        self._sound: set[Path] = set()
        # Each manifest with what identified its content (inode, time and size; or its text) when it was read.
        self._manifests: dict[Location, tuple[object, dict[str, Any]]] = {}
        # For a bucket: the manifests found by the last listing of their stage, the ETags of all its objects, and until
        # when the listing is trusted.
        self._standing: dict[Location, str] = {}
        self._listed: dict[str, dict[ObjectPath, str]] = {}
        self._until: dict[str, float] = {}

    def __reduce__(self) -> tuple[type["Store"], tuple[Location]]:
        # Another process, perhaps on another machine, checks files for itself.
        return Store, (self.root,)

    def sweep_dir(self, sweep: str) -> Location:
        """Return the place of a sweep's records, table and report."""
        return self.root / "sweeps" / sweep

    def local_sweep_dir(self, sweep: str) -> Path:
        """Return the local folder of a sweep's logs, and of its table and report before they are uploaded."""
        return self.local / "sweeps" / sweep

    def share(self, path: Path) -> None:
        """Upload a local file or folder where the store is a bucket. Raises Unreachable."""
        if isinstance(self.root, ObjectPath):
            names = files_below(path) if path.is_dir() else [""]
            upload(self.local, [str((path / name).relative_to(self.local)) for name in names], self.root)

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the manifest of a committed artifact, None where there is none. Raises Damaged, StorageError.

        A command asks for each manifest several times; in a folder it is read again only when its file has changed.
        """
        file = self._folder(stage, key) / MANIFEST
        mark: object = None
        try:
            if isinstance(file, Path):
                said = file.stat()
                mark = (said.st_ino, said.st_mtime_ns, said.st_size)
            elif time.monotonic() < self._until.get(stage, 0.0):
                mark = self._standing.get(file)
            known, manifest = self._manifests.get(file, (None, None))
            if mark is not None and known == mark:
                return manifest
            loaded = json.loads(mark if isinstance(mark, str) else file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Unreachable:
            raise
        except OSError as error:
            raise StorageError(f"{file} cannot be read ({error}); check the disk, and run again.") from error
        except ValueError:
            loaded = None
        if not isinstance(loaded, dict) or loaded.get(SEAL) != seal(loaded):
            if self._forget_look(stage, key):
                # Perhaps only this machine's index is damaged.
                return self.manifest(stage, key)
            raise Damaged(f"{file} is not what was written", stage, key)
        for name in (loaded["attempt"], *loaded["files"]):
            if not _inside(name):
                raise StorageError(
                    f"{file} names {name!r}, which leads out of its folder; delete {file.parent}."
                )
        if mark is not None:
            self._manifests[file] = (mark, loaded)
        return loaded

    def look(self, **wanted: Sequence[str]) -> None:
        """List the stages of a bucket once, so that for LOOK_S the artifacts stage=keys need no request each.

        The listing gives the ETag of each manifest, and this machine reads none twice. A stage with many more objects
        than `keys` is not listed. Raises Unreachable.
        """
        stale = {
            stage: keys for stage, keys in wanted.items() if time.monotonic() >= self._until.get(stage, 0.0)
        }
        if not isinstance(self.root, ObjectPath) or not stale:
            return
        standing: dict[ObjectPath, str] = {}
        for stage, keys in stale.items():
            for key in keys:
                self._forget_look(stage, key)
            # One request lists 1,000 objects.
            found = self._listed[stage] = (self.root / f"artifacts/{stage}").e_tags(100 * len(keys))
            files = [self.root / f"artifacts/{stage}/{key}/{MANIFEST}" for key in keys]
            standing |= {file: found[file] for file in files if file in found}
        index, seen = self.local / INDEX, dict[str, tuple[str, str]]()

        def unread() -> list[ObjectPath]:
            return [file for file, e_tag in standing.items() if seen.get(str(file), ("", ""))[0] != e_tag]

        with contextlib.suppress(OSError, ValueError):
            seen = json.loads(index.read_bytes())
        if many := len(unread()) > MANY:
            with contextlib.suppress(OSError, ValueError):
                seen |= json.loads((self.root / INDEX).read_bytes())
        new = unread()
        for file, text in zip(new, at_once(text_of, new), strict=True):
            seen[str(file)] = (standing[file], text)
        if new or many:
            with contextlib.suppress(OSError, StorageError):
                replace(index, json.dumps(seen))
                if len(new) > MANY:
                    self.share(index)
        self._standing |= {file: seen[str(file)][1] for file in standing}
        self._until |= dict.fromkeys(stale, time.monotonic() + LOOK_S)

    def sound_manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the manifest, None where there is none or it is damaged. Raises StorageError."""
        with contextlib.suppress(Damaged):
            return self.manifest(stage, key)
        return None

    def complete(self, stage: str, key: str) -> bool:
        """Return whether the artifact is committed and its manifest is sound. Does not read its files."""
        return self.sound_manifest(stage, key) is not None

    def _forget_look(self, stage: str, key: str) -> bool:
        """Request this manifest from the bucket from now on; return whether the listing had stood in for it."""
        return self._standing.pop(self._folder(stage, key) / MANIFEST, None) is not None

    def discard(self, stage: str, key: str, attempt: str | None = None) -> None:
        """Make an artifact count as missing; with `attempt`, only if its manifest still names that one.

        '' stands for the attempt of a damaged manifest, which names none.
        """
        self._forget_look(stage, key)
        if attempt is not None:
            manifest = self.sound_manifest(stage, key)
            if (manifest["attempt"] if manifest else "") != attempt:
                return
        (self._folder(stage, key) / MANIFEST).unlink(missing_ok=True)

    def read(self, stage: str, key: str, within: str = "") -> Path:
        """Return the artifact's folder after checking its files as `found` does. Raises Damaged, StorageError."""
        return self.manifest_and_folder(stage, key, within)[1]

    def read_file(self, stage: str, key: str, name: str) -> Path:
        """Return one file of an artifact; only this file is checked. Raises Damaged, StorageError."""
        return self.manifest_and_folder(stage, key, name)[1] / name

    def manifest_and_folder(self, stage: str, key: str, within: str = "") -> tuple[dict[str, Any], Path]:
        """Like `found`, but raises StorageError where there is no such artifact."""
        found = self.found(stage, key, within)
        if found is None and stage == WEIGHTS and (trained := self.sound_manifest("train", key)):
            raise StorageError(
                f"the weights of training {key} were evicted after evaluation; to have them again, delete "
                f"{self._folder('train', key)} and run again: the training took {trained['seconds']:,.0f} s."
            )
        if found is None:
            raise StorageError(f"{within and f'{within} of '}artifact {stage}/{key} is not in {self.root}.")
        return found

    def found(self, stage: str, key: str, within: str = "") -> tuple[dict[str, Any], Path] | None:
        """Return an artifact's manifest and the local folder of its files; None where there is no artifact.

        Checks the digests of its files, or of those at or below `within`, once per process. Both results belong to the
        same attempt, even while others write. Raises Damaged, StorageError.
        """
        manifest = self.manifest(stage, key)
        if manifest is None:
            return None
        wanted = {
            name: said["sha256"]
            for name, said in manifest["files"].items()
            if not within or f"{name}/".startswith(f"{within}/")
        }
        if within and not wanted:
            raise StorageError(f"{within} of artifact {stage}/{key} is not in {self.root}.")
        source = self._folder(stage, key) / manifest["attempt"]
        folder = self._local_folder(stage, key) / manifest["attempt"]
        # Other processes of this machine share the cache and may have removed a file to make room.
        unread = {
            name: digest
            for name, digest in wanted.items()
            if folder / name not in self._sound or not (source == folder or (folder / name).is_file())
        }
        if isinstance(source, ObjectPath):
            wrong = fetch(source, unread, folder)
        else:
            wrong = [name for name, digest in unread.items() if not is_written(folder / name, digest)]
        if wrong:
            self._forget_look(stage, key)
            if self.manifest(stage, key) != manifest:
                # Another driver has removed or replaced it meanwhile.
                return self.found(stage, key, within)
            said = f"{source / wrong[0]} is missing or not what was written"
            raise Damaged(said, stage, key, manifest["attempt"])
        self._sound |= {folder / name for name in unread}
        return manifest, folder

    def sound(self, stage: str, key: str, name: str) -> dict[str, Any] | None:
        """Check the file `name` of an artifact and return the manifest; None where there is no artifact.

        Where a trusted listing shows the file's ETag, the file is not read. Raises Damaged, StorageError.
        """
        if (listed := self._listed.get(stage)) and time.monotonic() < self._until.get(stage, 0.0):
            manifest = self.manifest(stage, key)
            if manifest is None:
                return None
            e_tag = manifest["files"].get(name, {}).get("e_tag")
            file: Any = self._folder(stage, key) / manifest["attempt"] / name
            if e_tag and listed.get(file) == e_tag:
                return manifest
        found = self.found(stage, key, name)
        return found and found[0]

    def fetch_ahead(self, stage: str, keys: Sequence[str], name: str) -> None:
        """Download the file `name` of each artifact, a few at a time; an error is raised only when the file is read."""

        def fetched(key: str) -> None:
            with contextlib.suppress(StorageError):
                self.found(stage, key, name)

        if isinstance(self.root, ObjectPath):
            at_once(fetched, keys)

    def forget_fetched(self, stage: str, key: str) -> None:
        """Remove an artifact's downloaded files to make room; does nothing where the store is a folder."""
        if isinstance(self.root, ObjectPath):
            remove_tree(self._local_folder(stage, key))

    def remove_leftovers(self, stage: str, key: str) -> None:
        """Remove attempts that were never committed. Only the holder of the stage's lease calls this: nobody else writes."""
        self._forget_look(stage, key)
        committed = self.sound_manifest(stage, key)
        for parent in {self._folder(stage, key), self._local_folder(stage, key)}:
            for path in parent.glob("*/"):
                if committed is None or path.name != committed["attempt"]:
                    remove_tree(path)
            for draft in parent.glob(f"{DRAFT}*"):
                draft.unlink(missing_ok=True)

    @contextlib.contextmanager
    def write(self, stage: str, key: str, **inputs: Any) -> Iterator[Attempt]:
        """Yield an attempt to fill; commit it when the block succeeds, remove it otherwise."""
        folder = self._local_folder(stage, key) / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            choice = "--storage" if self.local == self.root else CACHE_VARIABLE
            raise StorageError(
                f"{self.local} cannot be written to ({error}); choose another {choice}."
            ) from error
        attempt, started, committed = Attempt(directory=folder), time.time(), False
        try:
            with disk_named(folder):
                yield attempt
                committed = self._commit(stage, key, attempt, started, inputs)
        finally:
            # An interrupt may arrive after the manifest is written and before the block ends.
            stays = self.local == self.root and (committed or self._stands(stage, key, folder.name))
            if not stays:
                shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, stage: str, key: str, attempt: Attempt, started: float, inputs: dict[str, Any]) -> bool:
        """Put the manifest; False where another attempt was committed first."""
        names = files_below(attempt.directory)
        files = {name: attempt.directory / name for name in names}
        manifest: dict[str, Any] = {
            **{"stage": stage, "key": key, "attempt": attempt.directory.name, "inputs": inputs},
            "files": {
                name: {"size": file.stat().st_size, "sha256": digest_file(file)}
                for name, file in files.items()
            },
            "info": attempt.info,
            "started": started,
            "seconds": time.time() - started,
            "versions": versions(),
            "host": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        folder = self._folder(stage, key)
        if isinstance(folder, ObjectPath):
            # If this fails, the next holder of the lease, or gc, removes what is uploaded. We must not: the manifest
            # may have been put although its answer was lost.
            e_tags = upload(attempt.directory, names, folder / attempt.directory.name)
            for name, e_tag in zip(names, e_tags, strict=True):
                manifest["files"][name]["e_tag"] = e_tag
        text = json.dumps({**manifest, SEAL: seal(manifest)}, indent=1, sort_keys=True)
        self._forget_look(stage, key)
        # Another driver that takes the stage over removes what it finds.
        is_there = attempt.directory.is_dir()
        if is_there and (
            publish(folder / MANIFEST, text) or self._stands(stage, key, attempt.directory.name)
        ):
            return True
        if self.complete(stage, key):
            remove_tree(folder / attempt.directory.name)
            return False
        if not is_there:
            raise StorageError(f"another driver took {stage}/{key} over and removed {attempt.directory}.")
        replace(folder / MANIFEST, text)
        return True

    def _stands(self, stage: str, key: str, attempt: str) -> bool:
        """Return whether the manifest names this attempt."""
        with contextlib.suppress(StorageError):
            manifest = self.manifest(stage, key)
            return manifest is not None and manifest["attempt"] == attempt
        return False

    def _folder(self, stage: str, key: str) -> Location:
        return self.root / f"artifacts/{stage}/{key}"

    def _local_folder(self, stage: str, key: str) -> Path:
        return self.local / f"artifacts/{stage}/{key}"


def text_of(file: Location) -> str:
    """Return what a small file holds; '' where it cannot be read or is not text. Raises Unreachable."""
    try:
        return file.read_text()
    except Unreachable:
        raise
    except (OSError, ValueError):
        return ""


def _inside(name: object) -> bool:
    """Return whether a manifest's name stays inside the artifact's folder."""
    text = name if isinstance(name, str) else ""
    parts = text.split("/")
    return bool(text.strip("./") and parts[0]) and ".." not in parts and "\\" not in text and "\0" not in text


def weights_digest(manifest: Mapping[str, Any]) -> str:
    """Return one digest of all safetensors files in the manifest of a `weights` artifact."""
    named = manifest["files"].items()
    files = sorted((name, said["sha256"]) for name, said in named if name.endswith(".safetensors"))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a result's last digits."""
    names = ("rmsweep", "torch", "transformers", "deepspeed", "ray", "tokenizers", "pyarrow", "mlflow")
    return {name: metadata.version(name) for name in names}
