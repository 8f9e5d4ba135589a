"""What of a store can go, and its removal: artifacts that no kept sweep needs, and leftovers.

What may go is decided by a pure function (`why_removable`) on what `listing` says.
Manifests are never edited; what goes was declared by nobody or can be computed again.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.spec.declaration import Declaration, declared_sweeps, read_declaration
from orchestrator.spec.models import nearest
from orchestrator.store.artifacts import EVICTED, MANIFEST, Store
from orchestrator.store.leases import forget_dead_drivers, is_alone
from trainers.disk import DRAFT
from trainers.errors import SpecError, StorageError, Unreachable
from trainers.objects import Location, ObjectPath, matching
from trainers.transfer import remove_tree

Kind = Literal["artifact", "unreadable", "attempt", "weights", "checkpoint", "scratch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Something that takes room: `path` is relative to the store's root, `owner` the stage/key that it belongs to.

    `finished` says that the owner is committed, with all of its weights.
    """

    kind: Kind
    path: str
    bytes: int
    owner: str = ""
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Something that can go, and why."""

    found: Found
    why: str


def kept_sweeps(store: Store, names: Sequence[str] = ()) -> list[Declaration]:
    """The sweeps called `names`, or all that the store knows, with what they were declared to be earlier.

    Raises SpecError for one that cannot be judged.
    """
    known = declared_sweeps(store)
    for name in names:
        if name not in known:
            hint = nearest(name, known) if known else "it knows none."
            raise SpecError(f"--keep {name}: {store.root} knows no such sweep; {hint}")
    declarations = [read_declaration(name, store) for name in names or known]
    for declaration in declarations:
        if declaration.artifacts is None:
            raise SpecError(
                f"sweep {declaration.sweep} was declared by an older rmsweep, which did not note what it needs; "
                "run it again (what is complete is not computed again), or name the sweeps to keep with --keep."
            )
    return [dataclasses.replace(item, earlier=()) for item in declarations] if names else declarations


def garbage(store: Store, keep: Iterable[Declaration]) -> list[Garbage]:
    """Everything that no sweep of `keep` needs, in the order of its paths. Nothing is changed."""
    kept = frozenset(itertools.chain.from_iterable((*(item.artifacts or ()), *item.earlier) for item in keep))
    return [
        Garbage(found=found, why=why)
        for found in listing(store)
        if (why := why_removable(found, kept)) is not None
    ]


def why_removable(found: Found, kept: frozenset[str]) -> str | None:
    """Why it can go where the artifacts of `kept` (stage/key) must stay; None where it must stay, too."""
    match found.kind:
        case "artifact" | "unreadable":
            return None if found.owner in kept else "no kept sweep needs it"
        case "attempt":
            return "left by a process that did not finish"
        case "weights":
            return "evicted, but not removed yet"
        case "checkpoint" if found.finished:
            return "its training is complete"
        case "checkpoint":
            return None if found.owner in kept else "no kept sweep declares its training"
        case "scratch":
            return "scratch of a run that ended"


def listing(store: Store) -> Iterator[Found]:
    """Everything in the store that could ever go."""
    for folder in matching(store.root / "artifacts", "*/*/"):
        yield from _listed_artifact(store, folder)
    for folder in matching(store.root / "checkpoints", "*"):
        finished = _finished(store, folder.name)
        yield _found(store, "checkpoint", folder, owner=f"train/{folder.name}", finished=finished)
    for item in matching(store.root / "scratch", "*"):
        yield _found(store, "scratch", item)


def _finished(store: Store, train_key: str) -> bool:
    """Whether nobody goes on from a training's checkpoints; one that runs again since it was evicted does."""
    return store.complete("train", train_key) and store.evicted("train", train_key) is None


def remove_finished_checkpoints(store: Store) -> None:
    """Remove what a process left that was killed between committing its training and removing its checkpoints."""
    for folder in matching(store.root / "checkpoints", "*"):
        # What is wrong with a training of another sweep is said where that is run.
        with contextlib.suppress(StorageError):
            if _finished(store, folder.name):
                remove_tree(folder)


def clear_up(store: Store, sweep: str, driver: str = "") -> None:
    """Remove what killed drivers left. `driver` is this one, where it has said so."""
    forget_dead_drivers(store.root)
    # What is there before one looks whether one is alone is not that of a driver that comes.
    scratches = [item for place in {store.root, store.local} for item in matching(place / "scratch", "*")]
    left = [*_drafts(store, sweep), *scratches]
    if is_alone(store.root, driver):
        for path in left:
            # What cannot be removed hinders nobody, and gc says why.
            with contextlib.suppress(StorageError):
                delete(path)
    remove_finished_checkpoints(store)


def _drafts(store: Store, sweep: str) -> list[Path]:
    """What drivers have begun to write of notes, reports and claims; a bucket has none of its own."""
    notes = (store.local_sweep_dir(sweep), store.local / "sources", store.local / "audits")
    found = [draft for folder in notes for draft in folder.rglob(f"{DRAFT}*")]
    # Beside them MLflow's database, as long as it is made.
    return [*found, *store.local.glob(f"{DRAFT}*"), *(store.local / "claims").glob(f"{DRAFT}*")]


def _listed_artifact(store: Store, folder: Location) -> Iterator[Found]:
    stage, key = folder.parent.name, folder.name
    owner = f"{stage}/{key}"
    try:
        manifest, evicted = store.manifest(stage, key), store.evicted(stage, key)
        entries = matching(folder, "*")
    except FileNotFoundError:
        return
    except Unreachable:
        raise
    except StorageError:
        yield _found(store, "unreadable", folder, owner=owner)
        return
    attempt = folder / manifest["attempt"] if manifest else None
    named = {folder / MANIFEST, attempt} if manifest else set()
    named |= {folder / EVICTED} if evicted else set()
    rest = [_found(store, "attempt", item, owner=owner) for item in entries if item not in named]
    if attempt and evicted:
        files = [attempt / name for name in evicted["files"] if (attempt / name).is_file()]
        rest += [_found(store, "weights", file, owner=owner) for file in files]
    if attempt:
        size = _size(folder) - sum(item.bytes for item in rest)
        path = _relative(store, folder)
        yield Found(kind="artifact", path=path, bytes=size, owner=owner, finished=not evicted)
    yield from rest


def _found(store: Store, kind: Kind, path: Location, *, owner: str = "", finished: bool = False) -> Found:
    return Found(kind=kind, path=_relative(store, path), bytes=_size(path), owner=owner, finished=finished)


def _relative(store: Store, path: Location) -> str:
    return str(path).removeprefix(f"{store.root}/")


def _size(path: Location) -> int:
    """Bytes of a file, or of everything below a folder; what vanishes meanwhile counts nothing."""
    if isinstance(path, ObjectPath):
        return sum(path.sizes().values())
    below = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    size = 0
    for file in [path] if path.is_symlink() or path.is_file() else below:
        with contextlib.suppress(OSError):
            size += file.lstat().st_size
    return size


def remove(store: Store, items: Iterable[Garbage], *, busy: bool) -> list[Garbage]:
    """Remove what `garbage` listed; what was removed. Raises StorageError.

    While a driver is `busy` on the store, what it may be writing stays: attempts, scratch, and checkpoints of
    trainings that are not complete.
    """
    removed = [item for item in items if not busy or _safe_while_busy(item.found)]
    for item in removed:
        found, path = item.found, store.root / item.found.path
        if found.kind == "artifact":
            _remove_artifact(store, found.owner)
            continue
        if found.kind == "unreadable":
            delete(path / MANIFEST)
        delete(path)
        if found.kind == "attempt":
            _drop_empty(path.parent)
    return removed


def _safe_while_busy(found: Found) -> bool:
    return found.kind in ("artifact", "weights") or (found.kind == "checkpoint" and found.finished)


def _remove_artifact(store: Store, owner: str) -> None:
    """The manifest first, so that no reader sees half an artifact; attempts that it does not name stay."""
    stage, _, key = owner.partition("/")
    manifest = store.manifest(stage, key)
    if manifest is None:
        return
    folder = store.root / "artifacts" / stage / key
    for name in (MANIFEST, EVICTED, manifest["attempt"]):
        delete(folder / name)
    _drop_empty(folder)


def _drop_empty(folder: Location) -> None:
    with contextlib.suppress(OSError):
        # In a bucket there is none: who asks whether it is empty would race who writes into it.
        if isinstance(folder, Path):
            folder.rmdir()


def delete(path: Location) -> int:
    """Remove a file or folder, which may be gone already; bytes freed."""
    size = _size(path)
    try:
        if isinstance(path, ObjectPath):
            path.unlink() if path.is_file() else path.remove_below()
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


def gigabytes(size: int) -> str:
    """Bytes as GB for people."""
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.4f}"
