"""Run one trial on any backend: shared stages → training → evaluation, with retries."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.run import failures
from orchestrator.run.events import Completed, Event, Failed, Retried, StageBegan, Started
from orchestrator.run.failures import Failure
from orchestrator.spec.stages import EvaluateStage, Stage, TrainStage, TrialPlan
from orchestrator.spec.trials import RetryPolicy
from orchestrator.store.artifacts import WEIGHTS, Store
from orchestrator.store.leases import Leases
from trainers.errors import Interrupted
from trainers.specs import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """The store, the driver's leases, and how often failures are retried and checkpoints written."""

    store: Store
    leases: Leases
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    checkpoint_steps: int | None = None


class Backend(Protocol):
    """Computes stages and posts events to the driver. Its methods raise the stages' errors."""

    def shared(self, stages: Sequence[Stage]) -> None:
        """Return when all of them are complete."""

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """Train, and commit the artifact."""

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """Score the trained model on every set of `stages`."""

    def gpus(self) -> int:
        """Return the number of GPUs that one training could get."""

    def pause(self, seconds: float) -> None:
        """Wait without holding devices. Raises Interrupted when the sweep is asked to stop."""

    def post(self, event: Event) -> None:
        """Tell the driver."""


def run_to_end(plan: TrialPlan, placement: Placement, backend: Backend, execution: Execution) -> None:
    """Complete a trial, and post its start and its end; a failure is an event. Raises Interrupted."""
    backend.post(Started())
    try:
        complete_trial(plan, placement, backend, execution)
    except Exception as error:
        if failures.interrupted(error):
            raise Interrupted("stopped on request.") from error
        failure, detail = failures.classify(error), traceback.format_exc()
        backend.post(Failed(cause=failure.cause, message=failure.message, detail=detail))
    else:
        backend.post(Completed())


def complete_trial(plan: TrialPlan, placement: Placement, backend: Backend, execution: Execution) -> None:
    """Compute the missing stages of a trial, with retries. Raises the last error when none is left, and Interrupted."""
    store, held = execution.store, execution.leases.held
    failed: list[Failure] = []
    while True:
        training = False
        try:
            if _trains(plan, store):
                backend.post(StageBegan(stage="prepare"))
                backend.shared(plan.train.needs)
                backend.post(StageBegan(stage="waiting"))
                with held(f"train-{plan.key}", lambda: not _trains(plan, store), backend.pause) as ours:
                    if ours:
                        for kind in (plan.train.kind, WEIGHTS):
                            store.remove_leftovers(kind, plan.key)
                        training = True
                        backend.train(plan.train, placement)
                        training = False
            if evaluations := plan.unscored(store):
                backend.shared([need for stage in evaluations for need in stage.needs if need != plan.train])
                backend.post(StageBegan(stage="waiting"))
                with held(f"evaluate-{plan.key}", lambda: not plan.unscored(store), backend.pause) as ours:
                    if ours:
                        missing = plan.unscored(store)
                        for stage in missing:
                            # Remove scores of other weights, and half-written attempts.
                            store.discard(stage.kind, stage.key)
                            store.remove_leftovers(stage.kind, stage.key)
                        backend.evaluate(plan, missing, placement)
            return
        except Exception as error:
            if failures.interrupted(error):
                raise
            failures.set_aside_damage(error, store)
            failed.append(failure := failures.classify(error))
            retry = failures.next_attempt(
                failed, placement, execution.retries, backend.gpus(), training=training
            )
            if retry is None:
                raise
            how = f"again in {retry.wait_s:.0f} s"
            if retry.placement != placement:
                how = f"again {failures.describe_change(placement, retry.placement)}"
            backend.post(Retried(cause=failure.cause, message=failure.message, how=how))
        placement = retry.placement
        backend.pause(retry.wait_s)


def _trains(plan: TrialPlan, store: Store) -> bool:
    """Return whether the training is missing, or its weights are although an evaluation needs them."""
    untrained = not store.complete(plan.train.kind, plan.key)
    return untrained or any(isinstance(stage, TrainStage) for stage in plan.missing(store))
