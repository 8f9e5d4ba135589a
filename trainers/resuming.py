"""Where a training goes on: the engine, at the beginning or as the newest sound checkpoint left it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainers import checkpoints as saved
from trainers.checkpoints import Checkpoints
from trainers.engine import effective_zero_stage, make_engine
from trainers.inputs import TrainInputs
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
        checkpoint, notices = saved.agreed_latest(checkpoints)
    if checkpoints is not None and checkpoint is not None:
        saved.require_same_training(checkpoint, checkpoints.kept, identity)
        zero_stage = effective_zero_stage(inputs.placement, inputs.precision)
        universal = saved.prepare_resume(checkpoint, checkpoints, zero_stage)
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
        saved.load(engine, checkpoint, checkpoints, universal=universal)
    except BaseException:
        engine.destroy()
        raise
    notices.append(f"resumed at step {checkpoint.step} of {checkpoint.total}")
    return Start(engine=engine, log=list(checkpoint.log), write_s=checkpoint.write_s, notices=tuple(notices))


def identity(model: Any, inputs: TrainInputs) -> dict[str, str]:
    """What a checkpoint must have in common with the training that goes on from it; `model` is the untrained one."""
    shapes = getattr(model.config, "hidden_size", 0), getattr(model.config, "num_hidden_layers", 0)
    # A few values of each tensor tell two base models apart without reading all of their weights.
    values = (weight.detach().flatten()[:_FINGERPRINT_VALUES].tolist() for weight in model.parameters())
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
