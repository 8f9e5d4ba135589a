"""What a training is given, and what it returns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainers.pairs.packing import References
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import (
    BRADLEY_TERRY,
    UNTRUSTED,
    LoraSpec,
    LossSpec,
    OptimSpec,
    Placement,
    Precision,
    Trust,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """What a rank needs to train the base model at `location`; `name` and `dataset` appear on the model card.

    Weights are also kept after each of `keep_epochs` (from 1, without the last epoch). `validation` pairs are scored
    after every epoch; `reference` covers them, too. `lora` trains an adapter; `merge` saves it as part of the weights.
    """

    name: str
    location: str
    precision: Precision
    reward: RewardSpec
    optim: OptimSpec
    placement: Placement
    seed: int
    pairs: Sequence[TokenPair]
    reference: References | None
    revision: str | None = None
    trust: Trust = UNTRUSTED
    template: str | None = None
    keep_epochs: tuple[int, ...] = ()
    validation: Sequence[TokenPair] = ()
    loss: LossSpec = BRADLEY_TERRY
    lora: LoraSpec | None = None
    merge: bool = False
    dataset: str = ""

    @property
    def saves_adapter(self) -> bool:
        """Whether an adapter is saved, not a whole model."""
        return self.lora is not None and not self.merge

    @property
    def steps_of_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(len(self.pairs) / self.optim.effective_batch)

    @property
    def unusual(self) -> list[LossSpec | LoraSpec]:
        """The loss and the adapter where they are not the usual ones."""
        return [option for option in (self.loss, self.lora) if option and option != BRADLEY_TERRY]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The training log (one row per step, with the indices of its pairs), the final accuracy and the cost."""

    log: list[dict[str, Any]]
    train_accuracy: float
    perf: dict[str, float]
