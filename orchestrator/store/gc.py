"""Finds and removes what a store no longer needs: artifacts of no kept sweep, leftovers, evaluated weights, damage.

Commands list what can go, say why, and have it removed. Manifests are never edited; what goes was declared by nobody or
can be computed again.
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
from orchestrator.store.leases import Leases
from orchestrator.store.records import declared_sweeps, read_declaration, unscored
from trainers.errors import Damaged, SpecError, StorageError, Unreachable, nearest
from trainers.storage import DRAFT, Location, ObjectPath, matching, remove_tree

# Longer than a living driver takes for a note.
DRAFT_S = 2.0

KeepWeights = Literal["all", "best", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removable:
    """Something that takes room, and `why` it can go: `path` is relative to the store's root.

    It stays where its `owner`, as stage/key, is kept; without one it goes in any case. What is `safe` can go while a
    driver is busy.
    """

    kind: Literal["artifact", "unreadable", "attempt", "checkpoint", "scratch"]
    path: str
    bytes: int
    why: str
    owner: str = ""
    safe: bool = False


def kept_artifacts(store: Store, drop: Sequence[str] = (), *, drop_earlier: bool = False) -> frozenset[str]:
    """Return the artifacts, as stage/key, that the declared sweeps need, without those to `drop`.

    A sweep also keeps what it was declared to be earlier, unless `drop_earlier`. Raises SpecError for a sweep that the
    store does not know.
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
    """Return all that can go where the artifacts of `kept` must stay, in the order of its paths. Nothing is changed."""
    return [found for found in listing(store) if found.owner not in kept]


def listing(store: Store) -> Iterator[Removable]:
    """Yield everything in the store that could ever go."""

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
        if _finished(store, folder.name):
            yield found("checkpoint", folder, "its training is complete", safe=True)
        else:
            # A training's has its key as its name, that of another stage has the stage before it.
            stage, _, key = folder.name.rpartition("-")
            owner = f"{stage or 'train'}/{key}"
            yield found("checkpoint", folder, f"no kept sweep declares its {stage or 'training'}", owner)
    for item in matching(store.root / "scratch", "*"):
        yield found("scratch", item, "scratch of a run that ended")


def remove(store: Store, items: Iterable[Removable], *, busy: bool) -> list[Removable]:
    """Remove what `garbage` listed and return what was removed. Raises StorageError.

    While a driver is `busy` on the store, what it may be writing stays: attempts, scratch, and checkpoints of
    trainings that are not complete.
    """
    removed = [item for item in items if item.safe or not busy]
    for item in removed:
        path = store.root / item.path
        if item.kind == "artifact":
            _remove_artifact(store, path.parent.name, path.name)
            continue
        delete(path)
        if item.kind == "attempt":
            _drop_empty(path.parent)
    return removed


def _remove_artifact(store: Store, stage: str, key: str) -> int:
    """Remove an artifact and return the bytes freed. Attempts that its manifest does not name stay.

    The manifest goes first, so that no reader sees half of it; of what a crash leaves gc is told.
    """
    manifest, folder = store.manifest(stage, key), store.root / f"artifacts/{stage}/{key}"
    if manifest is None:
        return 0
    store.discard(stage, key, manifest["attempt"])
    freed = delete(folder / manifest["attempt"])
    _drop_empty(folder)
    return freed


def _drop_empty(folder: Location) -> None:
    # A bucket has no folders: who asked whether one is empty would race who writes into it.
    with contextlib.suppress(OSError):
        if isinstance(folder, Path):
            folder.rmdir()


def delete(path: Location) -> int:
    """Remove a file or folder, which may be gone already, and return the bytes freed. Raises StorageError."""
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
        raise StorageError(f"{path} cannot be removed ({error}); check whose it is.") from error
    return size


def _size(path: Location) -> int:
    """Return the bytes of a file, or of everything below a folder; what vanishes meanwhile counts nothing."""
    if isinstance(path, ObjectPath):
        return sum(path.sizes().values())
    below = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    size = 0
    for file in [path] if path.is_symlink() or path.is_file() else below:
        with contextlib.suppress(OSError):
            size += file.lstat().st_size
    return size


def clear_up(store: Store, sweep: str, leases: Leases | None = None) -> None:
    """Remove what killed drivers left; `leases` are those of this driver, where it has said that it is here."""
    leases = leases or Leases(store.root, "")
    leases.forget_dead_drivers()
    # What is there before one looks whether one is alone is not that of a driver that comes.
    notes = (
        store.local_sweep_dir(sweep),
        *(store.local / name for name in ("sources", "audits", "leases", "drivers")),
    )
    drafts = [draft for folder in notes for draft in folder.rglob(f"{DRAFT}*")]
    # MLflow's database, as long as it is made.
    left: list[Location] = [*drafts, *store.local.glob(f"{DRAFT}*")]
    left += [item for place in {store.root, store.local} for item in matching(place / "scratch", "*")]
    if drafts and not leases.others():
        # Drivers write notes before they say that they are here: a draft of one that comes is none any more by then.
        time.sleep(DRAFT_S)
    for path in () if leases.others() else left:
        # What cannot be removed hinders nobody, and gc says why.
        with contextlib.suppress(StorageError):
            delete(path)
    remove_finished_checkpoints(store)


def remove_finished_checkpoints(store: Store) -> None:
    """Remove what a process left that was killed between committing its training and removing its checkpoints."""
    for folder in matching(store.root / "checkpoints", "*"):
        # What is wrong with a training of another sweep is said where that is run.
        with contextlib.suppress(StorageError):
            if _finished(store, folder.name):
                remove_tree(folder)


def _finished(store: Store, name: str) -> bool:
    """Return whether nobody goes on from what is kept under `name`; a training that runs again since it was evicted does."""
    stage, _, key = name.rpartition("-")
    return all(store.complete(kind, key) for kind in ([stage] if stage else ["train", WEIGHTS]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A trial by its training's key, the trials that it is compared with, and its accuracy: None until it is complete."""

    key: str
    group: tuple[str, ...]
    seed: int
    accuracy: float | None


def evictable(trials: Iterable[Ranked], keep: KeepWeights) -> list[str]:
    """Return the keys of complete trainings whose weights go: none, all, or all but the most accurate of each group.

    A group is judged when all of its trials are complete; among equals the lowest seed is the best.
    """
    groups: dict[tuple[str, ...], list[Ranked]] = {}
    for trial in trials:
        groups.setdefault(trial.group if keep == "best" else (trial.key,), []).append(trial)
    gone: list[str] = []
    for group in groups.values():
        ranks = {trial.key: (trial.accuracy, -trial.seed) for trial in group if trial.accuracy is not None}
        if keep != "all" and len(ranks) == len(group):
            best = max(ranks, key=lambda key: ranks[key]) if keep == "best" else None
            gone += [key for key in ranks if key != best]
    return gone


def evict_weights(store: Store, sweep: str, keys: Iterable[str]) -> int:
    """Evict the weights of trainings, but for those that other sweeps have yet to evaluate; return the bytes freed.

    Raises StorageError.
    """
    keys = list(keys)
    others = [read_declaration(name, store) for name in declared_sweeps(store) if keys and name != sweep]
    wanted = {
        trial.key
        for other in others
        for trial in other.trials
        if unscored(store, trial.key, [item.key for item in trial.evaluations])
    }
    return sum(_remove_artifact(store, WEIGHTS, key) for key in keys if key not in wanted)


def damage(store: Store, stage: str, key: str, name: str) -> Damaged | None:
    """Return what is wrong with one file of a committed artifact, None where nothing is."""
    try:
        store.sound(stage, key, name)
    except Damaged as error:
        # A manifest that is itself damaged names no attempt; its stage is missing already.
        return error if error.attempt else None
    return None


def set_aside(store: Store, files: Iterable[tuple[str, str, str]]) -> list[Damaged]:
    """Make artifacts count as missing of which a file (stage, key, name) is damaged, and return what is wrong with them."""
    files = list(files)
    for stage in {stage for stage, _, _ in files}:
        store.look(**{stage: [key for kind, key, _ in files if kind == stage]})
    found = [error for file in files if (error := damage(store, *file)) is not None]
    for error in found:
        store.discard(error.stage, error.key, error.attempt)
    return found
