"""What a training keeps until it is complete: checkpoints to resume from, and the weights of chosen epochs.

A checkpoint is DeepSpeed's own, and complete only when its marker stands beside it.

    <folder>/<tag>/…            DeepSpeed's files
    <folder>/<tag>.json         the step, the placement, the log so far, and every file's digest; written last, by rank 0
    <folder>/universal/<tag>/…  the same in DeepSpeed's universal form, made when another world size resumes

The two newest are kept: if the newest is damaged, the one before it is used. Every tag is new, so that two writers of
one folder never share a file. With a mirror, files and markers are kept in a bucket under the same names, and `folder`
is temporary storage on each node: files are removed once uploaded, and fetched before a training resumes. At the same
placement a checkpoint is loaded bit for bit; for another world size it is converted first. The ZeRO stage must be the
same.

The weights of chosen epochs are stored beside the checkpoints, so that a resumed training still has those of earlier
epochs; without checkpoints they go to the output folder at once. In a bucket, a sealed note with their digests is
written last.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trainers.errors import Interrupted, SpecError, StorageError, SweepError, Unreachable
from trainers.models.adapters import CONFIG, adapter_of
from trainers.models.saving import full_weights, save_model
from trainers.storage import (
    DRAFT,
    SEAL,
    Location,
    ObjectPath,
    digest_file,
    disk_named,
    fetch,
    files_below,
    is_written,
    matching,
    remove_tree,
    replace,
    require_room,
    seal,
    upload,
)

KEPT = 2
EVERY_S = 600.0
_TAG = re.compile(r"step\d+-[0-9a-f]+")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where checkpoints are kept, and how often they are written: every `every_steps`, or else by time.

    By time: every ten minutes, but at least ten times the duration of a write apart. With a `mirror` they are kept in
    that bucket, and `folder` is local to this node.
    """

    folder: Path
    every_steps: int | None = None
    mirror: ObjectPath | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise SpecError(f"{self.every_steps} steps between checkpoints: give at least 1.")

    @property
    def kept(self) -> Location:
        """The folder or bucket that holds the markers."""
        return self.folder if self.mirror is None else self.mirror

    def due(self, step: int, since_s: float, write_s: float) -> bool:
        """Return whether one is due after `step` steps, `since_s` seconds after the last, which took `write_s`."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return since_s >= max(EVERY_S, 10 * write_s)


class Later:
    """What rank 0 writes to a bucket in a thread, one after another: other ranks do not wait for it.

    At the end of the block all is written. An error of a write is raised by the next call, or there; nothing is written
    after it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "later")
        self._last: Future[None] | None = None

    def write(self, act: Callable[[], None]) -> None:
        """Write it after all that was given before."""
        before = self._last

        def in_turn() -> None:
            if before is not None:
                before.result()
            act()

        if before is not None and before.done():
            before.result()
        self._last = self._thread.submit(in_turn)

    def __enter__(self) -> "Later":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        # A training that is stopped counts on what it has written.
        if self._last is not None and (kind is None or issubclass(kind, Interrupted)):
            self._last.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The marker of a complete checkpoint after `step` of `total` optimiser steps, with their log."""

    step: int
    total: int
    tag: str
    world_size: int
    zero_stage: int
    training: dict[str, str]
    log: list[dict[str, Any]]
    files: dict[str, str]
    write_s: float


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint in `folder`, and what is wrong with newer ones."""
    found = [(marker.stem, _read(marker)) for marker in _markers(folder)]
    return _newest_sound(folder, found, lambda checkpoint: _fault(folder, checkpoint))


def agreed_latest(checkpoints: Checkpoints) -> tuple[Checkpoint | None, list[str]]:
    """Return on every rank what `latest` finds on rank 0, after fetching files from a mirror. A collective.

    Remains of a crash are removed first: they would take the room of the next checkpoint. Raises StorageError.
    """
    folder, mirror = checkpoints.folder, checkpoints.mirror
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, StorageError):
            _drop_old(checkpoints.kept)
    if mirror is None:
        return on_first(lambda: latest(folder))
    clear_together(folder)
    clear_together(_kept_epochs(folder))
    found = on_first(lambda: [(marker.stem, _read(marker)) for marker in _markers(mirror)])
    return _newest_sound(
        mirror,
        found,
        lambda checkpoint: fetch_together(mirror / checkpoint.tag, checkpoint.files, folder / checkpoint.tag),
    )


def _newest_sound(
    folder: Location,
    found: Sequence[tuple[str, Checkpoint | None]],
    fault_of: Callable[[Checkpoint], str | None],
) -> tuple[Checkpoint | None, list[str]]:
    faults: list[str] = []
    for tag, checkpoint in found:
        fault = "its marker is unreadable" if checkpoint is None else fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"the checkpoint {folder / tag} is damaged ({fault}) and is passed over")
    return None, faults


def on_first(act: Callable[[], Found]) -> Found:
    """Return on every rank what `act` returns on rank 0. A collective. A SweepError of rank 0 is raised on all."""
    shares: list[Any] = together(lambda: act() if dist.get_rank() == 0 else None)
    found: Found = shares[0]
    return found


def _markers(folder: Location) -> list[Location]:
    """Return the markers in a folder, the newest first."""
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
    place = folder / checkpoint.tag
    wrong = (name for name, digest in checkpoint.files.items() if not is_written(place / name, digest))
    return next((f"{name} is missing or not what was written" for name in wrong), None)


def save(
    engine: Any,
    checkpoints: Checkpoints,
    log: Sequence[dict[str, Any]],
    *,
    total: int,
    training: dict[str, str],
    later: Later,
) -> float:
    """Write a checkpoint, drop the third last, and return the seconds taken. A collective. Raises StorageError.

    In a bucket it is complete only after what rank 0 writes `later`.
    """
    began = time.perf_counter()
    folder, step = checkpoints.folder, len(log)
    tag = on_first(lambda: f"step{step:08d}-{uuid.uuid4().hex[:8]}")
    need = _bytes_of(engine)
    _require_room_together(folder, need)
    try:
        with disk_named(folder / tag, need):
            # Weights that an adapter does not change are read from the base model again.
            adapted = adapter_of(engine.module.model) is not None
            engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=adapted, save_latest=False)
    except StorageError:
        shutil.rmtree(folder / tag, ignore_errors=True)
        raise
    dist.barrier()
    mirror = checkpoints.mirror
    files = _digests_together(folder / tag) if mirror is None else upload_together(folder, tag, mirror)
    write_s = time.perf_counter() - began
    if dist.get_rank() == 0:
        written = Checkpoint(
            step=step,
            total=total,
            tag=tag,
            world_size=dist.get_world_size(),
            zero_stage=engine.zero_optimization_stage(),
            training=training,
            log=list(log),
            files=files,
            write_s=write_s,
        )
        publish = functools.partial(complete, checkpoints.kept, asdict(written))
        if mirror is None:
            publish()
        else:
            later.write(publish)
    return write_s


def complete(folder: Location, marker: dict[str, Any]) -> None:
    """Write the marker of a checkpoint whose files are all written, and drop the third last. Raises StorageError."""
    try:
        replace(folder / f"{marker['tag']}.json", json.dumps({**marker, SEAL: seal(marker)}))
        _drop_old(folder, newest=marker["tag"])
    except StorageError:
        # A checkpoint without a marker would only fill the disk.
        remove_tree(folder / marker["tag"])
        raise


def _bytes_of(engine: Any) -> int:
    """Return an upper bound of a checkpoint's size: weights, and moments and masters of trained ones in fp32."""
    parameters = [*engine.module.parameters(), *engine.module.buffers()]
    count = sum(int(getattr(item, "ds_numel", item.numel())) for item in parameters)
    trained = sum(int(getattr(item, "ds_numel", item.numel())) for item in parameters if item.requires_grad)
    if adapter_of(engine.module.model):
        # DeepSpeed also saves the table of tied embeddings.
        table = engine.module.model.get_input_embeddings().weight
        count = trained + int(getattr(table, "ds_numel", table.numel()))
    return 4 * count + 12 * trained


def _require_room_together(folder: Path, need: int) -> None:
    def look() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        require_room(folder, need)

    on_first(look)


def _digests_together(folder: Path) -> dict[str, str]:
    """Return the digest of every file, each rank reading its share."""
    names = on_first(lambda: files_below(folder))
    mine = names[dist.get_rank() :: dist.get_world_size()]
    shares = together(lambda: {name: digest_file(folder / name) for name in mine})
    return {name: digest for share in shares for name, digest in share.items()}


def _drop_old(folder: Location, newest: str | None = None) -> None:
    """Remove all but the newest complete checkpoints, including remains of crashes.

    A checkpoint of a later step than `newest` may be on its way, and stays.
    """
    kept = {marker.stem for marker in _markers(folder)[:KEPT]}
    for path in [*matching(folder, "*"), *matching(folder / "universal", "*")]:
        coming = newest is not None and path.stem.partition("-")[0] > newest.partition("-")[0]
        if path.name.startswith(DRAFT) or (_TAG.match(path.stem) and path.stem not in kept and not coming):
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)


def prepare(checkpoint: Checkpoint, checkpoints: Checkpoints, zero_stage: int) -> bool:
    """Convert the checkpoint for this placement if need be; return whether it is now universal. A collective.

    Raises SpecError if it was written at another ZeRO stage, StorageError.
    """
    if checkpoint.zero_stage != zero_stage:
        raise SpecError(
            f"the checkpoint in {checkpoints.kept} was written at ZeRO {checkpoint.zero_stage} and cannot go on at {zero_stage}; "
            f"use --zero-stage {checkpoint.zero_stage}, or remove it to start anew."
        )
    # Without ZeRO, every rank holds everything.
    if zero_stage == 0 or checkpoint.world_size == dist.get_world_size():
        return False
    converts = dist.get_rank() if checkpoints.mirror is None else on_node()[0]
    if converts == 0:
        _convert(checkpoints.folder, checkpoint.tag)
    dist.barrier()
    return True


def load(engine: Any, checkpoint: Checkpoint, checkpoints: Checkpoints, *, universal: bool) -> None:
    """Load weights, optimiser and counters into the engine. A collective. Raises StorageError."""
    folder = checkpoints.folder
    adapted = adapter_of(engine.module.model) is not None
    found, _ = engine.load_checkpoint(
        str(folder / "universal" if universal else folder), tag=checkpoint.tag, load_module_strict=not adapted
    )
    if found is None:
        raise StorageError(
            f"{folder / checkpoint.tag} is not a checkpoint of this training; remove {checkpoints.kept}."
        )
    if checkpoints.mirror is not None:
        clear_together(folder)


def _convert(folder: Path, tag: str) -> None:
    target = folder / "universal"
    if (target / tag).is_dir():
        return
    draft = target / f"{tag}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / tag), "--output_folder", str(draft)]
    # In a process that is no rank, since it forks workers.
    alone = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StorageError(f"{folder / tag} could not be converted for this placement: {last}")
    draft.replace(target / tag)


def model_folder(epoch: int, epochs: int) -> str:
    """Return the name of the folder that holds the model after `epoch` (from 1) of `epochs`."""
    return "model" if epoch == epochs else f"model-epoch-{epoch}"


def _kept_epochs(folder: Path) -> Path:
    """Return where kept models wait for their upload: a checkpoint clears the folder of its own files."""
    return folder.with_name(f"{folder.name}-epochs")


def keep_epoch(
    model: Any,
    files: Mapping[str, bytes],
    folder: Path,
    epoch: int,
    epochs: int,
    later: Later,
    mirror: ObjectPath | None = None,
) -> None:
    """Write the current model into `folder`, atomically, or `later` into `mirror`. A collective. Raises StorageError."""
    weights = full_weights(model, adapter=CONFIG in files)
    if dist.get_rank() > 0:
        return
    if mirror is not None:
        folder = _kept_epochs(folder)
    target = folder / model_folder(epoch, epochs)
    draft = folder / f"{DRAFT}{target.name}"
    for left in (draft, target):
        shutil.rmtree(left, ignore_errors=True)
    save_model(weights, files, draft)
    draft.rename(target)
    if mirror is not None:
        later.write(functools.partial(_upload_kept, target, mirror))


def _upload_kept(target: Path, mirror: ObjectPath) -> None:
    try:
        names = files_below(target)
        upload(target, names, mirror / target.name)
        note = {"files": {name: digest_file(target / name) for name in names}}
        replace(mirror / f"{target.name}.json", json.dumps({**note, SEAL: seal(note)}))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def collect_epochs(
    folder: Path, out_dir: Path, kept: tuple[int, ...], epochs: int, mirror: ObjectPath | None = None
) -> None:
    """Put the models of `keep_epoch` into `out_dir`. Raises StorageError if one is missing."""
    place = folder if mirror is None else mirror
    for name in (model_folder(epoch, epochs) for epoch in kept if folder != out_dir):
        if isinstance(place, Path):
            sound = (place / name).is_dir()
            if sound:
                shutil.copytree(place / name, out_dir / name, copy_function=_link_or_copy)
        else:
            sound = _fetch_kept(place, name, out_dir)
        if not sound:
            raise StorageError(
                f"the weights kept in {place / name} are gone or not what was written; remove {place} and run the same "
                "command again."
            )


def _fetch_kept(mirror: ObjectPath, name: str, out_dir: Path) -> bool:
    """Download a model of `keep_epoch`; return whether it is what was written."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        note = json.loads((mirror / f"{name}.json").read_text())
        return note.get(SEAL) == seal(note) and not fetch(mirror / name, note["files"], out_dir / name)
    return False


def _link_or_copy(source: str, target: str) -> None:
    """Hard-link the file; copy it if the file system has no hard links."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def on_node() -> tuple[int, int]:
    """Return this rank's number on its node, and the node's number of ranks."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def upload_together(station: Path, tag: str, mirror: ObjectPath) -> dict[str, str]:
    """Upload every node's files of the checkpoint `tag`, remove its folder, and return all digests. A collective.

    Raises StorageError on every rank if one upload fails.
    """

    def put() -> dict[str, str]:
        first, step = on_node()
        folder = station / tag
        names = files_below(folder)[first::step]
        upload(folder, names, mirror / tag)
        return {name: digest_file(folder / name) for name in names}

    try:
        shares = together(put)
    finally:
        # DeepSpeed leaves scripts beside the checkpoint, so the whole folder goes.
        clear_together(station)
    return {name: digest for share in shares for name, digest in share.items()}


def fetch_together(source: ObjectPath, digests: Mapping[str, str], folder: Path) -> str | None:
    """Fetch a checkpoint's files to every node; return what is wrong with them, or None. A collective.

    Raises StorageError on every rank if one node cannot fetch them.
    """

    def get() -> list[str]:
        return fetch(source, digests, folder) if on_node()[0] == 0 else []

    wrong = sorted({name for share in together(get) for name in share})
    return f"{wrong[0]} is missing or not what was written" if wrong else None


def clear_together(folder: Path) -> None:
    """Remove a folder on every node once all ranks are here. A collective."""
    dist.barrier()
    if on_node()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


def together(act: Callable[[], Found]) -> list[Found]:
    """Return what `act` returns on each rank. A SweepError of one rank is raised on all, which would else wait for it."""
    mine: tuple[Found | None, SweepError | None]
    try:
        mine = act(), None
    except SweepError as error:
        mine = None, error
    except OSError as error:
        mine = None, StorageError(str(error))
    shares: list[tuple[Found, SweepError | None]] = [mine] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(shares, mine)
    for _, fault in shares:
        if fault is not None:
            raise fault
    return [found for found, _ in shares]
