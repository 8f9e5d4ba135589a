"""Collectives on files: errors reach every rank, and checkpoints go between every node's folder and a bucket.

A node's folder is only a station: files leave it once they are up, and are fetched into it before a training resumes.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from trainers.errors import StorageError
from trainers.storage import ObjectPath, digest_file, fetch, files_below, upload

Found = TypeVar("Found")


def on_node() -> tuple[int, int]:
    """This rank's place among those of its node, and how many they are, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def upload_together(station: Path, tag: str, mirror: ObjectPath) -> dict[str, str]:
    """Put every node's files of the checkpoint `tag` and remove its folder; the digests of all. A collective.

    Raises StorageError on every rank where one rank's files cannot be put.
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
        # Whole, as DeepSpeed leaves scripts of its own beside the checkpoint.
        clear_together(station)
    return {name: digest for share in shares for name, digest in share.items()}


def fetch_together(source: ObjectPath, digests: Mapping[str, str], folder: Path) -> str | None:
    """Have all files of a checkpoint in every node's folder; what is wrong with them, None where nothing is. A collective.

    Raises StorageError on every rank where one node cannot fetch them.
    """

    def get() -> list[str]:
        return fetch(source, digests, folder) if on_node()[0] == 0 else []

    wrong = sorted({name for share in together(get) for name in share})
    return f"{wrong[0]} is missing or not what was written" if wrong else None


def clear_together(folder: Path) -> None:
    """Remove a folder on every node when all ranks are done with it. A collective."""
    dist.barrier()
    if on_node()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


def together(act: Callable[[], Found]) -> list[Found]:
    """Return what every rank found. Raises StorageError on all of them where one failed, as the others would wait for it."""
    mine: tuple[Found | None, str | None]
    try:
        mine = act(), None
    except (OSError, StorageError) as error:
        mine = None, str(error)
    shares: list[tuple[Found, str | None]] = [mine] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(shares, mine)
    for _, fault in shares:
        if fault is not None:
            raise StorageError(fault)
    return [found for found, _ in shares]
