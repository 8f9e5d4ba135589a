"""Ray Tune's ASHA over the searches of a sweep: Tune rules at each rung, the training ends itself and commits.

A training asks the coordinator what becomes of it (rungs.py), its trial function reports the accuracy to Tune from a
thread, Tune's scheduler decides, and the coordinator answers. Tune is never left to stop a trial: it would end the process
that has yet to write the artifact.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from orchestrator.artifacts import Store
from orchestrator.rungs import Scored
from orchestrator.searches import accuracies, ended_early, searched
from orchestrator.stages import TrainStage
from trainers.specs import ValidationSpec

MILESTONE, ACCURACY, EPOCH = "milestone", "validation_accuracy", "epoch"


class SearchScheduler(FIFOScheduler):  # type: ignore[misc]
    """One ASHAScheduler of Tune for each search; trials of no search start in order and are never ruled on.

    What is in the store of a search has come to its rungs already.
    """

    def __init__(self, trainings: Sequence[TrainStage], store: Store, coordinator: ActorHandle) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._rules: dict[str, ASHAScheduler] = {}
        self._epochs: dict[str, int] = {}
        for training in trainings:
            validation = training.validation
            if validation is None or not validation.rungs or training.key in self._rules:
                continue
            rule = asha(validation)
            for other in searched(training, validation):
                self._rules[other.key], self._epochs[other.key] = rule, other.optim.epochs
                come_before(rule, other, accuracies(other, store))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tune's hook: a trial is about to start."""
        rule = self._rules.get(trial.config["trial"])
        if rule is not None:
            rule.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's hook: a training came to a rung. Goes on in any case; who is behind is told, and ends itself."""
        key = trial.config["trial"]
        if MILESTONE in result:
            decision = self._rules[key].on_trial_result(tune_controller, trial, result)
            epoch, goes_on = result[EPOCH], decision != self.STOP
            if not goes_on:
                text = ended_early(epoch, self._epochs[key], result[ACCURACY])
                self._coordinator.post.remote({"trial": key, "event": "notice", "text": text})
            ray.get(self._coordinator.rule.remote(key, epoch, goes_on))
        going_on: str = self.CONTINUE
        return going_on


def asha(validation: ValidationSpec) -> ASHAScheduler:
    """Tune's scheduler for one search. Its milestones are powers of the reduction, so that is how rungs are told to it."""
    return ASHAScheduler(
        time_attr=MILESTONE,
        metric=ACCURACY,
        mode="max",
        grace_period=1,
        # Between the last milestone and the next, whatever the rounding of a logarithm.
        max_t=1.5 * validation.reduction ** (len(validation.rungs) - 1),
        reduction_factor=validation.reduction,
        stop_last_trials=False,
    )


def reported(validation: ValidationSpec, scored: Scored) -> dict[str, Any]:
    """What Tune is told of a training that came to a rung."""
    milestone = validation.reduction ** validation.rungs.index(scored.epoch)
    return {EPOCH: scored.epoch, ACCURACY: scored.accuracy, MILESTONE: milestone}


def come_before(rule: ASHAScheduler, training: TrainStage, found: Sequence[float]) -> None:
    """Have the rule know a training that an earlier command ended or completed."""
    assert training.validation is not None
    trial = SimpleNamespace(trial_id=training.key)
    rule.on_trial_add(None, trial)
    for epoch in (epoch for epoch in training.validation.rungs if epoch <= len(found)):
        scored = Scored(epoch=epoch, accuracy=found[epoch - 1])
        rule.on_trial_result(None, trial, reported(training.validation, scored))


@contextlib.contextmanager
def rungs_reported(training: TrainStage, coordinator: ActorHandle) -> Iterator[None]:
    """Report to Tune what the training scores at its rungs while the block runs: from a thread, as the block trains."""
    validation = training.validation
    if validation is None or not validation.rungs:
        yield
        return

    def report() -> None:
        while (scored := ray.get(coordinator.undecided.remote(training.key))) is not None:
            # Returns when Tune's scheduler has ruled, and the coordinator knows.
            tune.report(reported(validation, scored))

    thread = threading.Thread(target=report, name="rungs-to-tune", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ray.get(coordinator.end_rungs.remote(training.key))
        # Who reports the trial's end must not meet another report.
        thread.join()
