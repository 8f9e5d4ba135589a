"""Weights as they were at the end of chosen epochs, besides the last.

They wait beside the training's checkpoints until it is complete, so that a training that goes on still has those of
its earlier epochs; where there are no checkpoints, they go to the output folder at once.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers.disk import DRAFT
from trainers.errors import StorageError
from trainers.saving import full_weights, save_model


def model_folder(epoch: int, epochs: int) -> str:
    """Name of the folder that holds the model after `epoch` (from 1) of `epochs`."""
    return "model" if epoch == epochs else f"model-epoch-{epoch}"


def keep_epoch(model: Any, tokenizer: Any, folder: Path, epoch: int, epochs: int) -> None:
    """Write the model as it is into `folder`, whole or not at all. A collective. Raises StorageError."""
    weights = full_weights(model)
    if dist.get_rank() > 0:
        return
    target = folder / model_folder(epoch, epochs)
    draft = folder / f"{DRAFT}{target.name}"
    for left in (draft, target):
        shutil.rmtree(left, ignore_errors=True)
    save_model(model, weights, tokenizer, draft)
    draft.rename(target)


def collect_epochs(folder: Path, out_dir: Path, kept: tuple[int, ...], epochs: int) -> None:
    """Put the models that `keep_epoch` left in `folder` into `out_dir`. Raises StorageError where one is gone."""
    if folder == out_dir:
        return
    for epoch in kept:
        name = model_folder(epoch, epochs)
        if not (folder / name).is_dir():
            raise StorageError(
                f"the weights kept after epoch {epoch} are gone from {folder}; remove it and run the same command again."
            )
        shutil.copytree(folder / name, out_dir / name, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    """Without a second copy on the disk where the file system can: the first must outlive an attempt that fails."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
