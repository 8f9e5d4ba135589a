"""One trial, whatever runs it: shared stages → training → evaluation, and again after what can be mended."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.run import compute, failures
from orchestrator.run.events import Event, Retried, StageBegan, TakeRow
from orchestrator.run.failures import Failure, NextAttempt
from orchestrator.spec.stages import EvaluateStage, SharedStage, Stage, TrainStage, TrialPlan, usable
from orchestrator.spec.trials import RetryPolicy
from orchestrator.store.artifacts import WEIGHTS, Store
from orchestrator.store.leases import Leases
from trainers.specs import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How missing stages are computed: where they go, under whose leases, and how often again."""

    store: Store
    leases: Leases
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    checkpoint_steps: int | None = None


class Backend(Protocol):
    """What computes stages, and carries events to the driver. Methods raise what computing raised."""

    def shared(self, stages: Sequence[Stage]) -> None:
        """Return when all of them are in the store."""

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """Train, and commit the artifact."""

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """Score the trained model on every set of `stages`."""

    def gpus(self) -> int:
        """How many GPUs one training could have."""

    def pause(self, seconds: float) -> None:
        """Wait, holding nothing. Raises Interrupted where the sweep is asked to stop."""

    def post(self, event: Event) -> None:
        """Tell the driver."""


def complete_trial(plan: TrialPlan, placement: Placement, backend: Backend, execution: Execution) -> None:
    """Compute what is missing of a trial. Raises the error that the retry policy does not cover, and Interrupted."""
    store, held = execution.store, execution.leases.held
    failed: list[Failure] = []
    while True:
        try:
            if any(isinstance(stage, TrainStage) for stage in plan.missing(store)):
                backend.post(StageBegan(stage="prepare"))
                backend.shared(plan.train.needs)
                backend.post(StageBegan(stage="waiting"))
                with held(f"train-{plan.key}", lambda: _trained(plan, store), backend.pause) as ours:
                    if ours:
                        for kind in (plan.train.kind, WEIGHTS):
                            store.remove_leftovers(kind, plan.key)
                        backend.train(plan.train, placement)
            if evaluations := plan.unscored(store):
                backend.shared([need for stage in evaluations for need in stage.needs if need != plan.train])
                backend.post(StageBegan(stage="waiting"))
                with held(f"evaluate-{plan.key}", lambda: not plan.unscored(store), backend.pause) as ours:
                    if ours:
                        missing = plan.unscored(store)
                        _forget_earlier(missing, store)
                        backend.evaluate(plan, missing, placement)
            return
        except Exception as error:
            retry = _next_attempt(error, failed, placement, backend, execution)
        placement = retry.placement
        backend.pause(retry.wait_s)


def _next_attempt(
    error: Exception, failed: list[Failure], placement: Placement, backend: Backend, execution: Execution
) -> NextAttempt:
    """Note the failure, and return the attempt that follows. Raises the error where none does."""
    if failures.interrupted(error):
        raise error
    failures.set_aside_damage(error, execution.store)
    failed.append(failures.classify(error))
    retry = failures.next_attempt(failed, placement, execution.retries, backend.gpus())
    if retry is None:
        raise error
    how = f"again in {retry.wait_s:.0f} s"
    if retry.placement != placement:
        how = f"again {failures.describe_change(placement, retry.placement)}"
    backend.post(Retried(cause=failed[-1].cause, message=failed[-1].message, how=how))
    return retry


def _forget_earlier(stages: Sequence[EvaluateStage], store: Store) -> None:
    """Make room for scores: those of other weights, and what was left half-written."""
    for stage in stages:
        if (old := store.sound_manifest(stage.kind, stage.key)) is not None:
            store.discard(stage.kind, stage.key, old["attempt"])
        store.remove_leftovers(stage.kind, stage.key)


def _trained(plan: TrialPlan, store: Store) -> bool:
    """Whether its weights can be read, or nobody needs them."""
    return usable(plan.train, store) or not any(
        isinstance(stage, TrainStage) for stage in plan.missing(store)
    )


def compute_leased(stage: SharedStage, store: Store, report: TakeRow) -> None:
    """Compute a shared stage whose lease is held, where nothing of an earlier attempt is left."""
    store.remove_leftovers(stage.kind, stage.key)
    compute.run_shared(stage, store, report)
