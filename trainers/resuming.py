"""Where a training goes on: the engine, at the beginning or as the newest sound checkpoint left it."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers.checkpoints import Checkpoint, Checkpoints, agreed_latest
from trainers.disk import Location
from trainers.engine import effective_zero_stage, make_engine
from trainers.errors import ModelError, SpecError, StorageError
from trainers.inputs import TrainInputs
from trainers.mirror import clear_together, on_node
from trainers.saving import persistent_buffers
from trainers.scoring import RewardModule

_FINGERPRINT_VALUES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An engine to train with, the log of the steps behind it, and what is to be said about its checkpoints."""

    engine: Any
    log: list[dict[str, Any]] = field(default_factory=list)
    write_s: float = 0.0
    notices: tuple[str, ...] = ()


def start(
    model: Any, inputs: TrainInputs, checkpoints: Checkpoints | None, identity: dict[str, str]
) -> Start:
    """The engine, at the beginning or where its newest sound checkpoint left off. A collective.

    Raises ModelError where that is of another training, SpecError where it is of another ZeRO stage, StorageError.
    """
    checkpoint, notices, universal = None, list[str](), False
    if checkpoints is not None:
        checkpoint, notices = agreed_latest(checkpoints)
    if checkpoints is not None and checkpoint is not None:
        _require_same_training(checkpoint, checkpoints.kept, identity)
        zero_stage = effective_zero_stage(inputs.placement, inputs.precision)
        universal = _prepare(checkpoint, checkpoints, zero_stage)
    engine = make_engine(
        RewardModule(model, inputs.reward),
        optim=inputs.optim,
        placement=inputs.placement,
        precision=inputs.precision,
        universal=universal,
    )
    if checkpoints is None or checkpoint is None:
        return Start(engine=engine, notices=tuple(notices))
    try:
        _load(engine, checkpoint, checkpoints, universal=universal)
    except BaseException:
        engine.destroy()
        raise
    notices.append(f"resumed at step {checkpoint.step} of {checkpoint.total}")
    return Start(engine=engine, log=list(checkpoint.log), write_s=checkpoint.write_s, notices=tuple(notices))


def _require_same_training(checkpoint: Checkpoint, folder: Location, training: dict[str, str]) -> None:
    """Raise ModelError where the checkpoint is of another architecture, reward, optimiser, seed or data."""
    different = [name for name, value in training.items() if checkpoint.training.get(name) != value]
    if different:
        found = "; ".join(
            f"{name}: {checkpoint.training.get(name)}, not {training[name]}" for name in different
        )
        raise ModelError(
            f"the checkpoint in {folder} is of another training ({found}); remove it to start anew."
        )


def _prepare(checkpoint: Checkpoint, checkpoints: Checkpoints, zero_stage: int) -> bool:
    """Make the checkpoint loadable here and at this ZeRO stage; whether it now is a universal one. A collective."""
    if checkpoint.fits(dist.get_world_size(), zero_stage):
        return False
    if checkpoint.zero_stage != zero_stage:
        raise SpecError(
            f"the checkpoint in {checkpoints.kept} was written at ZeRO {checkpoint.zero_stage} and cannot go on at {zero_stage}; "
            f"use --zero-stage {checkpoint.zero_stage}, or remove it to start anew."
        )
    converts = dist.get_rank() if checkpoints.mirror is None else on_node()[0]
    if converts == 0:
        _convert(checkpoints.folder, checkpoint.tag)
    dist.barrier()
    return True


def _load(engine: Any, checkpoint: Checkpoint, checkpoints: Checkpoints, *, universal: bool) -> None:
    """Put weights, optimiser and counters back. A collective. Raises StorageError."""
    folder = checkpoints.folder
    found, _ = engine.load_checkpoint(str(folder / "universal" if universal else folder), tag=checkpoint.tag)
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
    # A process of its own, and no rank: it forks its own workers.
    alone = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StorageError(f"{folder / tag} could not be converted for this placement: {last}")
    draft.replace(target / tag)


def identity(model: Any, inputs: TrainInputs) -> dict[str, str]:
    """What a checkpoint must have in common with the training that goes on from it; `model` is the untrained one."""
    shapes = getattr(model.config, "hidden_size", 0), getattr(model.config, "num_hidden_layers", 0)
    # A few values of each tensor tell two base models apart without reading all of their weights.
    tensors = (*model.parameters(), *persistent_buffers(model).values())
    values = (tensor.detach().flatten()[:_FINGERPRINT_VALUES].tolist() for tensor in tensors)
    return {
        "architecture": f"{type(model).__name__} {shapes[0]}x{shapes[1]}, vocabulary {model.config.vocab_size}",
        "reward": str(inputs.reward),
        "optimiser": str(inputs.optim),
        "seed": str(inputs.seed),
        "precision": inputs.precision,
        "base model": _digest(values),
        "pairs": _digest((pair.index, pair.prompt, pair.chosen, pair.rejected) for pair in inputs.pairs),
        "reference": _digest(sorted((inputs.reference or {}).items())),
    }


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()[:12]
