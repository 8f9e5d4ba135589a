"""The same stages in one process, in plan order, with no Ray: for debugging and tests."""

import dataclasses
import functools
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.run import compute, failures
from orchestrator.run.compute import TrainCall
from orchestrator.run.events import Completed, Failed, Post, Started, posting_for, reporting
from orchestrator.run.trial import Execution, complete_trial, compute_leased
from orchestrator.spec.stages import EvaluateStage, Stage, TrainStage, TrialPlan
from trainers.specs import Placement
from trainers.train.stopping import StopRequest


def run_inline(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    on_event: Post,
    execution: Execution,
    stop: StopRequest,
) -> None:
    """Run what is missing of each plan. Raises KeyboardInterrupt when stopped; what fails is an event."""
    for plan in plans:
        post = posting_for(plan.key, on_event)
        post(Started())
        try:
            complete_trial(plan, placements[plan.key], InlineBackend(execution, post, stop), execution)
        except Exception as error:
            if failures.interrupted(error):
                raise KeyboardInterrupt from error
            failure = failures.classify(error)
            detail = traceback.format_exc()
            post(Failed(cause=failure.cause, message=failure.message, detail=detail))
        else:
            post(Completed())


@dataclass(frozen=True, slots=True)
class InlineBackend:
    """Computes in this process."""

    execution: Execution
    post: Post
    stop: StopRequest

    def shared(self, stages: Sequence[Stage]) -> None:
        """Compute each, after what it needs."""
        for stage in stages:
            store = self.execution.store
            if store.complete(stage.kind, stage.key):
                continue
            self.shared(stage.needs)
            assert not isinstance(stage, TrainStage | EvaluateStage)
            name = f"{stage.kind}-{stage.key}"
            done = functools.partial(store.complete, stage.kind, stage.key)
            with (
                reporting(stage.kind, self.post) as report,
                self.execution.leases.held(name, done, self.pause) as ours,
            ):
                if ours:
                    compute_leased(stage, store, report)

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """Train as a world of one, with the accumulation that makes up for the other ranks."""
        accumulation = placement.accumulation * placement.world_size
        alone = dataclasses.replace(placement, world_size=1, accumulation=accumulation)
        call = TrainCall(
            placement=alone,
            checkpoint_steps=self.execution.checkpoint_steps,
            stop=self.stop.left_s,
            provenance={"backend": "inline"},
        )
        with reporting(stage.kind, self.post) as report, self.stop.deferred():
            compute.run_train(stage, call, self.execution.store, report)

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """Score in this process."""
        with reporting("evaluate", self.post) as report:
            compute.run_evaluations(stages, self.execution.store, report)

    def gpus(self) -> int:
        """One at most: a training is a world of one."""
        return 1

    def pause(self, seconds: float) -> None:
        """Sleep; a signal ends it."""
        time.sleep(seconds)
