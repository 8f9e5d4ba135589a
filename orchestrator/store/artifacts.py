"""The artifact store: content key → committed directory, on the local (or a shared) file system or in an S3 bucket.

    <root>/artifacts/<stage>/<key>/manifest.json     written last and at once: no manifest, no artifact
    <root>/artifacts/<stage>/<key>/<attempt>/…       the files that the manifest names, with sizes and digests
    <root>/artifacts/<stage>/<key>/evicted.json      where weights were removed to free their space: which, of which attempt

Two writers of one key do no harm: each has an attempt folder of its own, and the first manifest stays. Only an artifact
whose weights were evicted is written again: the new manifest takes the place of the old one at once.

In a bucket (docs/storage.md) an attempt is made in a local folder, put below its own name, and then its manifest is put;
what is read is fetched into that folder, `local`, and compared with its digest there.
"""

import contextlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.store.manifests import is_written, read_manifest, versions
from trainers.disk import DRAFT, SEAL, digest_file, disk_named, publish, replace, seal
from trainers.errors import Damaged, StorageError, Unreachable
from trainers.objects import Location, ObjectPath
from trainers.transfer import CACHE_VARIABLE, cache_of, fetch, files_below, remove_tree, upload

MANIFEST = "manifest.json"
EVICTED = "evicted.json"


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A folder to fill; `info` goes into the manifest when the attempt is committed."""

    directory: Path
    info: dict[str, Any] = field(default_factory=dict)


class Store:
    """Artifacts under one root folder."""

    def __init__(self, root: Location) -> None:
        self.root = root.absolute() if isinstance(root, Path) else root
        self._sound: set[Path] = set()

    @property
    def local(self) -> Path:
        """The root of what is local to this machine: the store itself, or the cache of one in a bucket."""
        return self.root if isinstance(self.root, Path) else cache_of(self.root)

    def __getstate__(self) -> dict[str, Any]:
        # What this process has checked says nothing to the process that it is sent to.
        return {"root": self.root, "_sound": set()}

    def sweep_dir(self, sweep: str) -> Location:
        """Where a sweep keeps its notes, table and report."""
        return self.root / "sweeps" / sweep

    def local_sweep_dir(self, sweep: str) -> Path:
        """Where the table and report are written before they are shared, and logs are kept."""
        return self.local / "sweeps" / sweep

    def share(self, path: Path) -> None:
        """Put a local file, or all files of a folder, where other machines find them. Raises Unreachable."""
        if not isinstance(self.root, ObjectPath):
            return
        names = files_below(path) if path.is_dir() else [""]
        inside = [str((path / name).relative_to(self.local)) for name in names]
        upload(self.local, inside, self.root)

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest of a committed artifact, None where there is none. Raises Damaged, StorageError."""
        return read_manifest(self._folder(stage, key) / MANIFEST, stage, key)

    def complete(self, stage: str, key: str) -> bool:
        """Whether the artifact is committed, under a manifest that is as it was written. Its files are not read."""
        return self.sound_manifest(stage, key) is not None

    def sound_manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest, None where there is none or it is damaged. Raises StorageError."""
        try:
            return self.manifest(stage, key)
        except Damaged:
            return None

    def fault(self, stage: str, key: str) -> str | None:
        """What is wrong with the artifact's manifest, None where nothing is or there is none."""
        try:
            self.manifest(stage, key)
        except Damaged as error:
            return str(error)
        return None

    def discard(self, stage: str, key: str, attempt: str) -> None:
        """Take an artifact that is damaged or out of date out of the store, unless another attempt stands there by now."""
        file = self._folder(stage, key) / MANIFEST
        manifest = self.sound_manifest(stage, key)
        # A manifest that is itself damaged names no attempt.
        if (manifest["attempt"] if manifest else "") != attempt:
            return
        with contextlib.suppress(FileNotFoundError):
            if isinstance(file, ObjectPath):
                file.unlink()
            else:
                file.rename(file.with_name(f"{uuid.uuid4().hex}.damaged"))

    def read(self, stage: str, key: str, within: str = "") -> Path:
        """The artifact's folder, its files (those below `within`) checked against their digests once per process.

        Raises Damaged, StorageError.
        """
        return self.manifest_and_folder(stage, key, within)[1]

    def manifest_and_folder(self, stage: str, key: str, within: str = "") -> tuple[dict[str, Any], Path]:
        """The manifest and what `read` gives, of one attempt whoever writes meanwhile. Raises Damaged, StorageError."""
        manifest = self.manifest(stage, key)
        if manifest is None:
            raise StorageError(f"artifact {stage}/{key} is not in {self.root}.")
        self._refuse_evicted(stage, key)
        names = [name for name in manifest["files"] if name.startswith(within and f"{within}/")]
        return manifest, self._verified(stage, key, manifest, names)

    def read_file(self, stage: str, key: str, name: str) -> Path:
        """One file of an artifact, checked alone and once per process; evicted weights do not matter to the others.

        Raises Damaged, StorageError.
        """
        found = self.manifest_and_file(stage, key, name)
        if found is None:
            raise StorageError(f"{name} of artifact {stage}/{key} is not in {self.root}.")
        return found[1]

    def manifest_and_file(self, stage: str, key: str, name: str) -> tuple[dict[str, Any], Path] | None:
        """A manifest and what `read_file` gives, the manifest read once; None where there is no such artifact.

        Raises Damaged, StorageError.
        """
        manifest = self.manifest(stage, key)
        if manifest is None:
            return None
        if name not in manifest["files"]:
            raise StorageError(f"{name} of artifact {stage}/{key} is not in {self.root}.")
        self._refuse_evicted(stage, key, name)
        return manifest, self._verified(stage, key, manifest, [name]) / name

    def _verified(self, stage: str, key: str, manifest: dict[str, Any], names: Iterable[str]) -> Path:
        """The attempt's folder, once each of `names` in it was compared with its digest. Raises Damaged."""
        attempt = manifest["attempt"]
        source, folder = self._folder(stage, key) / attempt, self._local_folder(stage, key) / attempt
        fetched = isinstance(source, ObjectPath)
        digests = {
            name: manifest["files"][name]["sha256"]
            for name in names
            # What was fetched may be gone again: other processes of the machine share the cache, and make room in it.
            if folder / name not in self._sound or (fetched and not (folder / name).is_file())
        }
        if isinstance(source, ObjectPath):
            wrong = fetch(source, digests, folder)
        else:
            wrong = [name for name, digest in digests.items() if not is_written(folder / name, digest)]
        if wrong:
            raise Damaged(f"{source / wrong[0]} is missing or not what was written", stage, key, attempt)
        self._sound |= {folder / name for name in digests}
        return folder

    def forget_fetched(self, stage: str, key: str) -> None:
        """Remove the models that were fetched of an artifact, to make room; where the store is local nothing was.

        Its other files stay: they are small, and other processes of the machine may be reading them.
        """
        if isinstance(self.root, ObjectPath):
            for model in self._local_folder(stage, key).glob("*/*/"):
                shutil.rmtree(model, ignore_errors=True)

    def evicted(self, stage: str, key: str) -> dict[str, Any] | None:
        """What was removed of the committed attempt to free its space: {attempt, files, bytes, train_seconds}.

        None where nothing was, or where the artifact was written again since. Raises StorageError.
        """
        file = self._folder(stage, key) / EVICTED
        try:
            record: dict[str, Any] = json.loads(file.read_text())
            _ = [record[name] for name in ("attempt", "files", "bytes", "train_seconds")]
        except FileNotFoundError:
            return None
        except Unreachable:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{file} is unreadable ({error}); delete {file.parent} and run again."
            ) from error
        manifest = self.manifest(stage, key)
        return record if manifest is not None and manifest["attempt"] == record["attempt"] else None

    def _refuse_evicted(self, stage: str, key: str, name: str | None = None) -> None:
        """Raises StorageError where the file `name`, or without one any file, was evicted."""
        record = self.evicted(stage, key)
        if record is None or (name is not None and name not in record["files"]):
            return
        raise StorageError(
            f"the weights of {stage}/{key} were evicted after evaluation; to have them again, delete "
            f"{self._folder(stage, key)} and run again: the training took {record['train_seconds']:,.0f} s."
        )

    def remove_leftovers(self, stage: str, key: str) -> None:
        """Remove attempts that came to nothing; for who holds the claim on the stage, since nobody else writes."""
        committed = self.sound_manifest(stage, key)
        for parent in {self._folder(stage, key), self._local_folder(stage, key)}:
            for path in parent.iterdir() if parent.is_dir() else ():
                if path.is_dir() and (committed is None or path.name != committed["attempt"]):
                    remove_tree(path)
                elif path.name.startswith(DRAFT):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def write(self, stage: str, key: str, **inputs: Any) -> Iterator[Attempt]:
        """An attempt at an artifact; committed when the block ends well, removed otherwise."""
        folder = self._local_folder(stage, key) / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(
                f"{self.local} cannot be written to ({error}); choose another {self._choice}."
            ) from error
        attempt = Attempt(directory=folder)
        started = time.time()
        try:
            with disk_named(folder):
                yield attempt
                committed = self._commit(stage, key, attempt, started, inputs)
        except BaseException:
            # An interrupt may come between the manifest and the end of the block.
            if isinstance(self.root, ObjectPath) or not self._names(stage, key, folder.name):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if isinstance(self.root, ObjectPath):
            shutil.rmtree(folder, ignore_errors=True)
        if not committed:
            remove_tree(self._folder(stage, key) / folder.name)

    def _commit(self, stage: str, key: str, attempt: Attempt, started: float, inputs: dict[str, Any]) -> bool:
        names = files_below(attempt.directory)
        manifest = {
            "stage": stage,
            "key": key,
            "attempt": attempt.directory.name,
            "inputs": inputs,
            "files": {
                name: {
                    "size": (attempt.directory / name).stat().st_size,
                    "sha256": digest_file(attempt.directory / name),
                }
                for name in names
            },
            "info": attempt.info,
            "started": started,
            "seconds": time.time() - started,
            "versions": versions(),
            "host": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        text = json.dumps({**manifest, SEAL: seal(manifest)}, indent=1, sort_keys=True)
        folder = self._folder(stage, key)
        if isinstance(folder, ObjectPath):
            # What is up when this fails is left to who holds the claim next, or to gc: a manifest whose answer was
            # lost may name it.
            upload(attempt.directory, names, folder / attempt.directory.name)
        file = folder / MANIFEST
        if publish(file, text) or self._supersede(stage, key, text):
            return True
        if self.fault(stage, key) is None:
            return False
        replace(file, text)
        return True

    def _names(self, stage: str, key: str, attempt: str) -> bool:
        with contextlib.suppress(StorageError):
            manifest = self.manifest(stage, key)
            return manifest is not None and manifest["attempt"] == attempt
        return False

    def _supersede(self, stage: str, key: str, text: str) -> bool:
        """Put a new manifest in the place of one whose weights were evicted; False where none were."""
        record = self.evicted(stage, key)
        if record is None:
            return False
        folder = self._folder(stage, key)
        replace(folder / MANIFEST, text)
        # From here on readers find the new attempt; what a crash leaves of the old one is gc's.
        (folder / EVICTED).unlink(missing_ok=True)
        remove_tree(folder / record["attempt"])
        return True

    def _folder(self, stage: str, key: str) -> Location:
        return self.root / f"artifacts/{stage}/{key}"

    def _local_folder(self, stage: str, key: str) -> Path:
        return self.local / f"artifacts/{stage}/{key}"

    @property
    def _choice(self) -> str:
        return "--storage" if isinstance(self.root, Path) else CACHE_VARIABLE
