"""Checkpoints inside a training: DeepSpeed's own, each complete only when its marker stands beside it.

    <folder>/<tag>/…            DeepSpeed's files
    <folder>/<tag>.json         the step, the placement, the log so far, and every file's digest; written last, by rank 0
    <folder>/universal/<tag>/…  the same in DeepSpeed's universal form, made when another world size resumes

The two newest are kept: one that was damaged since is passed over for the one before. Every tag is new, so that two
writers of one folder never share a file. With a mirror, files and markers are kept in a bucket under the same names, and
`folder` is where every node writes and reads them. At the placement it was written with a checkpoint is loaded bit for
bit; at another world size it is converted first. The ZeRO stage must be the one it was written at.
"""

import contextlib
import itertools
import json
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers.disk import (
    DRAFT,
    SEAL,
    Location,
    ObjectPath,
    digest_file,
    disk_named,
    matching,
    remove_tree,
    replace,
    require_room,
    seal,
)
from trainers.errors import SpecError, StorageError, Unreachable
from trainers.mirror import clear_together, fetch_together, upload_together

KEPT = 2
EVERY_S = 600.0
_TAG = re.compile(r"step\d+-[0-9a-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where checkpoints are kept, and how often one is written: every ten minutes, or after so many optimiser steps.

    With `mirror` they are kept there, and `folder` is a local one that nobody else needs to see.
    """

    folder: Path
    every_steps: int | None = None
    every_s: float = EVERY_S
    mirror: ObjectPath | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise SpecError(f"{self.every_steps} steps between checkpoints: give at least 1.")

    @property
    def kept(self) -> Location:
        """Where markers are."""
        return self.folder if self.mirror is None else self.mirror

    def due(self, step: int, since_s: float) -> bool:
        """Whether one is due after `step` steps, `since_s` seconds after the last."""
        return since_s >= self.every_s if self.every_steps is None else step % self.every_steps == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: the optimiser steps done of `total`, their log, by what it was written and how long that took."""

    step: int
    total: int
    tag: str
    world_size: int
    zero_stage: int
    training: dict[str, str]
    log: list[dict[str, Any]]
    files: dict[str, str]
    write_s: float

    def fits(self, world_size: int, zero_stage: int) -> bool:
        """Whether it can be loaded as it is. Without ZeRO every rank holds everything, at any world size."""
        if self.zero_stage == zero_stage == 0:
            return True
        return (self.world_size, self.zero_stage) == (world_size, zero_stage)


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that is as it was written, and what is wrong with those passed over."""
    faults: list[str] = []
    for marker in _markers(folder):
        checkpoint = _read(marker)
        fault = "its marker is unreadable" if checkpoint is None else _fault(folder, checkpoint)
        if checkpoint is not None and fault is None:
            return checkpoint, faults
        faults.append(f"the checkpoint {folder / marker.stem} is damaged ({fault}) and is passed over")
    return None, faults


def agreed_latest(checkpoints: Checkpoints) -> tuple[Checkpoint | None, list[str]]:
    """What `latest` finds on rank 0, on every rank; from a mirror with its files in `folder`. A collective.

    What a crash left half-written goes first: it would take the room of the next checkpoint.
    """
    folder = checkpoints.folder
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, StorageError):
            _drop_old(checkpoints.kept)
    if checkpoints.mirror is not None:
        return _fetched_latest(folder, checkpoints.mirror)
    found: list[Any] = [latest(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    checkpoint, faults = found[0]
    return checkpoint, faults


def _fetched_latest(folder: Path, mirror: ObjectPath) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a bucket whose files are as written on every node. Raises StorageError."""
    clear_together(folder)
    faults: list[str] = []
    for number in itertools.count():
        offered: list[Any] = [None]
        if dist.get_rank() == 0:
            offered = [_offered(mirror, number)]
        dist.broadcast_object_list(offered)
        tag, checkpoint, fault = offered[0]
        if tag is None and fault is not None:
            raise StorageError(fault)
        if tag is None:
            break
        if checkpoint is not None:
            fault = fetch_together(mirror / tag, checkpoint.files, folder / tag)
            if fault is None:
                return checkpoint, faults
        faults.append(f"the checkpoint {mirror / tag} is damaged ({fault}) and is passed over")
    return None, faults


def _offered(mirror: ObjectPath, number: int) -> tuple[str | None, Checkpoint | None, str | None]:
    """Tag, checkpoint and fault of the newest marker (0) or an older one; no tag where there is none."""
    try:
        markers = _markers(mirror)
        if number >= len(markers):
            return None, None, None
        checkpoint = _read(markers[number])
    except Unreachable as error:
        # The other ranks wait for what is found here.
        return None, None, str(error)
    return markers[number].stem, checkpoint, None if checkpoint else "its marker is unreadable"


def _markers(folder: Location) -> list[Location]:
    """Markers, the newest first."""
    return [file for file in matching(folder, "*.json") if _TAG.fullmatch(file.stem)][::-1]


def _read(marker: Location) -> Checkpoint | None:
    try:
        loaded = json.loads(marker.read_text())
        checkpoint = Checkpoint(**{field.name: loaded[field.name] for field in fields(Checkpoint)})
    except Unreachable:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A name from a file is a path only where it is the file's own.
    return checkpoint if checkpoint.tag == marker.stem and loaded.get(SEAL) == seal(loaded) else None


def _fault(folder: Path, checkpoint: Checkpoint) -> str | None:
    for name, digest in checkpoint.files.items():
        file = folder / checkpoint.tag / name
        if not file.is_file():
            return f"{name} is missing"
        if digest_file(file) != digest:
            return f"{name} is not what was written"
    return None


def save(
    engine: Any,
    checkpoints: Checkpoints,
    log: Sequence[dict[str, Any]],
    *,
    total: int,
    training: dict[str, str],
) -> float:
    """Write a checkpoint and drop the third last; seconds taken. A collective. Raises StorageError."""
    began = time.perf_counter()
    folder, step = checkpoints.folder, len(log)
    named = [f"step{step:08d}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(named)
    tag = named[0]
    need = _bytes_of(engine)
    _require_room_together(folder, need)
    try:
        with disk_named(folder / tag, need):
            engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=False, save_latest=False)
    except StorageError:
        shutil.rmtree(folder / tag, ignore_errors=True)
        raise
    dist.barrier()
    if checkpoints.mirror is None:
        files = _digests_together(folder / tag)
    else:
        files = upload_together(folder, tag, checkpoints.mirror)
    write_s = time.perf_counter() - began
    if dist.get_rank() == 0:
        marker = {
            "step": step,
            "total": total,
            "tag": tag,
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "training": training,
            "log": list(log),
            "files": files,
            "write_s": write_s,
        }
        try:
            complete(checkpoints.kept, marker)
        except StorageError:
            # A checkpoint that nobody can find must not keep the disk full.
            remove_tree(checkpoints.kept / tag)
            raise
    return write_s


def complete(folder: Location, marker: dict[str, Any]) -> None:
    """Publish the marker of a checkpoint whose files are all written, and drop the third last. Raises StorageError."""
    replace(folder / f"{marker['tag']}.json", json.dumps({**marker, SEAL: seal(marker)}))
    _drop_old(folder)


def _bytes_of(engine: Any) -> int:
    """Upper bound of a checkpoint's size: weights, and two moments and a master copy in fp32 of what is trained."""
    parameters = [*engine.module.parameters(), *engine.module.buffers()]
    count = sum(int(getattr(item, "ds_numel", item.numel())) for item in parameters)
    trained = sum(int(getattr(item, "ds_numel", item.numel())) for item in parameters if item.requires_grad)
    return 4 * count + 12 * trained


def _require_room_together(folder: Path, need: int) -> None:
    """Every rank raises StorageError where rank 0 finds too little room; one alone would leave the others waiting."""
    error: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            require_room(folder, need)
        except (StorageError, OSError) as found:
            error = [str(found)]
    dist.broadcast_object_list(error)
    if error[0] is not None:
        raise StorageError(error[0])


def _digests_together(folder: Path) -> dict[str, str]:
    """Digest of every file, each rank reading its share."""
    listed: list[Any] = [
        sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    ]
    dist.broadcast_object_list(listed)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, {name: digest_file(folder / name) for name in listed[0][rank::world_size]})
    return {name: digest for share in shares for name, digest in share.items()}


def _drop_old(folder: Location) -> None:
    """Remove all but the newest complete checkpoints, and what crashes left half-written."""
    kept = {marker.stem for marker in _markers(folder)[:KEPT]}
    for path in [*matching(folder, "*"), *matching(folder / "universal", "*")]:
        if path.name.startswith(DRAFT) or (_TAG.match(path.stem) and path.stem not in kept):
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)
