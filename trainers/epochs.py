"""Weights as they were at the end of chosen epochs, besides the last.

They wait beside the training's checkpoints until it is complete, so that a training that goes on still has those of
its earlier epochs; where there are no checkpoints, they go to the output folder at once. With checkpoints in a bucket
they wait there, each with a sealed note of its files' digests that is put last.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers.disk import DRAFT, SEAL, ObjectPath, digest_file, fetch, files_below, replace, seal, upload
from trainers.errors import StorageError
from trainers.saving import full_weights, save_model


def model_folder(epoch: int, epochs: int) -> str:
    """Name of the folder that holds the model after `epoch` (from 1) of `epochs`."""
    return "model" if epoch == epochs else f"model-epoch-{epoch}"


def keep_epoch(
    model: Any,
    files: Mapping[str, bytes],
    folder: Path,
    epoch: int,
    epochs: int,
    mirror: ObjectPath | None = None,
) -> None:
    """Write the model as it is into `folder` or `mirror`, whole or not at all. A collective. Raises StorageError."""
    weights = full_weights(model)
    if dist.get_rank() > 0:
        return
    target = folder / model_folder(epoch, epochs)
    draft = folder / f"{DRAFT}{target.name}"
    for left in (draft, target):
        shutil.rmtree(left, ignore_errors=True)
    save_model(weights, files, draft)
    draft.rename(target)
    if mirror is not None:
        names = files_below(target)
        upload(target, names, mirror / target.name)
        note = {"files": {name: digest_file(target / name) for name in names}}
        replace(mirror / f"{target.name}.json", json.dumps({**note, SEAL: seal(note)}))
        shutil.rmtree(target, ignore_errors=True)


def collect_epochs(
    folder: Path, out_dir: Path, kept: tuple[int, ...], epochs: int, mirror: ObjectPath | None = None
) -> None:
    """Put the models that `keep_epoch` left into `out_dir`. Raises StorageError where one is gone."""
    if folder == out_dir:
        return
    if mirror is not None:
        for name in (model_folder(epoch, epochs) for epoch in kept):
            _fetch_kept(mirror, name, out_dir)
        return
    for epoch in kept:
        name = model_folder(epoch, epochs)
        if not (folder / name).is_dir():
            raise StorageError(
                f"the weights kept after epoch {epoch} are gone from {folder}; remove it and run the same command again."
            )
        shutil.copytree(folder / name, out_dir / name, copy_function=_link_or_copy)


def _fetch_kept(mirror: ObjectPath, name: str, out_dir: Path) -> None:
    wrong = ["its note"]
    with contextlib.suppress(FileNotFoundError, ValueError):
        note = json.loads((mirror / f"{name}.json").read_text())
        if note.get(SEAL) == seal(note):
            wrong = fetch(mirror / name, note["files"], out_dir / name)
    if wrong:
        raise StorageError(
            f"the weights kept in {mirror / name} are gone or not what was written ({wrong[0]}); remove {mirror} and run "
            "the same command again."
        )


def _link_or_copy(source: str, target: str) -> None:
    """Without a second copy on the disk where the file system can: the first must outlive an attempt that fails."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
