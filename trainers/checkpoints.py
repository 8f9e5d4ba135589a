"""Checkpoints inside a training: DeepSpeed's own, complete only when a marker names them.

    <folder>/complete.json      the step, the placement and the log so far; written last, by rank 0
    <folder>/<tag>/…            DeepSpeed's files
    <folder>/universal/<tag>/…  the same in DeepSpeed's universal form, made when another world size resumes

At the placement it was written with a checkpoint is loaded bit for bit; at another world size it is
converted first. The ZeRO stage must be the one it was written at.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers.errors import ModelError, SpecError, StorageError

_MARKER = "complete.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where checkpoints are kept (one at a time), and after how many optimiser steps each is written."""

    folder: Path
    every_steps: int

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise SpecError(f"--checkpoint-every {self.every_steps}: give at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: the optimiser steps done, their log, and by what it was written."""

    step: int
    tag: str
    world_size: int
    zero_stage: int
    training: dict[str, str]
    log: list[dict[str, Any]]

    def fits(self, world_size: int, zero_stage: int) -> bool:
        """Whether it can be loaded as it is. Without ZeRO every rank holds everything, at any world size."""
        if self.zero_stage == zero_stage == 0:
            return True
        return (self.world_size, self.zero_stage) == (world_size, zero_stage)


def latest(folder: Path) -> Checkpoint | None:
    """The complete checkpoint in `folder`, if there is one."""
    marker = folder / _MARKER
    return Checkpoint(**json.loads(marker.read_text())) if marker.is_file() else None


def save(engine: Any, checkpoints: Checkpoints, log: list[dict[str, Any]], training: dict[str, str]) -> None:
    """Write a checkpoint and drop the one before; `training` says of what it is. A collective."""
    folder, step = checkpoints.folder, len(log)
    tag = f"step{step}"
    before = latest(folder)
    if dist.get_rank() == 0:
        # What a crash left half-written, perhaps by more ranks than there are now.
        shutil.rmtree(folder / tag, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=False)
    dist.barrier()
    if dist.get_rank() > 0:
        return
    written = {
        "step": step,
        "tag": tag,
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "training": training,
        "log": log,
    }
    draft = folder / f"{_MARKER}.draft"
    draft.write_text(json.dumps(written))
    draft.replace(folder / _MARKER)
    if before is not None and before.tag != tag:
        shutil.rmtree(folder / before.tag, ignore_errors=True)
        shutil.rmtree(folder / "universal", ignore_errors=True)


def require_same_training(checkpoint: Checkpoint, folder: Path, training: dict[str, str]) -> None:
    """Raise ModelError where the checkpoint is of another architecture, reward, optimiser, seed or data."""
    different = [name for name, value in training.items() if checkpoint.training.get(name) != value]
    if different:
        found = "; ".join(
            f"{name}: {checkpoint.training.get(name)}, not {training[name]}" for name in different
        )
        raise ModelError(
            f"the checkpoint in {folder} is of another training ({found}); remove it to start anew."
        )


def prepare_resume(checkpoint: Checkpoint, folder: Path, zero_stage: int) -> bool:
    """Make the checkpoint loadable here and at this ZeRO stage; whether it now is a universal one. A collective."""
    if checkpoint.fits(dist.get_world_size(), zero_stage):
        return False
    if checkpoint.zero_stage != zero_stage:
        raise SpecError(
            f"the checkpoint in {folder} was written at ZeRO {checkpoint.zero_stage} and cannot go on at {zero_stage}; "
            f"use --zero-stage {checkpoint.zero_stage}, or remove it to start anew."
        )
    if dist.get_rank() == 0:
        _convert(folder, checkpoint.tag)
    dist.barrier()
    return True


def load(engine: Any, checkpoint: Checkpoint, folder: Path, *, universal: bool) -> None:
    """Put weights, optimiser and counters back. Raises StorageError."""
    found, _ = engine.load_checkpoint(str(folder / "universal" if universal else folder), tag=checkpoint.tag)
    if found is None:
        raise StorageError(
            f"{folder / checkpoint.tag} is not a checkpoint of this training; remove {folder}."
        )


def _convert(folder: Path, tag: str) -> None:
    target = folder / "universal"
    if (target / tag).is_dir():
        return
    draft = target / f"{tag}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / tag), "--output_folder", str(draft)]
    # A process of its own, and no rank: it forks its own workers.
    alone = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StorageError(f"{folder / tag} could not be converted for this placement: {last}")
    draft.replace(target / tag)
