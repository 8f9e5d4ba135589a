"""Find and remove what a store no longer needs: artifacts of no kept sweep, leftovers, evaluated weights, damage.

Nothing is removed but what no sweep declares or what can be computed again. Manifests are never edited.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Literal

from orchestrator.store.artifacts import MANIFEST, WEIGHTS, Store
from orchestrator.store.leases import Leases, live_drivers
from orchestrator.store.records import declared_sweeps, read_declaration, unscored
from trainers.errors import Damaged, SpecError, StorageError, Unreachable, nearest
from trainers.storage import DRAFT, Location, ObjectPath, matching, remove_tree

# Longer than a living driver takes to write a record.
DRAFT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Removable:
    """A file or folder that could be removed, and `why`; `path` is relative to the store's root.

    It stays if its `owner` (stage/key) is kept; without an owner it always goes. `safe`: also while a driver lives.
    """

    kind: Literal["artifact", "unreadable", "attempt", "checkpoint", "scratch"]
    path: str
    bytes: int
    why: str
    owner: str = ""
    safe: bool = False


def kept_artifacts(store: Store, drop: Sequence[str] = (), *, drop_earlier: bool = False) -> frozenset[str]:
    """Return the artifacts (stage/key) that the declared sweeps need, except the sweeps to `drop`.

    The artifacts of a sweep's earlier declarations count too, unless `drop_earlier`. Raises SpecError for an unknown
    sweep.
    """
    known = declared_sweeps(store)
    for name in drop:
        if name not in known:
            hint = nearest(name, known) if known else "it knows none."
            raise SpecError(f"--drop {name}: {store.root} knows no such sweep; {hint}")
    declarations = [read_declaration(name, store) for name in known if name not in drop]
    return frozenset(
        artifact
        for item in declarations
        for artifact in (*item.artifacts, *(() if drop_earlier else item.earlier))
    )


def garbage(store: Store, kept: frozenset[str]) -> list[Removable]:
    """Return, in the order of paths, what can be removed while the artifacts of `kept` stay. Removes nothing."""
    return [found for found in listing(store) if found.owner not in kept]


def listing(store: Store) -> Iterator[Removable]:
    """Yield everything in the store that could be removed if no artifact were kept."""

    def found(kind: str, path: Location, why: str, owner: str = "", *, safe: bool = False) -> Removable:
        name = str(path).removeprefix(f"{store.root}/")
        return Removable(kind=kind, path=name, bytes=_size(path), why=why, owner=owner, safe=safe)  # type: ignore[arg-type]

    for folder in matching(store.root / "artifacts", "*/*/"):
        stage, key = folder.parent.name, folder.name
        owner, unneeded = f"{'train' if stage == WEIGHTS else stage}/{key}", "no kept sweep needs it"
        try:
            entries = matching(folder, "*")
            manifest = store.manifest(stage, key)
        except FileNotFoundError:
            continue
        except Unreachable:
            raise
        except StorageError:
            yield found("unreadable", folder, unneeded, owner)
            continue
        attempt = folder / manifest["attempt"] if manifest else None
        rest = [
            found("attempt", item, "left by a process that did not finish")
            for item in entries
            if attempt is None or item not in (folder / MANIFEST, attempt)
        ]
        if attempt:
            whole = found("artifact", folder, unneeded, owner, safe=True)
            yield changed(whole, bytes=whole.bytes - sum(item.bytes for item in rest))
        yield from rest
    for folder in matching(store.root / "checkpoints", "*"):
        stage, _, key = folder.name.rpartition("-")
        if _finished(store, folder.name):
            yield found("checkpoint", folder, f"its {stage or 'training'} is complete", safe=True)
        else:
            why = f"no kept sweep declares its {stage or 'training'}"
            yield found("checkpoint", folder, why, f"{stage or 'train'}/{key}")
    for item in matching(store.root / "scratch", "*"):
        yield found("scratch", item, "scratch of a run that ended")


def remove(store: Store, items: Iterable[Removable]) -> list[Removable]:
    """Remove what `garbage` listed, and return what was removed. Raises StorageError.

    While any driver lives, what it may be writing stays: attempts, scratch, and checkpoints of unfinished stages.
    """
    # Asked after the listing: then nothing that is listed is of a driver that has just arrived.
    busy = bool(live_drivers(store.root))
    removed = [item for item in items if item.safe or not (busy or _is_committed(store, item))]
    for item in removed:
        path = store.root / item.path
        if item.kind == "artifact":
            _remove_artifact(store, path.parent.name, path.name)
            continue
        delete(path)
        if item.kind == "attempt":
            _drop_empty(path.parent)
    return removed


def _is_committed(store: Store, item: Removable) -> bool:
    """Return whether an attempt has become the artifact since it was listed: its driver has ended meanwhile."""
    if item.kind != "attempt":
        return False
    path = store.root / item.path
    manifest = store.sound_manifest(path.parent.parent.name, path.parent.name)
    return manifest is not None and manifest["attempt"] == path.name


def _remove_artifact(store: Store, stage: str, key: str) -> int:
    """Remove an artifact and return the bytes freed. Attempts that its manifest does not name stay.

    The manifest goes first, so that no reader sees half an artifact; gc finds what a crash leaves.
    """
    manifest, folder = store.manifest(stage, key), store.root / f"artifacts/{stage}/{key}"
    if manifest is None:
        return 0
    store.discard(stage, key, manifest["attempt"])
    freed = delete(folder / manifest["attempt"])
    _drop_empty(folder)
    return freed


def _drop_empty(folder: Location) -> None:
    # A bucket has no folders.
    with contextlib.suppress(OSError):
        if isinstance(folder, Path):
            folder.rmdir()


def delete(path: Location) -> int:
    """Remove a file or folder if it is there, and return the bytes freed. Raises StorageError."""
    size = _size(path)
    try:
        if isinstance(path, ObjectPath):
            path.remove_below()
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return 0
    except Unreachable:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be removed ({error}); check its owner and permissions.") from error
    return size


def _size(path: Location) -> int:
    """Return the bytes of a file, or of everything below a folder; files that vanish meanwhile count 0."""
    if isinstance(path, ObjectPath):
        return sum(path.sizes().values())
    below = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    size = 0
    for file in [path] if path.is_symlink() or path.is_file() else below:
        with contextlib.suppress(OSError):
            size += file.lstat().st_size
    return size


def clear_up(store: Store, sweep: str, driver: str = "") -> None:
    """Remove what killed drivers left, unless other drivers live; `driver` is this one, if it has written its record."""
    leases = Leases(store.root, driver)
    others = leases.forget_dead()
    notes = (
        store.local_sweep_dir(sweep),
        *(store.local / name for name in ("sources", "audits", "leases", "drivers")),
    )
    drafts = [draft for folder in notes for draft in folder.rglob(f"{DRAFT}*")]
    # A half-made MLflow database.
    left: list[Location] = [*drafts, *store.local.glob(f"{DRAFT}*")]
    left += [item for place in {store.root, store.local} for item in matching(place / "scratch", "*")]
    if drafts and not others:
        # A driver writes some records before its own: by the end of this wait its drafts are renamed.
        time.sleep(DRAFT_S)
    # Ask after the listing: then nothing that is listed is of a driver that has just arrived.
    for path in () if leases.forget_dead() else left:
        # A leftover that cannot be removed does no harm, and `gc` says why.
        with contextlib.suppress(StorageError):
            delete(path)
    remove_finished_checkpoints(store)


def remove_finished_checkpoints(store: Store) -> None:
    """Remove the checkpoints of complete stages, left by a process that was killed after its commit."""
    for folder in matching(store.root / "checkpoints", "*"):
        # Damage in another sweep's training is reported when that sweep runs.
        with contextlib.suppress(StorageError):
            if _finished(store, folder.name):
                remove_tree(folder)


def _finished(store: Store, name: str) -> bool:
    """Return whether the stage whose checkpoints are called `name` is complete; a training with evicted weights is not."""
    stage, _, key = name.rpartition("-")
    return all(store.complete(kind, key) for kind in ([stage] if stage else ["train", WEIGHTS]))


def evict_weights(store: Store, sweep: str, keys: Iterable[str]) -> int:
    """Evict the weights of trainings, except those that other sweeps have yet to evaluate; return the bytes freed.

    Raises StorageError.
    """
    keys = list(keys)
    others = [read_declaration(name, store) for name in declared_sweeps(store) if keys and name != sweep]
    wanted = {
        trial.key for other in others for trial in other.trials if unscored(store, trial.key, trial.scored)
    }
    return sum(_remove_artifact(store, WEIGHTS, key) for key in keys if key not in wanted)


def damage(store: Store, stage: str, key: str, name: str) -> Damaged | None:
    """Return the damage of one file of a committed artifact, None where it is sound."""
    try:
        store.sound(stage, key, name)
    except Damaged as error:
        # A damaged manifest names no attempt; its stage already counts as missing.
        return error if error.attempt else None
    return None


def set_aside(store: Store, files: Iterable[tuple[str, str, str]]) -> list[Damaged]:
    """Check files (stage, key, name); make their artifacts count as missing where one is damaged, and return the damage."""
    files = list(files)
    for stage in {stage for stage, _, _ in files}:
        store.look(**{stage: [key for kind, key, _ in files if kind == stage]})
    found = [error for file in files if (error := damage(store, *file)) is not None]
    for error in found:
        store.discard(error.stage, error.key, error.attempt)
    return found
