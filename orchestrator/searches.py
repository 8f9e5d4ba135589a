"""Searches for a learning rate: trainings that differ in their rate only, some of which end early by ASHA's rule.

A training's validation (specs.ValidationSpec) names the rates that it is compared with, so each knows the others. On
Ray the rule is Ray Tune's own (asha.py), where trainings come to a rung in any order; in one process it is `goes_on`,
which is the same rule, and they come in the order of their rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.artifacts import Store
from orchestrator.stages import TrainStage
from trainers.errors import Damaged
from trainers.specs import ValidationSpec

# Whether a training goes on after an epoch (from 1) with that accuracy on its validation pairs.
GoesOn = Callable[[int, float], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search's outcome: accuracy on the validation pairs by epoch, for each rate; None is a training that diverged."""

    rates: tuple[float, ...]
    accuracies: tuple[tuple[float, ...] | None, ...]

    @property
    def best(self) -> float | None:
        """The rate that came furthest and is best there, of equals the lowest; None where all diverged."""
        ranked = [
            (len(some), some[-1], -rate)
            for rate, some in zip(self.rates, self.accuracies, strict=True)
            if some is not None
        ]
        return -max(ranked)[2] if ranked else None


def searched(training: TrainStage, validation: ValidationSpec) -> tuple[TrainStage, ...]:
    """The trainings of a search, in the order of its rates: `training` on what the validation leaves of its pairs."""
    return tuple(
        replace(at_rate(training, rate), validation=validation, keep_epochs=()) for rate in validation.rates
    )


def at_rate(training: TrainStage, lr: float) -> TrainStage:
    """The same training at another learning rate."""
    return replace(training, optim=replace(training.optim, lr=lr))


def outcome(trainings: Sequence[TrainStage], store: Store) -> Search | None:
    """What a search came to; None while one of its trainings is still to be done."""
    if not all(store.complete(stage.kind, stage.key) for stage in trainings):
        return None
    return Search(
        rates=tuple(stage.optim.lr for stage in trainings),
        accuracies=tuple(accuracies(stage, store) or None for stage in trainings),
    )


def accuracies(training: TrainStage, store: Store) -> tuple[float, ...]:
    """Accuracy on the validation pairs after each epoch; empty where the training diverged or is not done."""
    try:
        manifest = store.manifest(training.kind, training.key)
    except Damaged:
        # Its training counts as missing, and is done again.
        return ()
    return () if manifest is None else tuple(manifest["info"]["validation_accuracy"])


def goes_on(others: Sequence[float], accuracy: float, reduction: int) -> bool:
    """ASHA's rule as Ray Tune has it: whether `accuracy` is not below the best 1/`reduction` of what came before."""
    # Imported late: planning needs none of it.
    import numpy as np

    return not others or accuracy >= float(np.percentile(others, 100 * (1 - 1 / reduction)))


def ruled_by_store(training: TrainStage, store: Store, say: Callable[[str], None]) -> GoesOn | None:
    """The rule for trainings one after another: what was before is in the store. None where the training is part of no search."""
    validation = training.validation
    if validation is None:
        return None
    others = [accuracies(stage, store) for stage in searched(training, validation)]

    def rule(epoch: int, accuracy: float) -> bool:
        if epoch not in validation.rungs:
            return True
        reached = [some[epoch - 1] for some in others if len(some) >= epoch]
        stays = goes_on(reached, accuracy, validation.reduction)
        if not stays:
            say(ended_early(epoch, training.optim.epochs, accuracy))
        return stays

    return rule


def ended_early(epoch: int, epochs: int, accuracy: float) -> str:
    """That the rule ended a training, for people."""
    return f"ended by ASHA after epoch {epoch} of {epochs}: validation accuracy {accuracy:.3f} is behind"
