"""The least that loading a model and training it take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.models.loading import load_model
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement
from trainers.train.inputs import TrainInputs


def load(folder: Path, output: str, precision: str = "fp32", **options: Any) -> Any:
    """The model of a folder with its own tokenizer."""
    tokenizer = load_tokenizer(str(folder))
    return load_model(str(folder), tokenizer=tokenizer, output=output, precision=precision, **options)


def inputs(model: Path, pairs: Sequence[TokenPair], **changes: Any) -> TrainInputs:
    """Of one epoch of EX-RM, two pairs a step, without a reference."""
    values = {
        "name": "tiny",
        "location": str(model),
        "precision": "fp32",
        "reward": RewardSpec(kind="ex_rm"),
        "optim": OptimSpec(lr=1e-3, epochs=1, effective_batch=2),
        "placement": Placement(forward_tokens=4096),
        "seed": 0,
        "pairs": pairs,
        "reference": None,
    }
    return TrainInputs(**{**values, **changes})
